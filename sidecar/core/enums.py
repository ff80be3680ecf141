"""The closed sets of the core: why a request waits, what an engine's fault means, how a request ended."""

from __future__ import annotations

from enum import Enum

from sidecar.errors import Family, Reason


class Tier(Enum):
    """Where weights are kept on this host."""

    MEMORY = "memory"
    DISK = "disk"


class Fate(Enum):
    """What became of an adapter's weights at a place, or will."""

    ABSENT = "absent"
    GONE = "gone"
    IN_USE = "in use"
    """They go as soon as their users are done."""
    NOT_UNLOADED = "not unloaded"
    """The engine unloads nothing, and evicts them when it needs the room."""
    SHARED = "shared"
    """Other names have them."""
    HELD = "held"
    RESIDENT = "resident"
    FETCHING = "fetching"
    UNFIT = "unfit"
    """The engine cannot serve the adapter."""
    LEAVING = "leaving"
    """The backend is about to go, or gone."""


class Voided(Enum):
    """Why a promise no longer holds; the label of `lora_sidecar_wait_bounds_voided_total`."""

    ADAPTER_LATE = "adapter late"
    ANSWERS_LONGER = "answers longer"
    BACKEND_ADDED = "backend added"
    BACKEND_LOST = "backend lost"
    BACKEND_SLOWED = "backend slowed"
    BACKEND_STALLED = "backend stalled"
    ENGINE_QUEUE_FULL = "engine queue full"
    KEPT_APART = "kept apart"
    MOVED = "moved"
    NO_BACKEND = "no backend"
    RUN_AGAIN = "run again"
    SHARES_CHANGED = "shares changed"
    UNTOLD = "end untold"


class Fault(Enum):
    """What an engine's error text means for the gateway; `backends/faults.py` has the texts."""

    MISS = "engine_miss"
    FULL = "cache_full"
    PAGE_CLAIM = "page_claim"
    WHOLE_ENGINE = "whole_engine"
    UNKNOWN_REGION = "unknown_region"
    QUEUE_FULL = "engine_queue_full"
    LOST = "backend_lost"
    NO_ANSWER = "no_answer"
    REJECTED = "rejected"
    NOT_OWNED = "not_owned"
    DEADLY = "deadly_adapter"


class Seen(Enum):
    """What has been seen of an answer that has ended: all of it, its bytes but not its tokens, or not even its end."""

    ALL = "all"
    ESTIMATED = "estimated"
    NOTHING = "nothing"


class Phase(Enum):
    """Whether a backend is reached."""

    DOWN = "down"
    UP = "up"


class Cache(Enum):
    """Where a request's adapter came from; returned with the answer."""

    BASE = "base"
    RESIDENT = "resident"
    HOST = "host"
    FETCHED = "fetched"
    JOINED = "joined"


class Outcome(Enum):
    """How a request ended; the label of `lora_sidecar_requests_total`."""

    OK = "ok"
    REFUSED = "refused"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    FAILED = "failed"


def outcome_of(reason: Reason | None) -> Outcome:
    """Return the label under which an ending is counted."""
    if reason is None:
        return Outcome.OK
    match reason.row.family:
        case Family.REFUSED:
            return Outcome.REFUSED
        case Family.DROPPED:
            return DROPPED[reason]
        case Family.FAILED | Family.INVALID | Family.MISUSED:
            return Outcome.FAILED


DROPPED = {Reason.EXPIRED: Outcome.EXPIRED, Reason.CANCELLED: Outcome.CANCELLED}
