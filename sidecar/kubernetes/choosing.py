"""What all objects of a cluster declare together: of each name one declaration."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from sidecar.kubernetes.declarations import Declaration, Said


@dataclass(frozen=True)
class Desired:
    """What is declared, by name.

    `unread` are objects, by owner, of which something could not be read: what they declared before is left as it is.
    """

    chosen: dict[str, Declaration] = field(default_factory=dict)
    losers: tuple[tuple[Declaration, Declaration], ...] = ()
    """Declarations of a name that another one has, with that one."""
    unread: dict[str, Said] = field(default_factory=dict)


@dataclass
class Cluster:
    """What is known of a cluster: what it declares, None until all of it has been read, and each object by owner."""

    desired: Desired | None = None
    said: dict[str, Said] = field(default_factory=dict)


def desired(all_said: Iterable[Said]) -> Desired:
    """Choose who declares each name: the oldest object that does."""
    found: dict[str, Declaration] = {}
    losers: list[tuple[Declaration, Declaration]] = []
    unread: dict[str, Said] = {}
    for said in sorted((said for said in all_said if not said.source.leaving), key=lambda said: said.source.age_key):
        if said.problem:
            unread[said.source.owner] = said
        for declaration in said.declarations:
            first = found.setdefault(declaration.name, declaration)
            if first is not declaration:
                losers.append((declaration, first))
    return Desired(found, tuple(losers), unread)
