"""The keys and limits of all replicas: in the data directory for one process, in Redis for several."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from time import time

from sidecar.access.entries import CODEC, KEY, AccessEntry, Key, LimitEntry
from sidecar.access.uses import Uses, UsesInFile, UseStore
from sidecar.config.access import Limit
from sidecar.config.redis_address import RedisLocation
from sidecar.errors import Misused, Reason, Refused
from sidecar.state.registry import Change, Registry, SqliteRegistry
from sidecar.tasks import ended

logger = logging.getLogger(__name__)

FOLDER, FILE, COPY, USES = "access", "access.sqlite", "copy.sqlite", "used.sqlite"
BUDGETS, REPLICAS = "budgets.sqlite", "replicas"
"""The folder in the data directory, and its files; the last has the number of replicas that share the budgets."""
USED_IN_REDIS = "access-used"
AGAIN_S = 1.0
"""How long after a failure it is tried again to store a revocation."""

Tell = Callable[[str, AccessEntry | None], None]
"""Takes an entry's name, and the entry; None if it was removed or cannot be read."""


class AccessStore:
    """Keys and limits. Reads are answered from memory; a write returns once every live replica has it.

    With `redis`, `member` and `member_ttl_s` are those of this replica's registry of names, and a copy in the data
    directory lets it start while Redis is away. Methods that write raise Refused(STATE_UNAVAILABLE) if that fails, and
    Refused(CHANGED_MEANWHILE) if another caller changed the same entry.
    """

    def __init__(
        self,
        data: Path | None,
        redis: RedisLocation | None = None,
        member: str = "",
        member_ttl_s: float = 10.0,
        clock: Callable[[], float] = time,
    ) -> None:
        self.clock = clock
        folder = None if data is None else data / FOLDER
        if folder is not None:
            try:
                folder.mkdir(mode=0o700, exist_ok=True)
            except OSError as error:
                raise Misused(Reason.CONFIG_INVALID, f"data_directory: {folder}: {error.strerror}") from error
        self._registry: Registry[AccessEntry]
        self._unread = None if redis is None or folder is None else folder / FILE
        uses: UseStore | None = None
        if redis is None:
            self._registry = SqliteRegistry(None if folder is None else folder / FILE, CODEC)
            uses = None if folder is None else UsesInFile(folder / USES)
        else:
            from sidecar.state.redis.link import Link  # the client is imported only if there is a Redis
            from sidecar.state.redis.registry import RedisRegistry
            from sidecar.state.redis.times import RedisTimes

            link = Link(redis, CODEC)
            kept = None if folder is None else folder / COPY
            self._registry = RedisRegistry(link, member, member_ttl_s, kept)
            uses = RedisTimes(link, USED_IN_REDIS)
        self.uses = Uses(uses)
        self._unstored: dict[str, Key] = {}
        """Keys that are revoked here and could not be stored so yet. Whatever is read of them is revoked."""
        self._storing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read everything, then follow the changes of other replicas. Raises the errors of `Registry.start`."""
        await self._registry.start()
        self._registry.subscribe(lambda change: self._warn_of_unread(change.name))
        for name in self.set_aside:
            self._warn_of_unread(name)
        self.uses.start()
        if self._unread is not None and self._unread.exists() and not self._registry.all():
            logger.warning("keys in %s are not read: state.url is set. sidecar state migrate moves them", self._unread)

    def _warn_of_unread(self, name: str) -> None:
        if name in self.set_aside:
            logger.warning("%s cannot be read, is kept and has no effect: %s", name, self.set_aside[name])

    async def close(self) -> None:
        await ended(self._storing)
        for key in self._unstored.values():
            logger.error("the key %s is not stored as revoked: the next start takes it; revoke it again then", key.id)
        await self.uses.close()
        await self._registry.close()

    def keys(self) -> list[Key]:
        """Return every key, ended and revoked ones included, by id."""
        return [self._unstored.get(entry.name, entry) for entry in self._registry.all() if isinstance(entry, Key)]

    def limits(self) -> list[Limit]:
        """Return the limits that were set at run time."""
        return [entry.limit for entry in self._registry.all() if isinstance(entry, LimitEntry)]

    def get(self, name: str) -> AccessEntry | None:
        """Return an entry by its name, as `Key.name` and `LimitEntry.name` have it."""
        return self._unstored.get(name) or self._registry.get(name)

    def is_unstored(self, key: Key) -> bool:
        """Return True if a key is revoked here only, and is stored so as soon as that can be done."""
        return key.name in self._unstored

    @property
    def set_aside(self) -> Mapping[str, str]:
        """Names of entries that cannot be read, and the reasons."""
        return self._registry.set_aside

    @property
    def away_since(self) -> float | None:
        """The time (Unix seconds) since which Redis has not answered, or None while it answers."""
        return self._registry.away_since

    @property
    def answered_at(self) -> float | None:
        """The time (Unix seconds) of Redis' last answer, to an earlier process too; None without Redis."""
        return self._registry.answered_at

    def subscribe(self, tell: Tell) -> Callable[[], None]:
        """Call `tell` with each further change, this process's included; return a function that ends that."""

        def changed(change: Change[AccessEntry]) -> None:
            tell(change.name, self._unstored.get(change.name, change.record))

        return self._registry.subscribe(changed)

    async def put(self, entry: AccessEntry) -> None:
        """Store an entry in place of the one of the same name."""
        await self._registry.put(entry, self._registry.get(entry.name))

    async def remove(self, name: str) -> AccessEntry | None:
        """Remove an entry and return it; None if there is none."""
        entry = self._registry.get(name)
        if entry is not None:
            await self._registry.delete(name, entry)
        return entry

    async def revoke(self, key_id: str) -> Key:
        """End a key for good and return it; a key that is revoked already stays as it is.

        Raises Refused(INVALID_REQUEST) for an unknown id. If it cannot be stored it raises, too, and the key has ended
        here nevertheless; it is stored later.
        """
        key = self.get(KEY + key_id)
        if not isinstance(key, Key):
            raise Refused(Reason.INVALID_REQUEST, f'there is no key "{key_id}"; sidecar keys list shows the ids')
        if key.revoked_at is None:
            key = key.model_copy(update={"revoked_at": self.clock()})
        elif key.name not in self._unstored:  # a former call may have ended before every replica had it
            await self._registry.acknowledged(self._registry.last_change)
            return key
        try:
            await self.put(key)
        except Refused:
            if self._registry.get(key.name) != key:
                self._store_later(key)
            raise
        self._unstored.pop(key.name, None)
        return key

    def _store_later(self, key: Key) -> None:
        self._unstored[key.name] = key
        if self._storing is None or self._storing.done():
            self._storing = asyncio.create_task(self._store_unstored())

    async def _store_unstored(self) -> None:
        """Store revocations until all are stored: a disk may have been full, or Redis away."""
        while self._unstored:
            await asyncio.sleep(AGAIN_S)
            for key in list(self._unstored.values()):
                with suppress(Refused):
                    await self.revoke(key.id)
                    logger.info("the key %s is stored as revoked now", key.id)
