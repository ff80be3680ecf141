"""Detect that Redis lost data that this replica has read, read all names anew, and restore what was lost.

Redis loses data when it is emptied, comes back from an older dump, or fails over to a server without the last writes.
Each replica detects this by itself (see `scripts`) and merges: it takes the entries that are newer in Redis, and
restores those that are newer here, forgotten names included. A restored entry keeps its revision, so a replica that had
read less cannot restore an old content over a newer one. It is announced under a new number, so replicas that merged
earlier see it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from secrets import token_hex
from typing import NamedTuple

from sidecar.errors import Misused, Reason
from sidecar.state.codec import R
from sidecar.state.redis.copy import TOMBSTONES_MAX, TOMBSTONES_MS, Copy
from sidecar.state.redis.entries import NOTHING, Entry, Head, entry_of, head_of, newer, value_of
from sidecar.state.redis.link import Link
from sidecar.state.redis.scripts import LOOK, RESTORE
from sidecar.state.registry import CHANGES_MAX, Change

SCHEMA = "1"
LIMITS = (CHANGES_MAX, TOMBSTONES_MS, TOMBSTONES_MAX)
READ_AT_ONCE = 50
"""Records read before the event loop runs other tasks."""
RESTORED_AT_ONCE = 100


class Position(NamedTuple):
    """How far a replica has read: the state's incarnation, and the last change's number and mark."""

    incarnation: str = ""
    applied: int = 0
    mark: str = ""


@dataclass(frozen=True)
class View:
    """The result of LOOK: the state, its last change, and whether Redis lost what this replica has read."""

    incarnation: str
    revision: int
    last: int
    mark: str
    lost: bool

    @property
    def position(self) -> Position:
        return Position(self.incarnation, self.revision, self.mark)


async def look(link: Link[R], position: Position) -> View:
    """Run LOOK, which creates the state if there is none. Raises FAULTS, Misused(STATE_INCOMPATIBLE)."""
    found = await link.run(LOOK, SCHEMA, token_hex(8), *position)
    if found[0] != SCHEMA:
        raise Misused(
            Reason.STATE_INCOMPATIBLE,
            f"the state at {link} under {link.place.key_prefix} has schema {found[0]} and this sidecar works with "
            f"schema {SCHEMA}; run the release that wrote it, or give this one another state.key_prefix",
        )
    _, incarnation, revision, last, mark, lost = found
    return View(incarnation, int(revision), int(last), mark, bool(lost))


async def reread(link: Link[R], copy: Copy[R], position: Position, tell: Callable[[Change[R]], None]) -> Position:
    """Read everything, restore entries that only this replica has, and return the position to follow changes from.

    Raises FAULTS, Misused(STATE_INCOMPATIBLE); a retry is safe.
    """
    view = await look(link, position)
    if view.last != view.revision or view.revision < position.applied:
        await _restore(link, view.incarnation, position.applied, [])  # numbers continue from the last one read here
        view = replace(await look(link, position), lost=view.lost)
    stored, found = await _read_all(link, copy)
    for number, (name, entry) in enumerate(sorted(found.items(), key=lambda pair: pair[1].head.number)):
        change = copy.take(name, entry)
        if change is not None:
            tell(change)
        if number % READ_AT_ONCE == 0:
            await asyncio.sleep(0)
    if not view.lost:  # names that Redis does not have were forgotten long ago
        for name in copy.unknown_to(stored):
            change = copy.drop(name, view.revision)
            if change is not None:
                tell(change)
    await _restore(link, view.incarnation, position.applied, list(copy.newer_than(stored)))
    return view.position


async def _read_all(link: Link[R], copy: Copy[R]) -> tuple[dict[str, Head], dict[str, Entry[R]]]:
    """Return the head of each name in Redis, and the entries that are newer than here."""
    stored: dict[str, Head] = {}
    found: dict[str, Entry[R]] = {}
    read = 0
    async for values in link.entries():
        for name, value in values.items():
            head = head_of(value)
            if name in stored and not newer(head, stored[name]):
                continue
            stored[name] = head
            if head == NOTHING and copy.get(name) is None:
                copy.set_aside[name] = entry_of(name, value, link.codec).why
            if newer(head, copy.head(name)):
                found[name] = entry_of(name, value, link.codec)
                read += 1
                if read % READ_AT_ONCE == 0:
                    await asyncio.sleep(0)
    return stored, found


async def _restore(link: Link[R], incarnation: str, applied: int, entries: list[tuple[str, Entry[R]]]) -> None:
    for start in range(0, len(entries) or 1, RESTORED_AT_ONCE):
        page = entries[start : start + RESTORED_AT_ONCE]
        values = [text for name, entry in page for text in (name, value_of(entry, link.codec))]
        await link.run(RESTORE, incarnation, applied, token_hex(8), *LIMITS, *values)
        await asyncio.sleep(0)
