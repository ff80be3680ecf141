"""Every policy that the configuration can name, one line each."""

from __future__ import annotations

POLICIES: dict[str, dict[str, str]] = {
    "eviction": {
        "lru": "policies.eviction.lru:LRU",
        "lfu": "policies.eviction.lfu:LFU",
        "gdsf": "policies.eviction.gdsf:GDSF",
        "s3fifo": "policies.eviction.s3fifo:S3FIFO",
        "sieve": "policies.eviction.sieve:Sieve",
        "rate_per_byte": "policies.eviction.rate_per_byte:RatePerByte",
    },
    "ordering": {
        "credit": "policies.ordering.credit:Credit",
        "fifo": "policies.ordering.fifo:Fifo",
        "skip": "policies.ordering.skip:Skip",
        "soft_gated": "policies.ordering.soft_gated:SoftGated",
    },
    "routing": {
        "partitioned": "policies.routing.partitioned:Partitioned",
        "round_robin": "policies.routing.round_robin:RoundRobin",
        "least_in_flight": "policies.routing.least_in_flight:LeastInFlight",
        "affinity": "policies.routing.affinity:Affinity",
        "proportional": "policies.routing.proportional:Proportional",
        "resident_first": "policies.routing.resident_first:ResidentFirst",
    },
    "prefetch": {
        "none": "policies.prefetch.none:Nothing",
        "planned": "policies.prefetch.planned:Planned",
        "speculative": "policies.prefetch.speculative:Speculative",
    },
}
