"""What the core is configured with: plain numbers and policy names, journaled with every segment."""

from __future__ import annotations

from dataclasses import dataclass, field

from sidecar.core.facts import EngineFacts

SECOND_NS = 1_000_000_000


@dataclass(frozen=True)
class ClassLimit:
    """A request class: how long one of it may wait in the queue before it ends as Expired.

    One that is predicted to wait longer is refused. `patience_ns` is how long one waits, at least, before others are
    held back for it.
    """

    queue_wait_ns_max: int = 600 * SECOND_NS
    patience_ns: int = 20 * SECOND_NS


@dataclass(frozen=True)
class CoreConfig:
    """The core's settings.

    Policies are named as in the configuration; the core is handed a factory that resolves the names.
    """

    store_bytes: int = 4 << 30
    disk_bytes: int = 0
    """0 is no disk tier."""
    fetches_max: int = 4
    output_tokens_assumed: int = 1024
    """What a request may generate that does not say."""
    sequence_tokens_assumed: int = 131_072
    """The longest prompt and answer of an engine that does not say; a request counts as no longer than that."""
    queued_max: int = 50_000
    queued_tokens_max: int = 1 << 31
    queued_bytes_max: int = 1 << 30
    tenant_queued_max: int = 50_000
    tenant_queued_tokens_max: int = 1 << 31
    tenant_queued_bytes_max: int = 1 << 30
    tenant_weights: dict[str, float] = field(default_factory=dict)
    """Shares of the service; a tenant that is not here has 1."""
    heals_max: int = 8
    visits_max: int = 2
    seat_slack: float = 0.1
    seats_default: int = 64
    retry_ns: int = 50_000_000
    retry_ns_max: int = 2 * SECOND_NS
    joining_ns_max: int = 30 * SECOND_NS
    """How long a backend that has just come up is spared for its adapters' sake, at most; 0 is not at all."""
    pools: dict[str, EngineFacts] = field(default_factory=dict)
    """The pools whose backends come and go, by id, and what is declared of the engines in them."""
    base_requests: bool = True
    classes: dict[str, ClassLimit] = field(default_factory=lambda: {"default": ClassLimit()})
    eviction: str = "rate_per_byte"
    disk_eviction: str = "lru"
    ordering: str = "soft_gated"
    routing: str = "partitioned"
    prefetch: str = "planned"
    prefetch_bytes_per_s: int = 128 << 20
    """What may be fetched though nobody waits for it."""
    raise_on: str = ""
    """What is to raise (`core.injected`): a fault on purpose."""
