"""A fake Kubernetes API server over HTTP with injected faults.

It forgets its history (410, as a status or as an event), cuts connections in the middle of an event, restarts, is slow,
overloaded (429) or forbidding (403), and serves lists in pages. Who has an account's name as a token may do what the
chart's Roles permit; everybody else may do everything.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from sidecar.kubernetes.access import Access
from tests.kit.kubernetes_objects import Objects, matches, seen_by
from tests.kit.kubernetes_rules import WITH_STATUS, Failure, Kind, Object, accounts, permits

PATH = re.compile(r"/(?:api|apis/([^/]+))/(v[^/]+)/namespaces/([^/]+)/([^/]+)(?:/([^/]+))?(/status)?\Z")
MERGE_PATCH = "application/merge-patch+json"
BEFORE_THE_END_S = 2.0
"""How long before its end a watch has a last bookmark."""
GONE = Failure(410, "Expired", "too old resource version")


@dataclass(frozen=True)
class Fault:
    """The fault of the next `times` requests of a verb: get, list, watch, create, patch or delete."""

    verb: str
    plural: str = ""
    status: int = 0
    retry_after: str = ""
    message: str = "as the test wants it"
    stall: bool = False
    cut: bool = False
    """The connection ends in the middle of the answer."""
    times: int = 1


@dataclass
class Asked:
    """One received request."""

    verb: str
    kind: Kind
    name: str
    query: dict[str, str]
    token: str
    is_status: bool = False


@dataclass
class FakeServer:
    """A fake server; a restart keeps its address. `gone_as` is how a too old watch ends: by "status" or "event"."""

    objects: Objects = field(default_factory=Objects)
    address: str = ""
    gone_as: str = "event"
    page_max: int = 1000
    token: str = ""
    """The required bearer token, if any."""
    bookmark_s: float = 60.0
    """How often a watch that wants bookmarks has one; it has another before it ends."""
    tls: ssl.SSLContext | None = None
    asked: list[Asked] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    _server: asyncio.Server | None = None
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)
    _watchers: dict[asyncio.StreamWriter, Asked] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _pages: dict[str, tuple[str, list[Object]]] = field(default_factory=dict)
    _released: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def access(self) -> Access:
        return Access(f"http://{self.address}", "ml")

    async def start(self) -> None:
        host, _, port = self.address.rpartition(":")
        self._server = await asyncio.start_server(self._serve, host or "127.0.0.1", int(port or 0), ssl=self.tls)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Stop the server; its objects are kept."""
        assert self._server is not None
        self._server.close()
        self._released.set()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()
        self._released.clear()

    def cut(self) -> None:
        """End every connection at once."""
        for writer in list(self._writers):
            writer.transport.abort()

    def cut_in_an_event(self) -> None:
        """Cut every watch in the middle of an event about an object that does not exist."""
        lie = {"type": "ADDED", "object": {"metadata": {"name": "never-was", "resourceVersion": "999999"}}}
        for writer in list(self._watchers):
            with suppress(OSError):
                _chunk(writer, json.dumps(lie).encode())  # no end of line: it is not whole
        self._released.set()
        self._released.clear()
        for writer in list(self._watchers):
            writer.close()

    async def bookmark(self) -> None:
        """Send a bookmark to every watch that wants them."""
        self.objects.number += 1
        for writer, asked in list(self._watchers.items()):
            self._mark(asked, writer)
            await writer.drain()

    def _next_mark(self, now: float, ends: float) -> float:
        mark = min(now + self.bookmark_s, ends - BEFORE_THE_END_S)
        return mark if mark > now else math.inf

    def _mark(self, asked: Asked, writer: asyncio.StreamWriter) -> None:
        if asked.query.get("allowWatchBookmarks") == "true":
            _tell(writer, "BOOKMARK", {"metadata": {"resourceVersion": str(self.objects.number)}})

    def count(self, verb: str, plural: str = "") -> int:
        return sum(asked.verb == verb and plural in ("", asked.kind[2]) for asked in self.asked)

    def watching(self, plural: str) -> bool:
        """Return True if a client watches a kind now."""
        return any(asked.kind[2] == plural for asked in self._watchers.values())

    # Answers.

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            self._tasks.discard(task)
            self._writers.discard(writer)
            self._watchers.pop(writer, None)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, target, _ = head.split("\r\n", 1)[0].split(" ")
        headers = {k.lower(): v for k, v in re.findall(r"^([^:\r\n]+): *(.*?)\r$", head, re.M)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        parts = urlsplit(target)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        found = PATH.match(parts.path)
        if found is None:
            return _answer(writer, 404, Failure(404, "NotFound", "the server could not find it").status)
        kind: Kind = (found[1] or "", found[3], found[4])
        token, is_status = headers.get("authorization", ""), bool(found[6])
        asked = Asked(_verb(method, found[5], query), kind, found[5] or "", query, token, is_status)
        self.asked.append(asked)
        fault = self._fault_for(asked)
        if fault is not None and fault.stall:
            await self._released.wait()
            return False
        if fault is not None and fault.status:
            failure = Failure(fault.status, "Faulty", fault.message)
            extra = {"retry-after": fault.retry_after} if fault.retry_after else {}
            return _answer(writer, fault.status, failure.status, extra)
        try:
            self._let_in(asked)
            if method == "PATCH" and headers.get("content-type") != MERGE_PATCH:
                raise Failure(415, "UnsupportedMediaType", "Unsupported Media Type")
            if asked.verb == "watch":
                return await self._watch(asked, writer)
            answer = self._do(asked, json.loads(body) if body else {})
        except Failure as failure:
            return _answer(writer, failure.code, failure.status)
        await self.objects.tell()
        return _answer(writer, 201 if asked.verb == "create" else 200, answer, cut=fault is not None and fault.cut)

    def _let_in(self, asked: Asked) -> None:
        if self.token and asked.token != f"Bearer {self.token}":
            raise Failure(401, "Unauthorized", "Unauthorized")
        rules = accounts().get(asked.token.removeprefix("Bearer "))
        is_home = asked.kind[1] == self.access.namespace
        if rules is not None and not (is_home and permits(rules, asked.verb, asked.kind, asked.name, asked.is_status)):
            raise Failure(
                403, "Forbidden", f"{asked.kind[2]} is forbidden: no Role permits to {asked.verb} {asked.name}"
            )
        if asked.is_status and asked.kind[2] not in WITH_STATUS:
            raise Failure(404, "NotFound", "the server could not find the requested resource")

    def _fault_for(self, asked: Asked) -> Fault | None:
        for number, fault in enumerate(self.faults):
            if fault.verb == asked.verb and fault.plural in ("", asked.kind[2]):
                left = Fault(**{**fault.__dict__, "times": fault.times - 1})
                self.faults[number : number + 1] = [left] if left.times else []
                return fault
        return None

    def _do(self, asked: Asked, body: Object) -> Object:
        objects = self.objects
        match asked.verb:
            case "get":
                return objects.get(asked.kind, asked.name)
            case "list":
                return self._page(asked)
            case "create":
                return objects.create(asked.kind, body)
            case "patch":
                return objects.patch(asked.kind, asked.name, body, asked.is_status)
            case _:
                return objects.delete(asked.kind, asked.name)

    def _page(self, asked: Asked) -> Object:
        token = asked.query.get("continue", "")
        if token:
            if token not in self._pages:
                raise Failure(410, "Expired", "The provided continue parameter is too old")
            version, items = self._pages[token]
        else:
            version = str(self.objects.number)
            selector = asked.query.get("labelSelector", "")
            held = self.objects.held.get(asked.kind, {})
            items = [held[name] for name in sorted(held) if matches(held[name], selector)]
        limit = min(int(asked.query.get("limit", 0)) or self.page_max, self.page_max)
        metadata = {"resourceVersion": version}
        if len(items) > limit:
            metadata["continue"] = f"page-{len(self.asked)}"
            self._pages[metadata["continue"]] = version, items[limit:]
        return {"kind": "List", "apiVersion": "v1", "metadata": metadata, "items": items[:limit]}

    def forget_pages(self) -> None:
        self._pages.clear()

    async def _watch(self, asked: Asked, writer: asyncio.StreamWriter) -> bool:
        """Tell what changes, until the time that the client wants; from no position, or 0, first what there is."""
        position, selector = asked.query.get("resourceVersion", "0") or "0", asked.query.get("labelSelector", "")
        since = self.objects.number if position == "0" else int(position)
        is_gone = since < self.objects.forgotten
        if is_gone and self.gone_as == "status":
            raise GONE
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n")
        if is_gone:
            _tell(writer, "ERROR", GONE.status)
            return _end(writer)
        self._watchers[writer] = asked
        for held in list(self.objects.held.get(asked.kind, {}).values()) if position == "0" else ():
            if matches(held, selector):
                _tell(writer, "ADDED", held)
        now = asyncio.get_running_loop().time
        ends = now() + (float(asked.query.get("timeoutSeconds", 0)) or math.inf)
        marks = self._next_mark(now(), ends)
        while not writer.is_closing():
            for change in [change for change in self.objects.history if change.number > since]:
                since = change.number
                told = seen_by(change, selector) if change.kind == asked.kind else None
                if told is not None:
                    _tell(writer, *told)
            if now() >= marks:
                if since <= self.objects.number:  # a position that is not reached is waited for, and nothing told
                    self._mark(asked, writer)
                marks = self._next_mark(now(), ends)
            await writer.drain()
            if now() >= ends:
                del self._watchers[writer]
                return _end(writer)
            async with self.objects.news:
                latest = self.objects.history[-1].number if self.objects.history else 0
                if latest <= since:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(min(0.2, max(0.0, min(ends, marks) - now()))):
                            await self.objects.news.wait()
        return False


def _verb(method: str, name: str | None, query: dict[str, str]) -> str:
    if method == "GET":
        return "get" if name else "watch" if query.get("watch") else "list"
    return {"POST": "create", "PATCH": "patch", "DELETE": "delete"}[method]


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))


