"""Every policy that can be named in the configuration: one line each."""

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
        "skip": "policies.ordering.skip:Skip",
    },
    "routing": {
        "resident_first": "policies.routing.resident_first:ResidentFirst",
    },
}
