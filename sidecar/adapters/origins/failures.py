"""The failures of a download: transient (retried), permanent (reported at once), or no room on the disk."""

from __future__ import annotations

from sidecar.adapters.origins.origin import Origin, without_secrets
from sidecar.errors import Invalid, Reason, Refused

TEXT_LENGTH_MAX = 300


class Transient(Exception):
    """An attempt failed and another may succeed: a cut connection, a busy server.

    `retry_after_s` is the wait that the server asked for; `restart` discards the bytes received so far.
    """

    def __init__(self, why: str, retry_after_s: float = 0.0, restart: bool = False) -> None:
        super().__init__(why)
        self.why = without_secrets(why)[:TEXT_LENGTH_MAX]
        self.retry_after_s = retry_after_s
        self.restart = restart


class Missing(Exception):
    """The origin has no file of that name."""


class Stopped(Exception):
    """The download was cancelled: nobody waits for it any more."""


def unreadable(origin: Origin, why: str) -> Invalid:
    """Return the error for a file that the origin refuses for good: a retry will not help."""
    return Invalid(Reason.ORIGIN_UNREADABLE, f"{origin}: {without_secrets(why)[:TEXT_LENGTH_MAX]}")


def unavailable(origin: Origin, why: str) -> Refused:
    """Return the error for an origin that cannot give the file now."""
    return Refused(Reason.ADAPTER_UNAVAILABLE, f"{origin} could not be fetched: {why}; try again later")


def too_large(what: str, size_bytes: int, bytes_max: int) -> Invalid:
    """Return the error for a file or adapter that has, or claims, more bytes than are allowed."""
    return Invalid(
        Reason.ADAPTER_TOO_LARGE,
        f"{what} has {size_bytes} bytes or more and {bytes_max} are allowed; raise origins.size_bytes_max if it is "
        "meant to be that large",
    )


def no_room(what: str, error: OSError) -> Refused:
    """Return the error for files that cannot be written. It names no folder: tenants are told it, too."""
    return Refused(
        Reason.ADAPTER_UNAVAILABLE,
        f"no room for {what} on the disk of the data directory ({error.strerror or type(error).__name__}); free some, "
        "or give the sidecar a data directory that it can write to",
    )
