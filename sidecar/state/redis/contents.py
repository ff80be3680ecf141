"""Read or write a whole registry in Redis while no replica works on it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from secrets import token_hex
from time import time
from typing import Generic, TypeVar

from sidecar.errors import Misused, Reason, Refused
from sidecar.state.codec import Codec, R
from sidecar.state.contents import Contents
from sidecar.state.redis.entries import Entry, Head, entry_of, value_of
from sidecar.state.redis.history import SCHEMA, Position, look
from sidecar.state.redis.link import FAULTS, Announced, Link, is_final
from sidecar.state.redis.member_scripts import LAGGING
from sidecar.state.redis.members import MEMBER_TTL_S
from sidecar.state.registry import Change

T = TypeVar("T")

UNFINISHED = "unfinished"
"""The schema number during a write: it keeps replicas from starting on an incomplete registry."""
WRITTEN_AT_ONCE = 500
NUMBER_MAX = 2**53
ATTEMPTS_MAX = 10
"""How many times a registry is read that replicas change meanwhile."""
PAUSE_S = 0.05


class RedisRegistryStore(Generic[R]):
    """A registry in Redis. It is read and written only while `check_unused` finds no live replica."""

    def __init__(self, link: Link[R]) -> None:
        self._link = link

    def __str__(self) -> str:
        return f"Redis at {self._link}"

    async def check_unused(self) -> None:
        """Raise Misused while live replicas use it."""
        live = await self._asked(self._link.run(LAGGING, NUMBER_MAX, int(MEMBER_TTL_S * 1e6), ""))
        if live:
            raise Misused(Reason.STATE_NOT_EMPTY, f"{', '.join(live)} use {self}; stop them first")

    async def records(self) -> list[R]:
        found = await self._asked(self._entries())
        return [entry.record for entry in found.values() if entry.record is not None]

    async def is_empty(self) -> bool:
        return await self._asked(self._link.schema()) is None

    async def read(self) -> Contents[R]:
        if await self.is_empty():
            raise Misused(
                Reason.CONFIG_INVALID, f"{self} holds no registry under the prefix {self._link.place.key_prefix}"
            )
        for attempt in range(ATTEMPTS_MAX):
            await asyncio.sleep(attempt * PAUSE_S)
            view = await self._asked(look(self._link, Position()))
            contents = await self._asked(self._read(view.revision))
            if (await self._asked(look(self._link, Position()))).position == view.position:
                return contents
        raise Refused(Reason.STATE_UNAVAILABLE, f"{self} is changed all the time; try again")

    async def _entries(self) -> dict[str, Entry[R]]:
        return {
            name: entry_of(name, value, self._link.codec)
            async for values in self._link.entries()
            for name, value in values.items()
        }

    async def _read(self, last: int) -> Contents[R]:
        records: dict[str, tuple[int, R]] = {}
        for name, entry in (await self._entries()).items():
            if entry.unread:
                raise Misused(
                    Reason.STATE_INCOMPATIBLE,
                    f"the record of {name} in {self} is damaged ({entry.why}); register the name again there first",
                )
            if entry.record is not None:
                records[name] = (entry.head.revision, entry.record)
        changes: list[Change[R]] = []
        number = 0
        while some := await self._link.changes(number + 1, last):
            number = some[-1].number
            changes += [
                Change(announced.number, announced.name, self._record(announced))
                for announced in some
                if announced.name
            ]
        return Contents(tuple(records[name] for name in sorted(records)), tuple(changes), last)

    def _record(self, announced: Announced) -> R | None:
        return entry_of(announced.name, announced.value, self._link.codec).record

    async def write(self, contents: Contents[R]) -> None:
        await self._asked(self._write(contents))

    async def _write(self, contents: Contents[R]) -> None:
        link = self._link
        await link.erase()
        await link.set_meta(schema=UNFINISHED)
        entries = list(_entries(contents, link.codec))
        for start in range(0, len(entries), WRITTEN_AT_ONCE):
            await link.put_entries(entries[start : start + WRITTEN_AT_ONCE])
        changes = list(_announced(contents, link.codec))
        for start in range(0, len(changes), WRITTEN_AT_ONCE):
            await link.put_changes(changes[start : start + WRITTEN_AT_ONCE])
        await link.set_meta(
            revision=str(contents.last_change),
            entries=str(len(entries)),
            incarnation=token_hex(8),
            restored_at=repr(time()),  # copies on replicas' disks that are older are dropped
            schema=SCHEMA,
        )

    async def _asked(self, question: Awaitable[T]) -> T:
        try:
            return await question
        except FAULTS as error:
            if is_final(error):
                raise Misused(
                    Reason.CONFIG_INVALID, f"{self} rejects the connection: {self._link.describe(error)}"
                ) from error
            raise self._link.refused(error) from error


def _entries(contents: Contents[R], codec: Codec[R]) -> Iterator[tuple[str, Entry[R]]]:
    """Yield the entry of each name, forgotten names of the change log included."""
    now_ms = int(time() * 1000)
    live = {codec.name_of(record) for _, record in contents.records}
    for number, record in contents.records:
        yield codec.name_of(record), Entry(Head(number, token_hex(8), number, now_ms), record)
    last = {change.name: change for change in contents.changes}
    for change in last.values():
        if change.name not in live:
            yield change.name, Entry(Head(change.number, token_hex(8), change.number, now_ms), None)


def _announced(contents: Contents[R], codec: Codec[R]) -> Iterator[Announced]:
    before, after = max(0, contents.changes[0].number - 1) if contents.changes else 0, ""
    now_ms = int(time() * 1000)
    for change in contents.changes:
        token = token_hex(8)
        entry = Entry(Head(change.number, token, change.number, now_ms), change.record)
        yield Announced(change.number, before, after, token, change.name, value_of(entry, codec))
        before, after = change.number, token
