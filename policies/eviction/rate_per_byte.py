"""Rate per byte: evict what is expected to cost the least refetching time per byte soon.

The least `cost / size * hazard` is evicted first; among equals the least recently used. The hazard, the likelihood of
a key's next use, is the estimate of one of three experts, because none is right on every load:
* `recency`: one over its age since the last use;
* `rate_500`, `rate_5000`: an average of its uses that decays with a half-life of that many requests.

Each expert runs a shadow cache of ids and sizes on the same requests, as large as the most bytes ever tracked, and is
billed `cost` for each miss. Bills decay with a half-life of 5,000 requests. When the bill of the expert in charge is
more than 3 % above another's, the other takes over. Bills of the same requests differ little by chance, and the change
itself costs nothing: waiting for 10 % was tried, and costs ½ to 1 % more on average over mixed traces.

The history of a key outlives it: a rate is remembered until five of the longer half-lives after neither the store nor
a shadow holds the key, when a thirty-second of it is left. Forgetting it at once was tried: a small store then treats
its hot adapters as new, which cost up to a fifth more on bursts and recorded clients.

Sources: choosing one of several experts by the misses of shadow caches as in Megiddo and Modha's ARC, FAST 2003, and
Vietri et al., "Driving Cache Replacement with ML-based LeCaR", HotStorage 2018; the decayed sum of uses that needs no
sweep is the combined recency and frequency of Lee et al., "LRFU", IEEE Transactions on Computers 50(12), 2001; value
per byte as in GreedyDual-Size, Cao and Irani, USITS 1997. The store, not the policy, spares blobs that requests need.

O(log n) per event: every expert keeps the held keys in its order too. Building the new order only when another expert
takes over was tried; it saves a quarter of each event, but the change itself took 600 ms at 100,000 adapters. Used keys
are put into the orders only when something has to go, or when there are UNPLACED_MAX of them: while everything fits no
order is needed, and a key that is used again and again is placed once.

Estimates of how soon an adapter is used again; each orders the keys from least to most worth their bytes.

The worth of a byte is the cost of a miss over the size, times the hazard of the next use. A decayed rate needs no
sweep: all rates decay alike, so their order is stable between uses, and a rate is stored as the time at which a single
use would have the same rate now. With the inverse of the age, the order of adapters of unlike size does change. So
there is a recency list for each size (to one part in sixteen), oldest first, and the lists are merged when read:
O(number of sizes) for the first key. There are few sizes: a rank and a set of modules make one.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from math import log2
from typing import Any, Protocol

from policies.eviction.cost import refetch_ns
from policies.eviction.ranking import Ranking

HALF_LIVES = (500, 5000)
"""Half-lives of the rates, in requests."""


@dataclass(slots=True)
class Known:
    """The history of one key. Times are request numbers."""

    size_bytes: int
    last: int = 0
    single_uses: tuple[float, ...] = ()
    """For each half-life h, the time u at which a single use gives the present rate 2 ** ((u - now) / h)."""

    def used(self, request: int) -> None:
        """Note a use at a request."""
        self.last = request
        if not self.single_uses:
            self.single_uses = (float(request),) * len(HALF_LIVES)
            return
        before = zip(HALF_LIVES, self.single_uses, strict=True)
        self.single_uses = tuple([request + life * log2(1 + 2.0 ** ((use - request) / life)) for life, use in before])


class Order(Protocol):
    """Keys in the order of one expert."""

    def place(self, key: str, known: Known) -> None:
        """Add a key, or move it after a change of its history."""

    def remove(self, key: str) -> None: ...

    def least_first(self, request: int) -> Iterator[str]:
        """Yield every key, the least worth its bytes at this request first."""

    def __contains__(self, key: str) -> bool: ...


class Recency:
    """Takes the hazard as the inverse of the age since the last use, in requests."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._last: dict[int, OrderedDict[str, int]] = {}

    def place(self, key: str, known: Known) -> None:
        size = nearby_size(known.size_bytes)
        self._sizes[key] = size
        lasts = self._last.setdefault(size, OrderedDict())
        lasts[key] = known.last
        lasts.move_to_end(key)

    def remove(self, key: str) -> None:
        size = self._sizes.pop(key)
        del self._last[size][key]
        if not self._last[size]:
            del self._last[size]

    def least_first(self, request: int) -> Iterator[str]:
        lists = {size: iter(lasts.items()) for size, lasts in self._last.items()}
        frontier = [_oldest(size, lists[size], request) for size in lists]
        heads = [head for head in frontier if head is not None]
        heapq.heapify(heads)
        while heads:
            _, _, key, size = heads[0]
            yield key
            following = _oldest(size, lists[size], request)
            if following is None:
                heapq.heappop(heads)
            else:
                heapq.heapreplace(heads, following)

    def __contains__(self, key: str) -> bool:
        return key in self._sizes


