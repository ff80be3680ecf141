"""The http listener: the OpenAI API below `/v1`, what vLLM's clients ask beside it, and KServe's REST paths, which are
refused with a hint to gRPC.

For one more release it also has the paths of the listener for probes.
"""

from __future__ import annotations

import json
import logging
import re
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.types import Message, Receive, Scope, Send

from sidecar.errors import Misused, Reason
from sidecar.files import file_for_ssl
from sidecar.fronts.http.connection import CONNECTION, HttpLimits
from sidecar.fronts.http.listener import HttpListener
from sidecar.fronts.http.probes import METRICS, MODEL_SERVER, NO_STORE, PATHS, UNREADY, Probes, why_not_ready
from sidecar.fronts.openai.answering import send_failure
from sidecar.fronts.openai.errors import CLOSE, Failure, closing, failure, wrong_method
from sidecar.fronts.openai.headers import request_id_of
from sidecar.fronts.openai.load_calls import LOAD_IN_PLACE
from sidecar.shell.gateway import Gateway
from sidecar.shell.metrics import Metrics

logger = logging.getLogger(__name__)

BODY_BYTES_MAX = 64 << 10
"""Size of bodies that are read and ignored. The OpenAI API has a bound of its own."""
API = "/v1"
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
PREFIX = "/v2"
READS, WRITES = ("GET", "HEAD"), ("POST",)
OPEN = {"/health": READS, "/ping": READS + WRITES, "/version": READS, "/openapi.json": READS}
"""Paths that need no credential, as on vLLM, and their methods."""
_MODEL = r"/models/[^/]+(/versions/[^/]+)?"
_REGIONS = r"/(system|cuda)sharedmemory(/region/[^/]+)?"
_PATHS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"/?", READS),
    (r"/health/(live|ready)", READS),
    (rf"{_MODEL}(/(ready|config|stats))?", READS),
    (r"/models/stats", READS),
    (rf"{_MODEL}/(infer|generate|generate_stream)", WRITES),
    (r"/repository/(index|models/[^/]+/(load|unload))", WRITES),
    (rf"{_REGIONS}/status", READS),
    (rf"{_REGIONS}/(register|unregister)", WRITES),
    (rf"({_MODEL})?/trace/setting", READS + WRITES),
    (r"/logging", READS + WRITES),
)
_KNOWN = tuple((re.compile(pattern), methods) for pattern, methods in _PATHS)
_WILDCARDS = ("0.0.0.0", "[::]", "")


class HttpFront:
    """One listener. `address` is HOST:PORT; with port 0 it has the port that was taken, once `start` has returned.

    `grpc_address` is the data listener's, which answers to KServe's REST paths name; `api` is the application below
    `/v1`, and `description` returns its OpenAPI document. With `probes` the paths of the listener for probes are
    here as well, but metrics, which name adapters, tenants and engines, and why it is not ready only with `tells_all`.
    Pages of `origins` may read answers in a browser, but not those of probes. `guarded` may keep requests out.
    """

    def __init__(
        self,
        gateway: Gateway,
        metrics: Metrics,
        address: str,
        grpc_address: str,
        api: Application | None = None,
        limits: HttpLimits | None = None,
        tls: ssl.SSLContext | None = None,
        probes: bool = True,
        tells_all: bool = True,
        description: Callable[[], bytes] = lambda: b"{}",
        origins: Sequence[str] = (),
        guarded: Callable[[Application], Application] = lambda app: app,
    ) -> None:
        self._gateway = gateway
        self._metrics = metrics
        self.address = address
        self._grpc_address = grpc_address
        self._api = api
        self._shared: Application = self._serve
        if origins:
            self._shared = CORSMiddleware(
                self._serve, origins, allow_methods=("GET", "POST"), allow_headers=["*"], expose_headers=["*"]
            )
        self._listener = HttpListener(guarded(self._begin), limits or HttpLimits(), tls)
        self._listens = False
        self._description = description
        self._probes = Probes(gateway, metrics, tells_all) if probes else None
        self._tells_all = tells_all
        self._has_warned = False

    async def start(self) -> None:
        """Listen. Raises Misused(PORT_IN_USE) naming the address."""
        self.address = await self._listener.open(self.address, "http")
        self._metrics.start()
        self._listens = True

    async def stop(self) -> None:
        """Stop listening and end what is open. Does nothing if it does not listen."""
        if not self._listens:
            return
        self._listens = False
        self._metrics.stop()
        await self._listener.stop()

    async def _begin(self, scope: Scope, receive: Receive, send: Send) -> None:
        serve = self._serve if scope["path"] in PATHS else self._shared
        await serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            if not begun and message["status"] < 400:
                scope["state"][CONNECTION].proven = True
            begun = True
            await send(message)

        try:
            await self._route(scope, receive, sending)
        except Exception:
            logger.exception("%s %s broke", scope["method"], scope["path"][:200])
            if begun:
                raise  # the server closes the connection
            failed = failure(500, "the sidecar failed to answer; its log says why", "sidecar_failed")
            await send_failure(send, closing(failed), request_id_of(scope["headers"]))

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        if self._api is not None and (path.startswith(f"{API}/") or path == LOAD_IN_PLACE):
            await self._api(scope, receive, send)
        elif is_rest(path):
            await self._answer_rest(scope, send)
        elif self._probes is not None and method in READS and self._is_probe(path):
            self._warn_of_move(path)
            await self._probes(scope, receive, send)
        else:
            answer = self._answer(path, method)
            if await _is_too_long(receive):
                answer = closing(failure(413, f"the body is longer than {BODY_BYTES_MAX} bytes", "invalid_request"))
            await send_failure(send, answer, request_id_of(scope["headers"]))

    def _is_probe(self, path: str) -> bool:
        return path in PATHS and (path not in (METRICS, MODEL_SERVER) or self._tells_all)

    def _answer(self, path: str, method: str) -> Failure:
        """Return the answer to a path beside the API."""
        if path in OPEN:
            return self._open_answer(path) if method in OPEN[path] else wrong_method(path, OPEN[path])
        if path not in PATHS:
            api = [f"{API}/models, {API}/completions, {API}/chat/completions"] if self._api is not None else []
            present = [*(PATHS if self._probes is not None else ()), *api, *OPEN]
            return failure(404, f"nothing is here; there are {', '.join(present)}", "not_found")
        if self._probes is None or not self._is_probe(path):
            return failure(404, f"{path} has moved to the address of listeners.probes", "not_found")
        return wrong_method(path, READS)

    def _open_answer(self, path: str) -> Failure:
        if path == "/version":
            return Failure(200, json.dumps({"version": version("lora-sidecar")}).encode())
        if path == "/openapi.json":
            return Failure(200, self._description())
        if not why_not_ready(self._gateway):
            return Failure(200, b"", media_type=b"")
        # The reason names backends, which not everybody may see.
        return failure(503, UNREADY, "not_ready", retry_ms=1000, retry=True)

    def _warn_of_move(self, path: str) -> None:
        if not self._has_warned:
            logger.warning(
                "%s was requested from the http listener, which clients reach; the next release removes it there: set "
                "listeners.probes.address, request it there, and set listeners.http.probes: false",
                path,
            )
            self._has_warned = True

    async def _answer_rest(self, scope: Scope, send: Send) -> None:
        rest = rest_answer(scope["method"], scope["path"], self._grpc_address)
        headers = [(name.encode(), value.encode()) for name, value in NO_STORE.items()]
        if rest.allow:
            headers.append((b"allow", rest.allow.encode()))
        if scope["method"] not in READS:
            headers.append(CLOSE)
        await send_failure(send, Failure(rest.status, rest.body, tuple(headers)), request_id_of(scope["headers"]))


