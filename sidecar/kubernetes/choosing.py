"""Choose one declaration for each name from all objects of a cluster."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from sidecar.kubernetes.declarations import Declaration, DeclaringObject


@dataclass(frozen=True)
class Desired:
    """The chosen declarations, by name.

    `unread` maps owners to objects with unreadable parts: the names that they declared before stay as they are.
    """

    chosen: dict[str, Declaration] = field(default_factory=dict)
    losers: tuple[tuple[Declaration, Declaration], ...] = ()
    """Pairs of a declaration that lost its name, and the one that has the name."""
    unread: dict[str, DeclaringObject] = field(default_factory=dict)


@dataclass
class Cluster:
    """What is known of a cluster: the chosen declarations (None until everything was read), and objects by owner."""

    desired: Desired | None = None
    said: dict[str, DeclaringObject] = field(default_factory=dict)


def desired(objects: Iterable[DeclaringObject]) -> Desired:
    """Choose for each name the declaration of the oldest object that has one."""
    found: dict[str, Declaration] = {}
    losers: list[tuple[Declaration, Declaration]] = []
    unread: dict[str, DeclaringObject] = {}
    present = (each for each in objects if not each.source.leaving)
    for declaring in sorted(present, key=lambda each: each.source.age_key):
        if declaring.problem:
            unread[declaring.source.owner] = declaring
        for declaration in declaring.declarations:
            first = found.setdefault(declaration.name, declaration)
            if first is not declaration:
                losers.append((declaration, first))
    return Desired(found, tuple(losers), unread)
