"""All objects of a collection, kept like the API server's: listed once, then watched."""

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
"""Watches that fail in a row before all is listed anew: the server may have lost what was known of it."""

Objects = dict[str, Object]
"""By name."""


class Mirror:
    """Follows one collection. `listing` and `watching` are the pauses after lists and watches that failed.

    What it has seen stays as it is while the server does not answer, refuses, or forgets where the watch was: only a
    complete list or a DELETED event takes an object away.
    """

    def __init__(
        self, api: Api, collection: Collection, listing: Pauses | None = None, watching: Pauses | None = None
    ) -> None:
        self._api = api
        self._collection = collection
        self._listing = listing or Pauses()
        self._watching = watching or Pauses()
        self._failed_since_list = 0
        self._told: set[str] = set()
        """What was logged since a watch told of something last."""
        self._objects: Objects = {}
        self._position: str | None = None
        """The resource version that the next watch goes on from; None: all must be listed."""

    async def watch(self) -> AsyncGenerator[Objects, None]:
        """Yield all objects, at first and whenever one has changed, for ever. Do not change what is yielded."""
        while True:
            if self._position is None:
                try:
                    await self._list()
                except ApiError as error:
                    self._tell(error)
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
                if not was_told:  # something between us may end every watch at once
                    await asyncio.sleep(self._watching.next_s())

    async def _list(self) -> None:
        listing = await self._api.list(self._collection)
        self._objects = {item["metadata"]["name"]: item for item in listing.items}
        self._position = listing.resource_version
        self._failed_since_list = 0
        self._listing.end()

    def _take(self, event: Event) -> bool:
        """Take in what happened; return whether an object is another now."""
        self._position = event.resource_version or self._position
        self._watching.end()
        self._failed_since_list = 0
        if self._told:
            logger.info("%s: the API server answers again", self._collection)
            self._told.clear()
        name = event.object.get("metadata", {}).get("name", "")
        if event.kind in ("ADDED", "MODIFIED"):
            self._objects[name] = event.object
            return True
        return event.kind == "DELETED" and self._objects.pop(name, None) is not None

    async def _watch_failed(self, error: ApiError) -> None:
        """Wait before the next one; have all listed anew if the server has forgotten where this one was."""
        self._failed_since_list += 1
        if error.code == GONE or self._failed_since_list >= WATCHES_FAILED_MAX:
            self._position = None
        if error.code == GONE or (error.code == 0 and not self._watching.failures):
            logger.debug("%s; it goes on in a moment", error.message)  # as it must now and then; nothing is wrong
        else:
            self._tell(error)
        await asyncio.sleep(self._watching.next_s(error.retry_after_s))

    def _tell(self, error: ApiError) -> None:
        """Log a failure, each different one once."""
        if error.message not in self._told:
            self._told.add(error.message)
            logger.warning("%s; what is known of it stays, and it is asked again", error.message)
