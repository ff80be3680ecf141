"""The closed sets of the core: why a request waits, what an engine's fault means, how a request ended."""

from __future__ import annotations

from enum import Enum

from sidecar.errors import Family, Reason


class Why(Enum):
    """Why a queued request is not running; the label in the queue command, the log and the metrics."""

    BACKEND_DOWN = "backend down"
    STALLED = "stalled?"
    BACKING_OFF = "backing off"
    FETCHING = "fetching"
    STORE_FULL = "host store full"
    LOADING = "loading"
    HOST_CACHE_FULL = "engine host cache full"
    SLOTS_BUSY = "slots busy"
    SEATS_FULL = "seats full"
    KV_FULL = "KV cache full"
    PROBATION = "first load under way elsewhere"
    APART = "kept apart from a suspect load"
    GATED = "gated"
    TENANT_CAP = "tenant cap"
    NEXT = "next"

    @property
    def because(self) -> str:
        """The reason as a clause of a sentence; {places} are the backends where it holds, {names} the adapters."""
        return BECAUSE[self]


BECAUSE = {
    Why.BACKEND_DOWN: "no backend that could serve is up",
    Why.STALLED: "nothing comes from {places}",
    Why.BACKING_OFF: "a pause is kept after a refusal by {places}",
    Why.FETCHING: "weights of {names} are being fetched",
    Why.STORE_FULL: "the host store has no room for {names}",
    Why.LOADING: "weights of {names} are being loaded on {places}",
    Why.HOST_CACHE_FULL: "the adapter host cache of {places} is full",
    Why.SLOTS_BUSY: "all slots are busy on {places}",
    Why.SEATS_FULL: "all seats are taken on {places}",
    Why.KV_FULL: "the KV cache is full on {places}",
    Why.PROBATION: "a first load of {names} is under way elsewhere",
    Why.APART: "a suspect load of {names} on {places} is kept apart",
    Why.GATED: "the ordering policy holds back on {places}",
    Why.TENANT_CAP: "a tenant has its share of {places}",
    Why.NEXT: "the turn on {places} has just come",
}


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


VOID_BECAUSE = {
    Voided.ADAPTER_LATE: "The adapter's weights came later than assumed.",
    Voided.ANSWERS_LONGER: "Answers have become longer than those before, by which the bound was reckoned.",
    Voided.BACKEND_ADDED: "A backend was added, and the host store no longer holds an adapter for every slot.",
    Voided.BACKEND_LOST: "The engine was lost.",
    Voided.BACKEND_SLOWED: (
        "The engine's steps take longer than the bound assumed: *backend slower than assumed* in `sidecar queue` and "
        "`sidecar top`. Until a pace is calibrated or learned it is a guess, so a first burst may show this although "
        "nothing is wrong; later bounds rest on what was measured."
    ),
    Voided.BACKEND_STALLED: "Nothing came from the engine for a while.",
    Voided.ENGINE_QUEUE_FULL: "The engine refused a request because its own queue was full.",
    Voided.KEPT_APART: "The engine can't run base and adapter requests in one batch, and both kinds came.",
    Voided.MOVED: "The request was moved to another backend.",
    Voided.NO_BACKEND: "No backend that could serve was up.",
    Voided.RUN_AGAIN: "The request was sent and had to be sent again.",
    Voided.SHARES_CHANGED: "Tenants' weights were changed.",
    Voided.UNTOLD: (
        "A proxy carried an answer whose end was never reported, so it kept its seat until the sidecar asked the "
        "engine. Or the engine got requests that this process did not send."
    ),
}


def void_told(reason: str) -> str:
    """Return why a promise is void, as views tell it; journals and metrics have the plain label."""
    return "backend slower than assumed" if reason == Voided.BACKEND_SLOWED.value else reason


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
