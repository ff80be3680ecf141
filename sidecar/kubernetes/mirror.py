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
    """Follows one collection.

    What it has seen stays as it is while the server does not answer, refuses, or forgets where the watch was: only a
    complete list or a DELETED event takes an object away.
    """

    def __init__(self, api: Api, collection: Collection, pauses: Pauses | None = None) -> None:
        self._api = api
        self._collection = collection
        self._pauses = pauses or Pauses()
        self._told = ""
        self._objects: Objects = {}
        self._position: str | None = None
        """The resource version that the next watch goes on from; None: all must be listed."""

    async def watch(self) -> AsyncGenerator[Objects, None]:
        """Yield all objects, at first and whenever one has changed, for ever. Do not change what is yielded."""
        while True:
            try:
                if self._position is None:
                    await self._list()
                    yield dict(self._objects)
                was_told = False
                async with aclosing(self._api.watch(self._collection, self._position or "")) as events:
                    async for event in events:
                        was_told = True
                        if self._take(event):
                            yield dict(self._objects)
                if not was_told:  # at once, again and again, if something between us ends every watch
                    await asyncio.sleep(self._pauses.next_s())
            except ApiError as error:
                await self._failed(error)

    async def _list(self) -> None:
        listing = await self._api.list(self._collection)
        self._objects = {item["metadata"]["name"]: item for item in listing.items}
        self._position = listing.resource_version
        self._went_well()

    def _take(self, event: Event) -> bool:
        """Take in what happened; return whether an object is another now."""
        self._position = event.resource_version or self._position
        self._went_well()
        name = event.object.get("metadata", {}).get("name", "")
        if event.kind in ("ADDED", "MODIFIED"):
            self._objects[name] = event.object
            return True
        return event.kind == "DELETED" and self._objects.pop(name, None) is not None

    async def _failed(self, error: ApiError) -> None:
        was_watching = self._position is not None
        if was_watching and (error.code == GONE or self._pauses.failures >= WATCHES_FAILED_MAX):
            self._position = None
        if was_watching and error.code == GONE:  # as it must be now and then; nothing is wrong
            logger.debug("%s", error.message)
        elif error.message != self._told:
            self._told = error.message
            logger.warning("%s; what is known of it stays, and it is asked again", error.message)
        await asyncio.sleep(self._pauses.next_s(error.retry_after_s))

    def _went_well(self) -> None:
        if self._told:
            logger.info("%s: the API server answers again", self._collection)
        self._told = ""
        self._pauses.end()
