"""The core's configuration: plain numbers and policy names, written to every journal segment."""

from __future__ import annotations

from dataclasses import dataclass, field

from sidecar.core.facts import EngineFacts

SECOND_NS = 1_000_000_000


@dataclass(frozen=True)
class ClassLimit:
    """The limits of a request class.

    A request ends as Expired once it has queued for `queue_wait_ns_max`, and is refused when its predicted wait is
    longer. `patience_ns` is the shortest time that a request waits before others are held back for it.
    """

    queue_wait_ns_max: int = 600 * SECOND_NS
    patience_ns: int = 20 * SECOND_NS


@dataclass(frozen=True)
class CoreConfig:
    """The core's settings. Policies are named as in the configuration file; `Policies` holds their factories."""

    store_bytes: int = 4 << 30
    disk_bytes: int = 0
    """0 means no disk tier."""
    fetches_max: int = 4
    output_tokens_assumed: int = 1024
    """The output length assumed for a request that gives none."""
    sequence_tokens_assumed: int = 131_072
    """The sequence length assumed for an engine that reports none; requests are counted as no longer than this."""
    queued_max: int = 50_000
    queued_tokens_max: int = 1 << 31
    queued_bytes_max: int = 1 << 30
    tenant_queued_max: int = 50_000
    tenant_queued_tokens_max: int = 1 << 31
    tenant_queued_bytes_max: int = 1 << 30
    tenant_weights: dict[str, float] = field(default_factory=dict)
    """Relative shares of the service by tenant; a tenant that is not listed has weight 1."""
    heals_max: int = 8
    visits_max: int = 2
    seat_slack: float = 0.1
    seats_default: int = 64
    retry_ns: int = 50_000_000
    retry_ns_max: int = 2 * SECOND_NS
    joining_ns_max: int = 30 * SECOND_NS
    """The longest time that a joining backend is spared while it loads adapters; 0 disables joining."""
    pools: dict[str, EngineFacts] = field(default_factory=dict)
    """Pools whose backends come and go, by id, with the engine facts declared for them."""
    base_requests: bool = True
    classes: dict[str, ClassLimit] = field(default_factory=lambda: {"default": ClassLimit()})
    eviction: str = "rate_per_byte"
    disk_eviction: str = "lru"
    ordering: str = "soft_gated"
    routing: str = "partitioned"
    prefetch: str = "planned"
    prefetch_bytes_per_s: int = 128 << 20
    """The rate limit of speculative fetches."""
    names_limits: bool = False
    """The error of a request that expires says which limit passed; journals of 0.1.0 have the texts that did not."""
    voids_end_urgency: bool = True
    """A request whose promise is void goes before no other whose promise holds; in journals of 0.1.0 it may."""
    estimates_of_0_1: bool = False
    """The lengths of answers and the time for prompts are estimated as 0.1.0 did: its journals rest on that."""
    shares_of_0_1: bool = False
    """Tenants share engines as in 0.1.0, by `SoftGatedOf01`."""
    raise_on: str = ""
    """The event or effect whose handling raises on purpose (`core.injected`)."""

    def weight_of(self, tenant: str) -> float:
        return self.tenant_weights.get(tenant, 1.0)

    def limit_of(self, klass: str) -> ClassLimit:
        """Return the limits of a class; of one that was taken out while its requests were here those of the default."""
        return self.classes.get(klass) or self.classes["default"]


FIXED = (
    "store_bytes", "disk_bytes", "fetches_max", "eviction", "disk_eviction", "ordering", "routing", "prefetch",
    "raise_on",
)  # fmt: skip
"""The fields that do not change while the core runs: what it holds was made by them."""
