"""Mirror all objects of a collection: list them once, then watch."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from sidecar.kubernetes.api import Api, Collection, Event, Object
from sidecar.kubernetes.failures import GONE, ApiError
from sidecar.kubernetes.pauses import Pauses

logger = logging.getLogger(__name__)

WATCHES_FAILED_MAX = 3
"""After so many watches in a row that failed or told nothing, not even a bookmark, all objects are listed anew.

The server may have lost its history: after a restore it counts from an earlier number on, and waits for ours silently.
"""

Objects = dict[str, Object]
"""Objects by name."""


class Mirror:
    """Follows one collection. `listing` and `watching` are the pauses after failed lists and watches.

    Known objects stay while the server does not answer, refuses, or loses the watch's position: only a complete list or
    a DELETED event removes an object.
    """

    def __init__(
        self, api: Api, collection: Collection, listing: Pauses | None = None, watching: Pauses | None = None
    ) -> None:
        self._api = api
        self._collection = collection
        self._listing = listing or Pauses()
        self._watching = watching or Pauses()
        self._failed_since_list = 0
        self._logged: set[str] = set()
        """The failures logged since the last event."""
        self._objects: Objects = {}
        self._position: str | None = None
        """The resource version from which the next watch continues; None if a list must come first."""

    async def watch(self) -> AsyncGenerator[Objects, None]:
        """Yield all objects, at first and after each change, for ever. Do not modify the yielded mapping."""
        while True:
            if self._position is None:
                try:
                    await self._list()
                except ApiError as error:
                    self._log_once(error)
                    await asyncio.sleep(self._listing.next_s(error.retry_after_s))
                    continue
                yield dict(self._objects)
            was_told = False
            try:
                async with aclosing(self._api.watch(self._collection, self._position or "")) as events:
                    async for event in events:
                        was_told = True
                        if self._take(event):
                            yield dict(self._objects)
            except ApiError as error:
                await self._watch_failed(error)
            else:
                if not was_told:  # a proxy may end every watch at once
                    self._count_failed()
                    await asyncio.sleep(self._watching.next_s())

    async def _list(self) -> None:
        listing = await self._api.list(self._collection)
        self._objects = {item["metadata"]["name"]: item for item in listing.items}
        self._position = listing.resource_version
        self._failed_since_list = 0
        self._listing.end()

    def _take(self, event: Event) -> bool:
        """Apply an event. Return True if it changed an object."""
        self._position = event.resource_version or self._position
        self._watching.end()
        self._failed_since_list = 0
        if self._logged:
            logger.info("%s: the API server answers again", self._collection)
            self._logged.clear()
        name = event.object.get("metadata", {}).get("name", "")
        if event.kind in ("ADDED", "MODIFIED"):
            self._objects[name] = event.object
            return True
        return event.kind == "DELETED" and self._objects.pop(name, None) is not None

    async def _watch_failed(self, error: ApiError) -> None:
        """Wait before the next watch; list all objects anew if the server has lost the watch's position."""
        self._count_failed()
        if error.code == GONE:
            self._position = None
        if error.code == GONE or (error.code == 0 and not self._watching.failures):
            logger.debug("%s; it goes on in a moment", error.message)  # the server's history expired, which is normal
        else:
            self._log_once(error)
        await asyncio.sleep(self._watching.next_s(error.retry_after_s))

    def _count_failed(self) -> None:
        self._failed_since_list += 1
        if self._failed_since_list >= WATCHES_FAILED_MAX:
            self._position = None

    def _log_once(self, error: ApiError) -> None:
        """Log a failure, each different one once."""
        if error.message not in self._logged:
            self._logged.add(error.message)
            logger.warning("%s; its last known objects stay, and it is retried", error.message)