async def _is_too_long(receive: Receive) -> bool:
    """Read and ignore a body. Return True if it is longer than `BODY_BYTES_MAX`; then it is not read to its end."""
    size_bytes = 0
    while True:
        message = await receive()
        size_bytes += len(message.get("body", b""))
        if size_bytes > BODY_BYTES_MAX:
            return True
        if not message.get("more_body", False):
            return False


def server_tls(certificate: str | None, key: str | None, ca: str | None, address: str) -> ssl.SSLContext:
    """Return the listener's TLS; with `ca` clients need a certificate, too. Raises Misused(CONFIG_INVALID)."""
    if certificate is None or key is None:
        raise Misused(Reason.CONFIG_INVALID, f"TLS for {address} needs certificate and key")
    context: Any = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    path = certificate
    try:
        context.load_cert_chain(file_for_ssl(certificate), file_for_ssl(key))
        if ca is not None:
            path = ca
            context.load_verify_locations(file_for_ssl(ca))
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise Misused(
            Reason.CONFIG_INVALID, f"TLS for {address}: {error.filename or path}: {error.strerror or error}"
        ) from error
    context.set_alpn_protocols(["http/1.1"])
    return context  # type: ignore[no-any-return]


@dataclass(frozen=True)
class RestAnswer:
    """Status, JSON body in the form of Triton's errors, and after a wrong method the path's methods."""

    status: int
    body: bytes
    allow: str = ""


def is_rest(path: str) -> bool:
    return path == PREFIX or path.startswith(f"{PREFIX}/")


def rest_answer(method: str, path: str, grpc_address: str) -> RestAnswer:
    """Answer a path below /v2: 501, 405 for a wrong method, 404 for a path that Triton does not have either."""
    methods = next((methods for known, methods in _KNOWN if known.fullmatch(path.removeprefix(PREFIX))), None)
    instead = f"use gRPC, {_grpc_target(grpc_address)}"
    if methods is None:
        return _error(404, f"KServe's REST API has no such path, and the sidecar does not serve REST: {instead}")
    if method not in methods:
        return _error(405, f"{method} is not for this path; it takes {', '.join(methods)}", ", ".join(methods))
    return _error(501, f"the sidecar does not serve KServe's REST API: {instead} (inference.GRPCInferenceService)")


def _grpc_target(grpc_address: str) -> str:
    """Describe where a client reaches the data listener. A wildcard is no address to connect to."""
    host, _, port = grpc_address.rpartition(":")
    return f"port {port} of this host" if host in _WILDCARDS else grpc_address


def _error(status: int, message: str, allow: str = "") -> RestAnswer:
    return RestAnswer(status, json.dumps({"error": message}).encode(), allow)
