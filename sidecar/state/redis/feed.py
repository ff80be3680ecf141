"""Keep the copy in memory up to date by following Redis' stream of changes, through outages and data loss.

A replica's own changes come by the stream too, so there is one path and one order.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Collection
from time import monotonic, time
from typing import Generic

from sidecar.errors import Misused, Reason, SidecarError
from sidecar.state.codec import R
from sidecar.state.redis.copy import Copy
from sidecar.state.redis.entries import entry_of
from sidecar.state.redis.history import Position, look, reread
from sidecar.state.redis.kept import Kept
from sidecar.state.redis.link import FAULTS, Announced, Link, is_final
from sidecar.state.registry import Change, Subscribers
from sidecar.tasks import ended

logger = logging.getLogger(__name__)

BLOCK_MS = 1000
LOOK_EVERY_S = 1.0
START_S = 20.0
"""How long a start waits for Redis to become reachable."""
DELAY_S, DELAY_S_MAX = 0.05, 1.0


class Feed(Generic[R]):
    """Reads the changes for this replica. It reports its progress under the name `member`."""

    def __init__(self, link: Link[R], member: str = "") -> None:
        self.copy: Copy[R] = Copy()
        self.position = Position()
        self.subscribers: Subscribers[R] = Subscribers()
        self.revision = 0
        """The last change known to be written, read or not."""
        self.trouble = "it has not been reached yet"
        self._link = link
        self._member = member
        self._task: asyncio.Task[None] | None = None
        self._moved = asyncio.Event()
        self._look_at = 0.0
        self.away_since: float | None = time()
        """The time (Unix seconds) since which Redis has not answered, or None while it answers."""
        self.answered_at = 0.0
        """The time (Unix seconds) of Redis' last answer."""
        self._resumed_at = 0.0
        """The time of the copy on disk, until it was merged with Redis or dropped."""
        self._dropped: Collection[str] = ()
        """The names of a dropped copy, until those that Redis does not have were published as forgotten."""

    def resume(self, kept: Kept[R]) -> None:
        """Go on from a copy on disk. `start` then returns without Redis too."""
        for name, entry in kept.entries.items():
            self.copy.take(name, entry)
        self._resumed_at = kept.answered_at
        self.position, self.revision = kept.position, kept.position.applied
        self.away_since = self.answered_at = kept.answered_at

    def kept(self) -> Kept[R]:
        """Return what a later process can resume from."""
        return Kept(self.answered_at, self.position, self.copy.entries())

    async def start(self) -> None:
        """Read everything, then follow the changes.

        Raises Misused(STATE_INCOMPATIBLE), Misused(CONFIG_INVALID) if Redis rejects the credentials, and
        Refused(STATE_UNAVAILABLE) if it stays unreachable for `START_S` and there is nothing to resume from.
        """
        until, delay_s = monotonic() + START_S, DELAY_S
        while self.away_since is not None:
            try:
                await self._reread()
                self._is_here()
            except FAULTS as error:
                if is_final(error):
                    raise Misused(
                        Reason.CONFIG_INVALID,
                        f"state: Redis at {self._link} rejects the connection: {self._link.describe(error)}; see "
                        "the user in state.url, state.password_file and state.tls",
                    ) from error
                self._is_away(error)
                if self._resumed_at:
                    break
                if monotonic() > until:
                    raise self._link.refused(error) from error
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, DELAY_S_MAX)
        if self.away_since is None:
            await self._report()
        self._task = asyncio.create_task(self._follow())

    async def close(self) -> None:
        await ended(self._task)

    async def has_read(self, number: int, limit_s: float) -> None:
        """Wait until a change has been read. Raises TimeoutError."""
        await self._until(lambda: self.position.applied >= number, limit_s)

    async def has_moved(self, position: Position, limit_s: float) -> None:
        """Wait until the position changes, as when Redis has been read anew after a loss. Raises TimeoutError."""
        self._look_at = 0.0
        await self._until(lambda: self.position != position, limit_s)

    async def _until(self, so: Callable[[], bool], limit_s: float) -> None:
        async with asyncio.timeout(limit_s):
            while not so():
                await self._moved.wait()

    async def _follow(self) -> None:
        """Apply changes as they come, for ever. After a failure, wait and go on."""
        delay_s = DELAY_S
        while True:
            try:
                await self._take_some()
                delay_s = DELAY_S
            except (*FAULTS, SidecarError) as error:
                self._is_away(error)
            except Exception as error:  # an unreadable entry must not stop the feed
                logger.exception("the feed of changes from Redis at %s failed", self._link)
                self._is_away(error)
            if self.away_since is not None:
                await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))  # replicas retry at different times
                delay_s = min(2 * delay_s, DELAY_S_MAX)

    async def _take_some(self) -> None:
        if self._resumed_at:
            await self._reread()
            self._is_here()
        elif self.away_since is not None or monotonic() >= self._look_at:
            view = await look(self._link, self.position)
            self.revision = view.revision
            if view.lost:
                logger.warning("Redis at %s lost data; what this replica has is put back", self._link)
                await self._reread()
            self._is_here()
            await self._report()  # Redis may have forgotten this member, or all
        changes = await self._link.read(self.position.applied, BLOCK_MS)
        self.answered_at = time()
        if changes and (changes[0].before, changes[0].after) != self.position[1:]:
            logger.warning("change %d does not follow on what was read; all names are read anew", changes[0].number)
            await self._reread()
        else:
            self._take(changes)
        if changes:
            await self._report()

    async def _report(self) -> None:
        """Report how far this replica has read: writers wait for that."""
        if self._member:
            await self._link.set_applied(self._member, self.position.applied)

    async def _reread(self) -> None:
        if self._resumed_at and await self._link.restored_at() > self._resumed_at:
            logger.warning("Redis at %s was restored since the copy on disk was written, which is dropped", self._link)
            self._dropped, self._resumed_at = self.copy.names(), 0.0
            self.copy, self.position = Copy(), Position()
        self.position = await reread(self._link, self.copy, self.position, self._publish)
        self._resumed_at = 0.0
        for name in self._dropped:
            if self.copy.get(name) is None:
                self._publish(Change(self.position.applied, name, None))
        self._dropped = ()
        self.revision = max(self.revision, self.position.applied)
        self._wake()

    def _take(self, changes: list[Announced]) -> None:
        for announced in changes:
            self.position = Position(self.position.incarnation, announced.number, announced.mark)
            if announced.name:
                change = self.copy.take(announced.name, entry_of(announced.name, announced.value, self._link.codec))
                if change is not None:
                    self._publish(change)
        self.revision = max(self.revision, self.position.applied)
        self._wake()

    def _publish(self, change: Change[R]) -> None:
        try:
            self.subscribers.tell(change)
        except Exception:  # a faulty subscriber must not keep changes from the others
            logger.exception("a subscriber failed on the change %d of %s", change.number, change.name)

    def _wake(self) -> None:
        """Wake the tasks that wait for a change, or for Redis."""
        self._moved.set()
        self._moved = asyncio.Event()

    def _is_here(self) -> None:
        self._look_at = monotonic() + LOOK_EVERY_S
        if self.away_since is not None and self._task is not None:
            logger.info("Redis at %s is back after %.1f s", self._link, time() - self.away_since)
        self.away_since, self.answered_at = None, time()

    def _is_away(self, error: Exception) -> None:
        self.trouble = self._link.describe(error)
        if self.away_since is None:
            self.away_since = time()
            logger.warning("Redis at %s is away: %s", self._link, self.trouble)