class Rate:
    """Takes the hazard as the decayed rate of uses with one of the half-lives."""

    def __init__(self, which: int) -> None:
        self._which = which
        self._ranking = Ranking()

    def place(self, key: str, known: Known) -> None:
        # Ranked by log2 of the worth at request 0, in units of the half-life, so that it never overflows.
        worth = known.single_uses[self._which] + HALF_LIVES[self._which] * log2(cost_per_byte(known.size_bytes))
        self._ranking.place(key, (worth, known.last))

    def remove(self, key: str) -> None:
        self._ranking.remove(key)

    def least_first(self, request: int) -> Iterator[str]:
        return iter(self._ranking)

    def __contains__(self, key: str) -> bool:
        return key in self._ranking


EXPERTS: dict[str, Callable[[], Order]] = {
    "recency": Recency,
    **{f"rate_{life}": partial(Rate, which) for which, life in enumerate(HALF_LIVES)},
}
"""The experts by name; the first is in charge at the beginning."""


def cost_per_byte(size_bytes: int) -> float:
    """Return the cost of a miss in ns per byte."""
    return refetch_ns(size_bytes) / size_bytes


def nearby_size(size_bytes: int) -> int:
    """Return the size rounded down to five significant bits: at most sixteen values per octave."""
    dropped_bits = max(0, size_bytes.bit_length() - 5)
    return size_bytes >> dropped_bits << dropped_bits


def _oldest(size: int, lasts: Iterator[tuple[str, int]], request: int) -> tuple[float, int, str, int] | None:
    """Return the next key of one size as (worth, last use, key, size); None at the end."""
    for key, last in lasts:
        return cost_per_byte(size) / (request - last + 1), last, key, size
    return None


BILL_HALF_LIFE = 5000
BILL_DECAY = 0.5 ** (1 / BILL_HALF_LIFE)
CLEARLY_BETTER = 1.03
"""Another expert takes over when the bill of the one in charge exceeds the least bill by this factor."""
REMEMBERED_REQUESTS = 5 * max(HALF_LIVES)
"""How many requests a key is remembered that nothing holds. This bounds the number of remembered keys."""
UNPLACED_MAX = 1000
"""So many used keys wait to be put into the orders. Placing them takes 11 ms of the next eviction."""


