"""All errors of requests, adapters and commands, in one table.

    SidecarError
    ├── Refused   never dispatched: safe to send again, here or elsewhere
    ├── Dropped   expired or cancelled while it waited in the queue
    ├── Failed    dispatched, so it may have run
    ├── Invalid   an adapter that cannot be served as it is
    └── Misused   a faulty command, configuration or machine

The family tells whether the request may have run. A `Reason` is the machine-readable cause; the table maps it to its
family, its gRPC code and whether a retry can help, from which each front derives its own form. Messages are for people:
they name the thing, the reason and the way out.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

CRASHED_EXIT = 70
"""The exit code of a process that ends because it can no longer trust its own state (EX_SOFTWARE of sysexits)."""


class Family(Enum):
    """The families of errors; the family tells whether the request may have run."""

    REFUSED = "refused"
    DROPPED = "dropped"
    FAILED = "failed"
    INVALID = "invalid"
    MISUSED = "misused"


@dataclass(frozen=True)
class Row:
    """A row of the table: the family, the name of the gRPC status code, and whether a retry can help."""

    family: Family
    code: str
    retryable: bool = False


class Reason(Enum):
    """The closed set of causes; `value` goes into `google.rpc.ErrorInfo.reason`."""

    # Refused: never dispatched.
    QUEUE_FULL = "QUEUE_FULL"
    RATE_LIMITED = "RATE_LIMITED"
    DRAINING = "DRAINING"
    DEADLINE_UNMEETABLE = "DEADLINE_UNMEETABLE"
    NO_BACKEND = "NO_BACKEND"
    NOT_OWNER = "NOT_OWNER"
    ADAPTER_UNAVAILABLE = "ADAPTER_UNAVAILABLE"
    UNKNOWN_ADAPTER = "UNKNOWN_ADAPTER"
    NOT_ALLOWED = "NOT_ALLOWED"
    QUARANTINED = "QUARANTINED"
    PAUSED = "PAUSED"
    INVALID_REQUEST = "INVALID_REQUEST"
    TOKEN_TOO_OLD = "TOKEN_TOO_OLD"
    CHANGED_MEANWHILE = "CHANGED_MEANWHILE"
    STATE_UNAVAILABLE = "STATE_UNAVAILABLE"
    CRASHED = "CRASHED"
    # Dropped: left the queue without being dispatched.
    EXPIRED = "EXPIRED"
    CANCELLED = "CANCELLED"
    # Failed: dispatched, may have run.
    BACKEND_FAILED = "BACKEND_FAILED"
    BACKEND_REJECTED = "BACKEND_REJECTED"
    CLIENT_STALLED = "CLIENT_STALLED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    SIDECAR_FAILED = "SIDECAR_FAILED"
    POISONOUS = "POISONOUS"
    UNOBSERVED = "UNOBSERVED"
    # Invalid: the adapter itself.
    ADAPTER_MALFORMED = "ADAPTER_MALFORMED"
    ADAPTER_UNSUPPORTED = "ADAPTER_UNSUPPORTED"
    ADAPTER_MISMATCH = "ADAPTER_MISMATCH"
    ADAPTER_TOO_LARGE = "ADAPTER_TOO_LARGE"
    ORIGIN_NOT_ALLOWED = "ORIGIN_NOT_ALLOWED"
    ORIGIN_UNREADABLE = "ORIGIN_UNREADABLE"
    INVALID_NAME = "INVALID_NAME"
    NO_PREVIOUS_VERSION = "NO_PREVIOUS_VERSION"
    MANAGED_ELSEWHERE = "MANAGED_ELSEWHERE"
    # Misused: the command, the configuration, the machine.
    CONFIG_INVALID = "CONFIG_INVALID"
    DATA_DIRECTORY_IN_USE = "DATA_DIRECTORY_IN_USE"
    PORT_IN_USE = "PORT_IN_USE"
    BACKEND_UNREACHABLE = "BACKEND_UNREACHABLE"
    UNKNOWN_REQUEST = "UNKNOWN_REQUEST"
    UNKNOWN_BACKEND = "UNKNOWN_BACKEND"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    NOT_A_JOURNAL = "NOT_A_JOURNAL"
    STATE_INCOMPATIBLE = "STATE_INCOMPATIBLE"
    STATE_NOT_EMPTY = "STATE_NOT_EMPTY"

    @property
    def row(self) -> Row:
        return TABLE[self]


TABLE: dict[Reason, Row] = {
    Reason.QUEUE_FULL: Row(Family.REFUSED, "RESOURCE_EXHAUSTED", retryable=True),
    Reason.RATE_LIMITED: Row(Family.REFUSED, "RESOURCE_EXHAUSTED", retryable=True),
    Reason.DRAINING: Row(Family.REFUSED, "UNAVAILABLE", retryable=True),
    Reason.DEADLINE_UNMEETABLE: Row(Family.REFUSED, "RESOURCE_EXHAUSTED", retryable=True),
    Reason.NO_BACKEND: Row(Family.REFUSED, "UNAVAILABLE", retryable=True),
    Reason.NOT_OWNER: Row(Family.REFUSED, "UNAVAILABLE", retryable=True),
    Reason.ADAPTER_UNAVAILABLE: Row(Family.REFUSED, "UNAVAILABLE", retryable=True),
    Reason.UNKNOWN_ADAPTER: Row(Family.REFUSED, "NOT_FOUND"),
    Reason.NOT_ALLOWED: Row(Family.REFUSED, "PERMISSION_DENIED"),
    Reason.QUARANTINED: Row(Family.REFUSED, "FAILED_PRECONDITION"),
    Reason.PAUSED: Row(Family.REFUSED, "UNAVAILABLE", retryable=True),
    Reason.INVALID_REQUEST: Row(Family.REFUSED, "INVALID_ARGUMENT"),
    Reason.TOKEN_TOO_OLD: Row(Family.REFUSED, "OUT_OF_RANGE"),
    Reason.CHANGED_MEANWHILE: Row(Family.REFUSED, "ABORTED", retryable=True),
    Reason.STATE_UNAVAILABLE: Row(Family.REFUSED, "UNAVAILABLE", retryable=True),
    Reason.CRASHED: Row(Family.REFUSED, "UNAVAILABLE", retryable=True),
    Reason.EXPIRED: Row(Family.DROPPED, "DEADLINE_EXCEEDED"),
    Reason.CANCELLED: Row(Family.DROPPED, "CANCELLED"),
    Reason.BACKEND_FAILED: Row(Family.FAILED, "UNAVAILABLE"),
    Reason.BACKEND_REJECTED: Row(Family.FAILED, "INTERNAL"),
    Reason.CLIENT_STALLED: Row(Family.FAILED, "CANCELLED"),
    Reason.DEADLINE_EXCEEDED: Row(Family.FAILED, "DEADLINE_EXCEEDED"),
    Reason.SIDECAR_FAILED: Row(Family.FAILED, "INTERNAL"),
    Reason.POISONOUS: Row(Family.FAILED, "INTERNAL"),
    Reason.UNOBSERVED: Row(Family.FAILED, "UNKNOWN"),
    Reason.ADAPTER_MALFORMED: Row(Family.INVALID, "INVALID_ARGUMENT"),
    Reason.ADAPTER_UNSUPPORTED: Row(Family.INVALID, "FAILED_PRECONDITION"),
    Reason.ADAPTER_MISMATCH: Row(Family.INVALID, "FAILED_PRECONDITION"),
    Reason.ADAPTER_TOO_LARGE: Row(Family.INVALID, "FAILED_PRECONDITION"),
    Reason.ORIGIN_NOT_ALLOWED: Row(Family.INVALID, "PERMISSION_DENIED"),
    Reason.ORIGIN_UNREADABLE: Row(Family.INVALID, "NOT_FOUND"),
    Reason.INVALID_NAME: Row(Family.INVALID, "INVALID_ARGUMENT"),
    Reason.NO_PREVIOUS_VERSION: Row(Family.INVALID, "FAILED_PRECONDITION"),
    Reason.MANAGED_ELSEWHERE: Row(Family.INVALID, "FAILED_PRECONDITION"),
    Reason.CONFIG_INVALID: Row(Family.MISUSED, "INVALID_ARGUMENT"),
    Reason.DATA_DIRECTORY_IN_USE: Row(Family.MISUSED, "FAILED_PRECONDITION"),
    Reason.PORT_IN_USE: Row(Family.MISUSED, "FAILED_PRECONDITION"),
    Reason.BACKEND_UNREACHABLE: Row(Family.MISUSED, "UNAVAILABLE"),
    Reason.UNKNOWN_REQUEST: Row(Family.MISUSED, "NOT_FOUND"),
    Reason.UNKNOWN_BACKEND: Row(Family.MISUSED, "NOT_FOUND"),
    Reason.UNAUTHENTICATED: Row(Family.MISUSED, "UNAUTHENTICATED"),
    Reason.NOT_A_JOURNAL: Row(Family.MISUSED, "INVALID_ARGUMENT"),
    Reason.STATE_INCOMPATIBLE: Row(Family.MISUSED, "FAILED_PRECONDITION"),
    Reason.STATE_NOT_EMPTY: Row(Family.MISUSED, "FAILED_PRECONDITION"),
}


class SidecarError(Exception):
    """An error with a machine-readable reason and a message for people.

    `details` go into ErrorInfo's metadata (adapter, version, backend), `retry_after_s` into RetryInfo. `http` has the
    status and headers for HTTP clients where an external check chose them, and not the table.
    """

    family: Family
    http: tuple[int, tuple[tuple[str, str], ...]] | None = None
    code: str | None = None
    """The name of the gRPC status, if it is not the table's."""
    is_counted = False
    """The request that ended by it is in the metrics."""

    def __init__(self, reason: Reason, message: str, *, retry_after_s: float | None = None, **details: str) -> None:
        super().__init__(message)
        assert reason.row.family is self.family, f"{reason} is not one of {type(self).__name__}"
        self.reason = reason
        self.message = message
        self.details = details
        self.retry_after_s = retry_after_s


class Refused(SidecarError):
    family = Family.REFUSED


class Dropped(SidecarError):
    family = Family.DROPPED


class Failed(SidecarError):
    family = Family.FAILED


class Invalid(SidecarError):
    family = Family.INVALID


class Misused(SidecarError):
    family = Family.MISUSED


_CLASSES = {cls.family: cls for cls in (Refused, Dropped, Failed, Invalid, Misused)}


def error_for(reason: Reason, message: str, *, retry_after_s: float | None = None, **details: str) -> SidecarError:
    """Return an error of the reason's family."""
    return _CLASSES[reason.row.family](reason, message, retry_after_s=retry_after_s, **details)


def needs_extra(what: str, extra: str) -> str:
    """Return the text for what needs an extra that is not installed. No index has our package."""
    return (
        f"{what} needs the extra {extra}, which is not installed: in a clone .venv/bin/pip install -e '.[{extra}]', "
        f"else pip install 'PATH/lora_sidecar-VERSION-py3-none-any.whl[{extra}]' with the release's wheel"
    )
