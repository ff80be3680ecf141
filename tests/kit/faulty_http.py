"""A web server with injected faults: it cuts connections, sends wrong sizes, redirects, stalls.

It serves its own files (with ranges, ETags and If-Range), or relays a server behind it.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

PASSED_ON = ("etag", "last-modified", "content-range", "accept-ranges", "content-type")


@dataclass(frozen=True)
class Fault:
    """The fault of one answer. `body_max` cuts the connection after so many bytes of the body; a garbled body has the
    right length.
    """

    status: int | None = None
    body_max: int | None = None
    length: int | None = None
    location: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    stall: bool = False
    garbled: bool = False


@dataclass
class Asked:
    """One received request."""

    method: str
    path: str
    query: str
    headers: dict[str, str]


@dataclass
class FaultyServer:
    """Requests whose path ends with a key use up its `faults` one by one; `always` faults stay."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    always: dict[str, Fault] = field(default_factory=dict)
    ranges: bool = True
    validators: bool = True
    upstream: str = ""
    asked: list[Asked] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)

    def url(self, folder: str) -> str:
        return f"http://{self.address}/{folder}"

    def serve(self, folder: str, path: Any) -> None:
        """Serve a directory's files under a folder."""
        for file in sorted(path.iterdir()):
            self.files[f"/{folder}/{file.name}"] = file.read_bytes()

    def count(self, ending: str) -> int:
        return sum(asked.path.endswith(ending) for asked in self.asked)

    def fault_for(self, path: str) -> Fault:
        for ending, faults in self.faults.items():
            if path.endswith(ending) and faults:
                return faults.pop(0)
        return next((fault for ending, fault in self.always.items() if path.endswith(ending)), Fault())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *arguments: Any) -> None:
        """Requests are kept in `asked`."""

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        owner: FaultyServer = self.server.owner
        parts = urlsplit(self.path)
        asked = Asked(self.command, parts.path, parts.query, {k.lower(): v for k, v in self.headers.items()})
        owner.asked.append(asked)
        fault = owner.fault_for(parts.path) if with_body else Fault()
        if fault.stall:
            owner.released.wait(60)
            self.close_connection = True
            return
        status, headers, body = _from_upstream(owner, self) if owner.upstream else _own(owner, asked)
        if fault.status is not None:
            status, body = fault.status, b""
            headers = {"content-length": "0"}
        headers |= dict(fault.headers)
        if fault.location:
            headers["location"] = fault.location
        if fault.length is not None:
            headers["content-length"] = str(fault.length)
        if fault.garbled:
            body = bytes(byte ^ 1 for byte in body)
        self._send(status, headers, body[: fault.body_max] if with_body else b"")
        self.close_connection = True

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("connection", "close")
        self.end_headers()
        self.wfile.write(body)


def _own(owner: FaultyServer, asked: Asked) -> tuple[int, dict[str, str], bytes]:
    body = owner.files.get(asked.path)
    if body is None:
        return 404, {"content-length": "0"}, b""
    tag = f'"{hashlib.sha1(body).hexdigest()}"'
    headers = {"etag": tag} if owner.validators else {}
    headers |= owner.headers
    wanted = re.fullmatch(r"bytes=(\d+)-", asked.headers.get("range", "")) if owner.ranges else None
    if wanted is None or asked.headers.get("if-range", tag) != tag:
        return 200, headers | {"content-length": str(len(body))}, body
    first = int(wanted[1])
    content_range = f"bytes {first}-{len(body) - 1}/{len(body)}"
    return 206, headers | {"content-length": str(len(body) - first), "content-range": content_range}, body[first:]


def _from_upstream(owner: FaultyServer, handler: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(owner.upstream)
    try:
        connection.request(handler.command, handler.path, headers=dict(handler.headers.items()))
        answer = connection.getresponse()
        body = answer.read()
        length = answer.getheader("content-length") or str(len(body))
        kept = {k.lower(): v for k, v in answer.getheaders() if k.lower() in PASSED_ON or k.lower().startswith("x-amz")}
        return answer.status, kept | {"content-length": length}, body
    finally:
        connection.close()


@contextmanager
def faulty_server(upstream: str = "", tls: ssl.SSLContext | None = None) -> Iterator[FaultyServer]:
    """Run a server on a free port of this machine."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.block_on_close = False
    owner = server.owner = FaultyServer(f"127.0.0.1:{server.server_address[1]}", upstream=upstream)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield owner
    finally:
        owner.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
