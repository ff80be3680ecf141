"""Adapters' names and versions, and random acts of operators on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random

from sidecar.core import events as ev
from sidecar.core.facts import Adapter, NamedVersion

Make = Callable[[str, int], Adapter]
"""Takes a name and an ordinal, returns the version."""
KEPT_VERSIONS = 3


IDENTITIES = (
    "{}",
    "spiffe://cluster.local/ns/team-{}/sa/inference-client",
    "auth0|6123f5d9c0ffee{}",
    "CN=team {},OU=Research,O=Example Inc.,C=DE",
    "https://login.example.com/realms/main/users/{}?x=%20#me",
    "projekt-{}@größe.example",
    "山田{}",
    'a "{}" {{b}}\\c',
)
"""Tenants' names as in certificates and tokens."""


def identity(tenant: str) -> str:
    """Return a tenant of a load, `t0` and so on, as a real one is called; `t0` itself is what weights are given to."""
    number = tenant.removeprefix("t")
    return IDENTITIES[int(number) % len(IDENTITIES)].format(tenant) if number.isdecimal() else tenant


@dataclass
class Named:
    """A name and its versions by ordinal; `ordinal` is the current one."""

    ordinal: int = 1
    versions: dict[int, Adapter] = field(default_factory=dict)
    generations: dict[int, int] = field(default_factory=dict)
    pinned: bool = False
    canary: tuple[int, int] | None = None
    registered: bool = True


class Names:
    """Every name of a load. `acts` maps what an operator can do to the event that does it, or None."""

    def __init__(self, names: tuple[str, ...], make: Make, random: Random) -> None:
        self._make = make
        self._random = random
        self._asks = 0
        self._held = {name: Named(1, {1: make(name, 1)}) for name in names}
        self._acts: tuple[Callable[[str, Named], ev.Event | None], ...] = (
            self._evict,
            self._pin,
            self._unpin,
            self._prefetch,
            self._replace,
            self._promote,
            self._refresh,
            self._try_out,
            self._unregister,
        )
        self.backends: tuple[str, ...] = ()

    def registrations(self) -> list[ev.AdapterRegistered]:
        """Return the events that register every name."""
        return [self._registration(name, held) for name, held in self._held.items()]

    def act(self) -> ev.Event | None:
        """Return the event of an operator's next act; a forgotten name is registered again."""
        if not self._held:
            return None
        name = self._random.choice(list(self._held))
        held = self._held[name]
        if not held.registered:
            held.registered = True
            return self._registration(name, held)
        return self._random.choice(self._acts)(name, held)

    def make_peace(self) -> list[ev.Event]:
        """Return the events that make every name servable: registered, not pinned, no version suspected."""
        events: list[ev.Event] = []
        for name, held in self._held.items():
            held.pinned, held.registered = False, True
            events += [self._registration(name, held), ev.ReleaseAsked(name)]
        return events

    def written(self, name: str, random: Random) -> str:
        """Return a name as a client writes it, sometimes with an ordinal."""
        held = self._held.get(name)
        if held is None or len(held.versions) < 2 or random.random() < 0.8:
            return name
        return f"{name}@v{random.choice(list(held.versions))}"

    def _registration(self, name: str, held: Named) -> ev.AdapterRegistered:
        others = [ordinal for ordinal in held.versions if ordinal != held.ordinal]
        versions = tuple(
            NamedVersion(ordinal, held.versions[ordinal], f"origin/{name}", held.generations.get(ordinal, 0))
            for ordinal in (held.ordinal, *others)
        )
        kept = tuple(ordinal for ordinal in others if ordinal % 2 == 0)
        return ev.AdapterRegistered(name, held.ordinal, held.canary, None, held.pinned, versions=versions, kept=kept)

    def _ask(self) -> int:
        self._asks += 1
        return self._asks

    def _evict(self, name: str, held: Named) -> ev.Event:
        return ev.EvictAsked(self._ask(), name)

    def _pin(self, name: str, held: Named) -> ev.Event:
        held.pinned = True
        return self._registration(name, held)

    def _unpin(self, name: str, held: Named) -> ev.Event:
        held.pinned = False
        return self._registration(name, held)

    def _prefetch(self, name: str, held: Named) -> ev.Event:
        places = self._random.choice([(), self._random.sample(self.backends, 1)])
        return ev.PrefetchAsked(self._ask(), name, tuple(places))

    def _replace(self, name: str, held: Named) -> ev.Event:
        """Register new content and drop the oldest version."""
        newest = max(held.versions) + 1
        held.versions[newest] = self._make(name, newest)
        held.ordinal, held.canary = newest, None
        if len(held.versions) > KEPT_VERSIONS:
            del held.versions[min(held.versions)]
        return self._registration(name, held)

    def _promote(self, name: str, held: Named) -> ev.Event:
        held.ordinal = self._random.choice(list(held.versions))
        held.canary = None
        return self._registration(name, held)

    def _refresh(self, name: str, held: Named) -> ev.Event:
        held.generations[held.ordinal] = held.generations.get(held.ordinal, 0) + 1
        return self._registration(name, held)

    def _try_out(self, name: str, held: Named) -> ev.Event | None:
        others = [ordinal for ordinal in held.versions if ordinal != held.ordinal]
        if not others:
            return None
        held.canary = (self._random.choice(others), 30)
        return self._registration(name, held)

    def _unregister(self, name: str, held: Named) -> ev.Event:
        held.registered = False
        return ev.AdapterUnregistered(name)


def ranks_of(ranks: Mapping[str, int], name: str, ordinal: int) -> int:
    """Return a version's rank: new content may be smaller."""
    return max(8, ranks[name] // (1 if ordinal % 2 else 2))
