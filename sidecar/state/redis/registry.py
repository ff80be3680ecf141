"""The registry that several replicas share, with the same interface as the one in a file.

A write is one script. It is refused if the record is not the one that the writer saw, and it returns when this replica
and every other live member have read the change. While Redis is unreachable, reads go on and writes are refused.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from time import gmtime, monotonic, strftime
from typing import Any, Generic

from sidecar.errors import Reason, Refused
from sidecar.state.codec import R
from sidecar.state.redis.entries import Head, entry_of, newer
from sidecar.state.redis.feed import Feed
from sidecar.state.redis.history import LIMITS
from sidecar.state.redis.kept import KeptFile
from sidecar.state.redis.link import FAULTS, Announced, Link
from sidecar.state.redis.member_scripts import LAGGING
from sidecar.state.redis.members import MEMBER_TTL_S
from sidecar.state.redis.scripts import WRITE, Script
from sidecar.state.registry import Change, changed_meanwhile, token_too_old

logger = logging.getLogger(__name__)

WRITE_EVERY_S = 30.0
"""How old the time of the last answer on disk may be while Redis answers."""


class Keeper(Generic[R]):
    """Writes a feed's copy to disk after changes, and from time to time while Redis answers."""

    def __init__(self, path: Path, feed: Feed[R], link: Link[R]) -> None:
        self._path = path
        self._file = KeptFile(path, link.label, link.codec)
        self._feed = feed
        self._changed = asyncio.Event()
        self._written_at = 0.0
        self._failed = self._closed = False
        self._task: asyncio.Task[None] | None = None

    async def resume(self) -> None:
        """Let the feed go on from the file, if there is one."""
        kept = await asyncio.to_thread(self._file.read)
        if kept is not None:
            self._feed.resume(kept)
            self._written_at = kept.answered_at

    def start(self) -> None:
        self._feed.subscribers.add(lambda change: self._changed.set())
        self._changed.set()
        self._task = asyncio.create_task(self._keep())

    async def close(self) -> None:
        """Write once more: the next process counts from the last answer to this one."""
        self._closed = True
        self._changed.set()
        if self._task is not None:
            await self._task

    async def _keep(self) -> None:
        is_last = False
        while not is_last:
            with suppress(TimeoutError):
                async with asyncio.timeout(WRITE_EVERY_S):
                    await self._changed.wait()
            is_last = self._closed  # before the write: what changed during a write is written by the next one
            self._changed.clear()
            await self._write()

    async def _write(self) -> None:
        kept = self._feed.kept()
        if kept.answered_at == self._written_at:
            return  # Redis has not answered since, so nothing is new
        try:
            await asyncio.to_thread(self._file.write, kept)
        except (OSError, sqlite3.Error) as error:
            if not self._failed:
                logger.error("the copy %s of what Redis keeps cannot be written: %s", self._path, error)
            self._failed = True
            return
        self._written_at, self._failed = kept.answered_at, False


WRITE_S = 10.0
"""How long a write waits to read its own change from the stream."""
POLL_S, POLL_S_MAX = 0.002, 0.1
ATTEMPTS_MAX = 3
"""How many times a write is attempted while lost data is being restored."""


