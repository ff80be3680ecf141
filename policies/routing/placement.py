"""Which backends host which versions, and the pages that each backend then holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass
class Home:
    """Where a version lives. `pool` holds the backends that can serve it, including those that are down."""

    hosts: list[str]
    pages: int
    rank: int
    pool: tuple[str, ...]
    picks: int = 0
    """Requests since the last count of its hosts."""
    votes: int = 0
    """Those of them that were sent past its hosts."""
    streak: int = 0
    """How many consecutive counts found too few hosts; negative: too many."""


class Placement:
    """All homes. Pages are counted incrementally, so a question about a backend costs O(1)."""

    def __init__(self) -> None:
        self.homes: dict[str, Home] = {}
        self.pages: dict[str, int] = {}
        self.moves = 0
        """How many hosts were replaced by another."""

    def add(self, version: str, home: Home) -> None:
        assert version not in self.homes, f"{version} has a home"
        self.homes[version] = home
        for host in home.hosts:
            self._count(host, home.pages)

    def add_host(self, version: str, backend: str) -> None:
        home = self.homes[version]
        home.hosts.append(backend)
        self._count(backend, home.pages)

    def drop_host(self, version: str, backend: str) -> None:
        home = self.homes[version]
        home.hosts.remove(backend)
        self._count(backend, -home.pages)

    def move(self, version: str, source: str, target: str) -> None:
        self.drop_host(version, source)
        self.add_host(version, target)
        self.moves += 1

    def forget(self, version: str) -> None:
        home = self.homes.pop(version)
        for host in home.hosts:
            self._count(host, -home.pages)

    def _count(self, backend: str, pages: int) -> None:
        self.pages[backend] = self.pages.get(backend, 0) + pages
        if not self.pages[backend]:
            del self.pages[backend]

    def hosted(self, backends: Iterable[str]) -> dict[str, list[str]]:
        """Return the versions that live on each of these backends."""
        found: dict[str, list[str]] = {backend: [] for backend in backends}
        for version, home in self.homes.items():
            for host in home.hosts:
                if host in found:
                    found[host].append(version)
        return found

    def snapshot(self) -> Any:
        return [self.moves, [[version, _written(home)] for version, home in self.homes.items()]]

    def restore(self, state: Any) -> None:
        self.homes, self.pages = {}, {}
        self.moves, homes = state
        for version, home in homes:
            self.add(version, _read(home))


def _written(home: Home) -> dict[str, Any]:
    """Return a home as journals store it: these names stay even if fields are renamed."""
    return {
        "hosts": list(home.hosts),
        "pages": home.pages,
        "rank": home.rank,
        "pool": home.pool,
        "picks": home.picks,
        "votes": home.votes,
        "streak": home.streak,
    }


def _read(record: dict[str, Any]) -> Home:
    return Home(
        hosts=list(record["hosts"]),
        pages=record["pages"],
        rank=record["rank"],
        pool=tuple(record["pool"]),
        picks=record["picks"],
        votes=record["votes"],
        streak=record["streak"],
    )