def _tell(writer: asyncio.StreamWriter, event: str, about: Object) -> None:
    _chunk(writer, json.dumps({"type": event, "object": about}).encode() + b"\n")


def _end(writer: asyncio.StreamWriter) -> bool:
    """End an answer in chunks; another may follow on the connection."""
    writer.write(b"0\r\n\r\n")
    return True


def _answer(
    writer: asyncio.StreamWriter, code: int, found: Any, headers: dict[str, str] | None = None, cut: bool = False
) -> bool:
    """Write an answer. Return True if another may follow on the connection."""
    body = json.dumps(found).encode()
    extra = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
    head = f"HTTP/1.1 {code} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n{extra}\r\n"
    writer.write(head.encode() + (body[: len(body) // 2] if cut else body))
    return not cut


@asynccontextmanager
async def fake_server(**fields: Any) -> AsyncIterator[FakeServer]:
    """Run a server for the length of a block."""
    server = FakeServer(**fields)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def write_kubeconfig(path: Path, place: str | Object, namespace: str = "ml", token: str = "") -> Path:
    """Write a kubeconfig for a server: its address, or what a kubeconfig says of a cluster."""
    record = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "namespace": namespace, "user": "test"}}],
        "clusters": [{"name": "test", "cluster": {"server": f"http://{place}"} if isinstance(place, str) else place}],
        "users": [{"name": "test", "user": {"token": token}}],
    }
    path.write_text(yaml.safe_dump(record))
    return path
