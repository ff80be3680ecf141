"""What the core is configured with: plain numbers and policy names, journaled with every segment."""

from __future__ import annotations

from dataclasses import dataclass, field

SECOND_NS = 1_000_000_000


@dataclass(frozen=True)
class ClassLimit:
    """A request class: how long one of it may wait in the queue before it ends as Expired."""

    queue_wait_ns_max: int = 600 * SECOND_NS


@dataclass(frozen=True)
class CoreConfig:
    """The core's settings.

    Policies are named as in the configuration; the core is handed a factory that resolves the names.
    """

    store_bytes: int = 4 << 30
    disk_bytes: int = 0
    """0 is no disk tier."""
    fetches_max: int = 4
    queued_max: int = 50_000
    queued_tokens_max: int = 1 << 31
    tenant_queued_max: int = 50_000
    heals_max: int = 8
    visits_max: int = 2
    seat_slack: float = 0.1
    seats_default: int = 64
    retry_ns: int = 50_000_000
    retry_ns_max: int = 2 * SECOND_NS
    base_requests: bool = True
    classes: dict[str, ClassLimit] = field(default_factory=lambda: {"default": ClassLimit()})
    eviction: str = "lru"
    disk_eviction: str = "lru"
    ordering: str = "skip"
    routing: str = "resident_first"
