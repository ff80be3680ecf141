"""Every policy that can be named in the configuration: one line each."""

from __future__ import annotations

POLICIES: dict[str, dict[str, str]] = {
    "eviction": {
        "lru": "policies.eviction.lru:LRU",
        "lfu": "policies.eviction.lfu:LFU",
    },
    "ordering": {
        "skip": "policies.ordering.skip:Skip",
    },
    "routing": {
        "resident_first": "policies.routing.resident_first:ResidentFirst",
    },
}
