"""A small client for a Kubernetes API server: get, list, watch, patch, create, delete."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from random import uniform
from typing import Any

import httpx

from sidecar.errors import Misused
from sidecar.kubernetes.access import Access
from sidecar.kubernetes.failures import GONE, ApiError, from_status, refusal, unanswered

FIELD_MANAGER = "lora-sidecar"
PAGE_MAX = 500
"""The number of objects in one page of a list."""
TIMEOUT = httpx.Timeout(30.0, connect=10.0)
WATCH_S = (120.0, 240.0)
"""The range in seconds of a watch's random timeout: the next watch may reach another API server."""
SILENCE_S = 30.0
"""A connection counts as dead if its watch is silent for so long after its timeout."""
LINE_BYTES_MAX = 16 << 20
"""The size limit of a watch's event; the server stores no object larger than a tenth of it."""

Object = dict[str, Any]


@dataclass(frozen=True)
class Collection:
    """The objects of one kind in one namespace. `group` is "" for the core API; `selector` selects by label."""

    group: str
    version: str
    plural: str
    namespace: str
    selector: str = ""

    @property
    def path(self) -> str:
        root = f"/apis/{self.group}" if self.group else "/api"
        return f"{root}/{self.version}/namespaces/{self.namespace}/{self.plural}"

    def __str__(self) -> str:
        return f"{self.plural} in {self.namespace}"


@dataclass(frozen=True)
class Listing:
    """All objects of a collection at one moment; a watch continues from `resource_version`."""

    items: tuple[Object, ...]
    resource_version: str


@dataclass(frozen=True)
class Event:
    """An event of a watch: ADDED, MODIFIED and DELETED with the object, BOOKMARK with its metadata only."""

    kind: str
    object: Object

    @property
    def resource_version(self) -> str:
        return str(self.object.get("metadata", {}).get("resourceVersion", ""))


class Api:
    """One API server. Every request raises ApiError if it fails."""

    def __init__(self, access: Access) -> None:
        self.access = access
        verify = access.tls if access.tls is not None else True
        transport = httpx.AsyncHTTPTransport(verify=verify, socket_options=_KEEPALIVE)
        self._client = httpx.AsyncClient(base_url=access.url, transport=transport, timeout=TIMEOUT, trust_env=False)

    async def close(self) -> None:
        await self._client.aclose()

    async def get(self, path: str) -> Object:
        return await self._ask("GET", path)

    async def create(self, collection: Collection, made: Object) -> Object:
        return await self._ask("POST", collection.path, {"fieldManager": FIELD_MANAGER}, json.dumps(made))

    async def delete(self, collection: Collection, name: str) -> None:
        """Delete an object; a pod ends by its own grace period."""
        await self._ask("DELETE", f"{collection.path}/{name}")

    async def patch_status(self, collection: Collection, name: str, patch: Object) -> Object:
        """Merge a patch into an object's status.

        A patch that names a resource version raises ApiError 409 if the object has another one.
        """
        path = f"{collection.path}/{name}/status"
        kind = "application/merge-patch+json"
        return await self._ask("PATCH", path, {"fieldManager": FIELD_MANAGER}, json.dumps(patch), kind)

    async def list(self, collection: Collection) -> Listing:
        """Return all objects as of one moment. A list whose pages expire meanwhile is restarted once."""
        try:
            return await self._list(collection)
        except ApiError as error:
            if error.code != GONE:
                raise
            return await self._list(collection)

    async def _list(self, collection: Collection) -> Listing:
        items: list[Object] = []
        query = {"limit": str(PAGE_MAX)} | _selecting(collection)
        while True:
            page = await self._ask("GET", collection.path, query)
            items += page.get("items") or []
            metadata = page.get("metadata") or {}
            if not metadata.get("continue"):
                return Listing(tuple(items), str(metadata.get("resourceVersion", "")))
            query["continue"] = metadata["continue"]

    async def watch(self, collection: Collection, resource_version: str) -> AsyncGenerator[Event, None]:
        """Yield the changes since a resource version, until the server ends the watch.

        Raises ApiError, with code 410 if the server no longer has that version.
        """
        what = f"watching {collection}"
        limit_s = uniform(*WATCH_S)
        query = _selecting(collection) | {
            "watch": "1",
            "resourceVersion": resource_version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(int(limit_s)),
        }
        timeout = httpx.Timeout(TIMEOUT.connect, read=limit_s + SILENCE_S)
        try:
            headers = self._headers()
            async with self._client.stream(
                "GET", collection.path, params=query, headers=headers, timeout=timeout
            ) as answer:
                if answer.is_error:
                    await answer.aread()
                    raise refusal(what, answer)
                async for line in _lines(answer):
                    yield _event(what, line)
        except (httpx.HTTPError, Misused, ValueError) as error:
            raise unanswered(what, error) from error

    async def _ask(
        self, method: str, path: str, query: Mapping[str, str] | None = None, body: str | None = None, kind: str = ""
    ) -> Object:
        what = f"{method} {path}"
        try:
            headers = self._headers() | ({} if body is None else {"content-type": kind or "application/json"})
            answer = await self._client.request(method, path, params=query, content=body, headers=headers)
            if answer.is_error:
                raise refusal(what, answer)
            found = answer.json()
        except (httpx.HTTPError, Misused, ValueError) as error:
            raise unanswered(what, error) from error
        if not isinstance(found, dict):
            raise unanswered(what, ValueError("it is not an object"))
        return found

    def _headers(self) -> dict[str, str]:
        token = self.access.token()
        return {"accept": "application/json", "user-agent": FIELD_MANAGER} | (
            {"authorization": f"Bearer {token}"} if token else {}
        )


def _selecting(collection: Collection) -> dict[str, str]:
    return {"labelSelector": collection.selector} if collection.selector else {}


async def _lines(answer: httpx.Response) -> AsyncIterator[bytes]:
    """Yield the complete lines of a body as they arrive; an incomplete last line is dropped."""
    rest = bytearray()
    async for part in answer.aiter_bytes():
        rest += part
        *lines, last = rest.split(b"\n") if b"\n" in part else (rest,)
        for line in lines:
            if line.strip():
                yield bytes(line)
        rest = last
        if len(rest) > LINE_BYTES_MAX:
            raise ValueError(f"an event is longer than {LINE_BYTES_MAX} bytes")


def _event(what: str, line: bytes) -> Event:
    told = json.loads(line)
    event = Event(told["type"], told["object"]) if isinstance(told, dict) and "type" in told else None
    if event is None or not isinstance(event.object, dict):
        raise ValueError(f"it is not an event: {line[:80]!r}")
    if event.kind == "ERROR":
        raise from_status(what, event.object)
    return event


_KEEPALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, option), value)
        for option, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
        if hasattr(socket, option)
    ),
]
"""TCP keepalive: a watch may be silent for minutes, but a dead peer is detected within half a minute."""
