"""The closed sets of the core: why a request waits, what an engine did wrong, where a backend stands."""

from __future__ import annotations

from enum import Enum


class Why(Enum):
    """Why a queued request is not running. The queue command, the log and the metrics all read this."""

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


class Phase(Enum):
    """Where a backend stands."""

    DOWN = "down"
    UP = "up"


class Cache(Enum):
    """Where a request's adapter came from, as its answer tells."""

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