class RedisRegistry(Generic[R]):
    """The registry in Redis. `member` is this replica's id among those that wait for each other.

    Writes do not wait for a member whose last beat is older than `member_ttl_s` (see `members`). `kept` is the file of
    a copy on disk, from which the registry starts while Redis is away.
    """

    def __init__(
        self, link: Link[R], member: str = "", member_ttl_s: float = MEMBER_TTL_S, kept: Path | None = None
    ) -> None:
        self._link = link
        self._member = member
        self._member_ttl_s = member_ttl_s
        self._feed = Feed(link, member)
        self._keeper = None if kept is None else Keeper(kept, self._feed, link)

    async def start(self) -> None:
        """Read everything, then follow the changes. Raises the errors of `Feed.start`."""
        if self._keeper is not None:
            await self._keeper.resume()
        await self._feed.start()
        if self._keeper is not None:
            self._keeper.start()

    async def close(self) -> None:
        await self._feed.close()
        if self._keeper is not None:
            await self._keeper.close()
        await self._link.close()

    # Reading.

    def all(self) -> list[R]:
        return self._feed.copy.records()

    def get(self, name: str) -> R | None:
        return self._feed.copy.get(name)

    @property
    def set_aside(self) -> Mapping[str, str]:
        return self._feed.copy.set_aside

    @property
    def last_change(self) -> int:
        return self._feed.position.applied

    @property
    def incarnation(self) -> str:
        """The id of the state; it changes when Redis was emptied."""
        return self._feed.position.incarnation

    @property
    def away_since(self) -> float | None:
        """The time (Unix seconds) since which Redis has not answered, or None while it answers."""
        return self._feed.away_since

    @property
    def fails(self) -> bool:
        return self.away_since is not None

    @property
    def answered_at(self) -> float | None:
        """The time (Unix seconds) of Redis' last answer; that of an earlier process counts."""
        return self._feed.answered_at

    @property
    def lag(self) -> int:
        """The number of changes known to be written that this replica has not read."""
        return max(0, self._feed.revision - self.last_change)

    def subscribe(self, tell: Callable[[Change[R]], None]) -> Callable[[], None]:
        return self._feed.subscribers.add(tell)

    async def changes_after(self, number: int) -> list[Change[R]]:
        last = self.last_change
        changes: list[Change[R]] = []
        while number < last:
            some = await self._asked(self._link.changes(number + 1, last))
            if not some or some[0].before > number:
                raise token_too_old(number, await self._asked(self._link.first_change()), last)
            number = some[-1].number
            changes += [self._change(announced) for announced in some if announced.name]
            await asyncio.sleep(0)
        if number > last:
            raise token_too_old(number, await self._asked(self._link.first_change()), last)
        return changes

    # Writing.

    async def put(self, record: R, before: R | None) -> int:
        return await self._write(self._link.codec.name_of(record), self._link.codec.to_json(record), before)

    async def delete(self, name: str, before: R) -> int:
        return await self._write(name, "", before)

    async def _write(self, name: str, text: str, before: R | None) -> int:
        token = token_hex(8)
        for _ in range(ATTEMPTS_MAX):
            if self.away_since is not None:
                raise self._unavailable()
            if self.get(name) != before:
                raise changed_meanwhile(name)
            outcome, number = await self._try(name, text, token)
            if outcome == "conflict":
                raise changed_meanwhile(name)
            if outcome == "written":
                await self.acknowledged(number)
                return number
        raise self._unavailable("Redis lost data, which is being restored")

    async def _try(self, name: str, text: str, token: str) -> tuple[str, int]:
        """Attempt one write. Return its result once this replica has read all that the result depends on."""
        feed, position = self._feed, self._feed.position
        outcome, digits = await self._ask(WRITE, *position, name, feed.copy.live_revision(name), token, text, *LIMITS)
        number = int(digits)
        try:
            if outcome == "lost":
                await feed.has_moved(position, WRITE_S)
            else:
                await feed.has_read(number, WRITE_S)
        except TimeoutError as error:
            trouble = f"change {number} did not come back from it" if number else "its lost data is not restored yet"
            raise self._unavailable(trouble) from error
        if outcome == "written" and newer(Head(number, token, number, 0), feed.copy.head(name)):
            raise self._unavailable(f"it took change {number} and lost it again")
        return outcome, number

    async def acknowledged(self, number: int) -> None:
        """Wait until the other live members have read a change, for a little longer than a dead one counts as live."""
        until, pause_s = monotonic() + self._member_ttl_s + WRITE_S / 2, POLL_S
        while others := await self._ask(LAGGING, number, int(self._member_ttl_s * 1e6), self._member):
            if monotonic() > until:
                raise Refused(
                    Reason.STATE_UNAVAILABLE,
                    f"it is stored as change {number}, but {', '.join(others)} did not read it yet; retry to keep "
                    "waiting",
                )
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, POLL_S_MAX)

    async def _ask(self, script: Script, *arguments: str | int) -> Any:
        return await self._asked(self._link.run(script, *arguments))

    async def _asked(self, question: Any) -> Any:
        try:
            return await question
        except FAULTS as error:
            raise self._link.refused(error) from error

    def _unavailable(self, trouble: str = "") -> Refused:
        since = ""
        if self.away_since is not None:
            trouble = trouble or self._feed.trouble
            since = f", which is away since {strftime('%Y-%m-%d %H:%M:%S', gmtime(self.away_since))} UTC"
        return Refused(
            Reason.STATE_UNAVAILABLE,
            f"changing {self._link.codec.what} needs Redis at {self._link}{since}: {trouble}; try again",
        )

    def _change(self, announced: Announced) -> Change[R]:
        entry = entry_of(announced.name, announced.value, self._link.codec)
        return Change(announced.number, announced.name, entry.record)