class Shadow:
    """The cache that one expert would keep, and the bill of its misses."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.bytes_held = 0
        self.bill_ns = 0.0

    def use(self, key: str, known: dict[str, Known], bytes_max: int, request: int) -> list[str]:
        """Note a use of a key, hit or miss; return the keys evicted for it."""
        self.bill_ns *= BILL_DECAY
        gone: list[str] = []
        if key not in self.order:
            self.bill_ns += refetch_ns(known[key].size_bytes)
            self.bytes_held += known[key].size_bytes
            while self.bytes_held > bytes_max:
                gone.append(next(self.order.least_first(request)))
                self.remove(gone[-1], known)
        self.order.place(key, known[key])
        return gone

    def remove(self, key: str, known: dict[str, Known]) -> None:
        self.order.remove(key)
        self.bytes_held -= known[key].size_bytes


class RatePerByte:
    """The held keys in every expert's order, and a shadow cache for each expert."""

    def __init__(self) -> None:
        self._requests = 0
        self._known: dict[str, Known] = {}
        """History of the keys that the store or a shadow holds."""
        self._remembered: OrderedDict[str, tuple[int, Known]] = OrderedDict()
        """History of keys that nothing holds any more, with the request at which the last holder dropped them."""
        self._held: dict[str, None] = {}
        self._unplaced: dict[str, None] = {}
        """The keys whose last use the orders don't show yet, least recently used first. Every shadow has them."""
        self._bytes_held = 0
        self._bytes_max = 0
        self._orders = {name: expert() for name, expert in EXPERTS.items()}
        self._shadows = {name: Shadow(expert()) for name, expert in EXPERTS.items()}
        self._in_charge = next(iter(EXPERTS))

    def on_insert(self, key: str, size_bytes: int, now_ns: int) -> None:
        _, remembered = self._remembered.pop(key, (0, Known(size_bytes)))
        known = self._known.setdefault(key, remembered)
        if known.size_bytes != size_bytes:
            self._forget(key)
            self._known[key] = Known(size_bytes)
        self._held[key] = None
        self._bytes_held += size_bytes
        self._bytes_max = max(self._bytes_max, self._bytes_held)
        self.on_hit(key, now_ns)

    def on_hit(self, key: str, now_ns: int) -> None:
        self._requests += 1
        self._known[key].used(self._requests)
        if key in self._unplaced or all(key in shadow.order for shadow in self._shadows.values()):
            self._unplaced.pop(key, None)
            self._unplaced[key] = None
            for shadow in self._shadows.values():
                shadow.bill_ns *= BILL_DECAY
            if len(self._unplaced) > UNPLACED_MAX:
                self._place(next(iter(self._unplaced)))
        else:
            self._miss(key)
        self._forget_the_past()

    def _miss(self, key: str) -> None:
        """Note a use of a key that some shadow lacks."""
        self._place_all()
        known = self._known[key]
        for order in self._orders.values():
            order.place(key, known)
        for shadow in self._shadows.values():
            for gone in shadow.use(key, self._known, self._bytes_max, self._requests):
                self._let_go(gone)
        self._choose_an_expert()

    def on_remove(self, key: str, now_ns: int) -> None:
        self._place_all()
        del self._held[key]
        for order in self._orders.values():
            order.remove(key)
        self._bytes_held -= self._known[key].size_bytes
        self._let_go(key)

    def victims(self, now_ns: int) -> Iterator[str]:
        self._place_all()
        yield from self._orders[self._in_charge].least_first(self._requests)

    def _place_all(self) -> None:
        while self._unplaced:
            self._place(next(iter(self._unplaced)))

    def _place(self, key: str) -> None:
        del self._unplaced[key]
        known = self._known[key]
        for order in self._orders.values():
            order.place(key, known)
        for shadow in self._shadows.values():
            shadow.order.place(key, known)

    def snapshot(self) -> dict[str, Any]:
        return {
            "requests": self._requests,
            "bytes_max": self._bytes_max,
            "in_charge": self._in_charge,
            "held": list(self._held),
            "known": [[key, *_listed(known)] for key, known in self._known.items()],
            "remembered": [[key, let_go, *_listed(known)] for key, (let_go, known) in self._remembered.items()],
            "shadows": {name: [shadow.bill_ns, self._keys_of(shadow)] for name, shadow in self._shadows.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._requests, self._bytes_max = state["requests"], state["bytes_max"]
        self._known = {key: Known(size, last, tuple(uses)) for key, size, last, uses in state["known"]}
        self._remembered = OrderedDict(
            (key, (let_go, Known(size, last, tuple(uses)))) for key, let_go, size, last, uses in state["remembered"]
        )
        self._in_charge, self._held, self._unplaced = state["in_charge"], dict.fromkeys(state["held"]), {}
        self._bytes_held = sum(self._known[key].size_bytes for key in self._held)
        for name, (bill_ns, keys) in state["shadows"].items():
            self._orders[name] = self._in_order(name, self._held)
            shadow = self._shadows[name] = Shadow(self._in_order(name, keys))
            shadow.bill_ns = bill_ns
            shadow.bytes_held = sum(self._known[key].size_bytes for key in keys)

    def _choose_an_expert(self) -> None:
        best = min(self._shadows, key=lambda name: self._shadows[name].bill_ns)
        if self._shadows[self._in_charge].bill_ns > CLEARLY_BETTER * self._shadows[best].bill_ns:
            self._in_charge = best

    def _in_order(self, name: str, keys: Iterable[str]) -> Order:
        order = EXPERTS[name]()
        for key in sorted(keys, key=lambda key: self._known[key].last):
            order.place(key, self._known[key])
        return order

    def _keys_of(self, shadow: Shadow) -> list[str]:
        return [key for key in self._known if key in shadow.order]

    def _let_go(self, key: str) -> None:
        """Only remember a key from now on, if nothing holds it any more."""
        if key not in self._held and not any(key in shadow.order for shadow in self._shadows.values()):
            self._remembered[key] = (self._requests, self._known.pop(key))

    def _forget_the_past(self) -> None:
        while self._remembered:
            key, (let_go, _) = next(iter(self._remembered.items()))
            if let_go + REMEMBERED_REQUESTS > self._requests:
                return
            del self._remembered[key]

    def _forget(self, key: str) -> None:
        """Remove a key from every shadow: its size changed, so it names other content."""
        for shadow in self._shadows.values():
            if key in shadow.order:
                shadow.remove(key, self._known)


def _listed(known: Known) -> list[Any]:
    return [known.size_bytes, known.last, list(known.single_uses)]
