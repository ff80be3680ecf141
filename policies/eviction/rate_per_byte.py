"""Rate per byte: evict what is expected to cost the least refetching time for each byte it takes, soon.

The least `cost / size * hazard` goes first; among equals the least recently used. How likely a key's next use is, its
hazard, is one expert's opinion of three, because none is right on every load:
* `recency`: one over its age since the last use;
* `rate_500`, `rate_5000`: an average of its uses that decays with a half-life of so many requests.

Each expert runs a shadow cache of ids and sizes on the same requests, as large as the most bytes that were ever
tracked, and pays `cost` for each miss. These bills decay with a half-life of 5,000 requests; when that of the expert in
charge is more than 3 % above another, the other takes over. Bills of the same requests differ by little chance, and the
change itself costs nothing: waiting for 10 % was tried, and pays ½ to 1 % more on average over mixed traces.

What is known of a key outlives it: a rate is remembered until five of the longer half-lives after neither the store nor
a shadow holds the key, when a thirty-second is left of it. Forgetting it at once was tried: a small store then meets
its hot adapters as strangers, and paid up to a fifth more on bursts and recorded clients.

Sources: one expert out of several by the misses of shadow caches as in Megiddo and Modha's ARC, FAST 2003, and Vietri
et al., "Driving Cache Replacement with ML-based LeCaR", HotStorage 2018; the decayed sum of uses that needs no sweep is
the combined recency and frequency of Lee et al., "LRFU", IEEE Transactions on Computers 50(12), 2001; value per byte
as in GreedyDual-Size, Cao and Irani, USITS 1997. Blobs that requests wait for are the store's business: it spares them.

O(log n) for each event: every expert keeps what is held in its order too. Building the new order only when another
takes over was tried; it saves a quarter of each event, and the change itself took 600 ms at 100,000 adapters.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

from policies.eviction.cost import refetch_ns
from policies.eviction.experts import EXPERTS, HALF_LIVES, Known, Order

BILL_HALF_LIFE = 5000
BILL_DECAY = 0.5 ** (1 / BILL_HALF_LIFE)
CLEARLY_BETTER = 1.03
"""The bill of the expert in charge, over the least, at which another takes over."""
REMEMBERED_REQUESTS = 5 * max(HALF_LIVES)
"""How long a key that nobody holds is remembered. No more keys can be than came in that time."""


class Shadow:
    """What a cache of one expert's choosing would hold, and what its misses cost."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.bytes_held = 0
        self.bill_ns = 0.0

    def use(self, key: str, known: dict[str, Known], bytes_max: int, request: int) -> list[str]:
        """Note a use of a key, hit or miss; return what had to go for it."""
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
    """The keys held, in every expert's order, and a shadow for each expert."""

    def __init__(self) -> None:
        self._requests = 0
        self._known: dict[str, Known] = {}
        """Of what the store or a shadow holds."""
        self._remembered: OrderedDict[str, tuple[int, Known]] = OrderedDict()
        """Of what nobody holds any more, with the request at which the last holder let go."""
        self._held: dict[str, None] = {}
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
        known = self._known[key]
        known.used(self._requests)
        for order in self._orders.values():
            order.place(key, known)
        for shadow in self._shadows.values():
            for gone in shadow.use(key, self._known, self._bytes_max, self._requests):
                self._let_go(gone)
        self._forget_the_past()
        self._choose_an_expert()

    def on_remove(self, key: str, now_ns: int) -> None:
        del self._held[key]
        for order in self._orders.values():
            order.remove(key)
        self._bytes_held -= self._known[key].size_bytes
        self._let_go(key)

    def victims(self, now_ns: int) -> Iterator[str]:
        yield from self._orders[self._in_charge].least_first(self._requests)

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
        self._in_charge, self._held = state["in_charge"], dict.fromkeys(state["held"])
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
        """Only remember a key from now on, if nobody holds it."""
        if key not in self._held and not any(key in shadow.order for shadow in self._shadows.values()):
            self._remembered[key] = (self._requests, self._known.pop(key))

    def _forget_the_past(self) -> None:
        while self._remembered:
            key, (let_go, _) = next(iter(self._remembered.items()))
            if let_go + REMEMBERED_REQUESTS > self._requests:
                return
            del self._remembered[key]

    def _forget(self, key: str) -> None:
        """Take a key out of every shadow: what came in under its name is something else."""
        for shadow in self._shadows.values():
            if key in shadow.order:
                shadow.remove(key, self._known)


def _listed(known: Known) -> list[Any]:
    return [known.size_bytes, known.last, list(known.single_uses)]
