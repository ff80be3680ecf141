"""Which member should own a backend: all compute the same order, and one that comes or goes moves only its share."""

from __future__ import annotations

from collections.abc import Iterable

from policies.routing.rendezvous import score
from sidecar.ownership.facts import Member


def order(backend: str, home: str, members: Iterable[Member]) -> list[Member]:
    """Return the members that may own a backend, the preferred one first.

    A backend with a `home` may only be owned by the member of that name; draining members may own none.
    """
    able = [member for member in members if not member.draining and home in ("", member.name)]
    return sorted(able, key=lambda member: (-score(backend, member.name, member.weight), member.name, member.id))
