"""The http listener: the OpenAI API below `/v1`, and KServe's REST paths, which are refused with a hint to gRPC.

For one more release it also has the paths of the listener for probes.
"""

from __future__ import annotations

import json
import logging
import re
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from sidecar.errors import Misused, Reason
from sidecar.files import file_for_ssl
from sidecar.fronts.http.connection import HttpLimits
from sidecar.fronts.http.listener import HttpListener
from sidecar.fronts.http.probes import METRICS, NO_STORE, PATHS, Probes, text_response
from sidecar.fronts.openai.load_calls import LOAD_IN_PLACE
from sidecar.fronts.openai.request import REQUEST_ID_HEADER, request_id_of
from sidecar.shell.gateway import Gateway
from sidecar.shell.metrics import Metrics

logger = logging.getLogger(__name__)

BODY_BYTES_MAX = 64 << 10
"""Size of bodies that are read and ignored. The OpenAI API has a bound of its own."""
API = "/v1"
CLOSE = {"connection": "close"}
"""Header of an answer to a request whose body is not read to its end."""
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
PREFIX = "/v2"
READS, WRITES = ("GET", "HEAD"), ("POST",)
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
    `/v1`. With `probes` the paths of the listener for probes are here as well, that of the metrics only with
    `shows_metrics`: they name adapters and tenants.
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
        shows_metrics: bool = True,
    ) -> None:
        self._metrics = metrics
        self.address = address
        self._grpc_address = grpc_address
        self._api = api
        self._listener = HttpListener(self._serve, limits or HttpLimits(), tls)
        self._listens = False
        self._probes = Probes(gateway, metrics) if probes else None
        self._shows_metrics = shows_metrics
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

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._route(scope, receive, send)
        except Exception:
            logger.exception("%s %s broke", scope["method"], scope["path"][:200])
            raise  # the server answers with 500, or closes the connection

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if self._api is not None and (path.startswith(f"{API}/") or path == LOAD_IN_PLACE):
            await self._api(scope, receive, send)
            return
        send = _with_id(scope, send)
        if is_rest(path):
            await self._answer_rest(scope)(scope, receive, send)
        elif await _is_too_long(receive):
            await text_response(413, "not a request: the body is too long", CLOSE)(scope, receive, send)
        elif path not in PATHS:
            await self._nothing_here()(scope, receive, send)
        elif self._probes is None or (path == METRICS and not self._shows_metrics):
            await text_response(404, f"{path} has moved to the address of listeners.probes")(scope, receive, send)
        elif scope["method"] not in ("GET", "HEAD"):
            await text_response(405, f"{path} is to be read with GET", {"allow": "GET, HEAD"})(scope, receive, send)
        else:
            self._warn_of_move(path)
            await self._probes(scope, receive, send)

    def _warn_of_move(self, path: str) -> None:
        if not self._has_warned:
            logger.warning(
                "%s was requested from the http listener, which clients reach; the next release removes it there: set "
                "listeners.probes.address, request it there, and set listeners.http.probes: false",
                path,
            )
            self._has_warned = True

    def _nothing_here(self) -> Response:
        api = [f"{API}/models, {API}/completions, {API}/chat/completions"] if self._api is not None else []
        present = [*(PATHS if self._probes is not None else ()), *api]
        return text_response(404, f"nothing is here; there are {', '.join(present)}")

    def _answer_rest(self, scope: Scope) -> Response:
        rest = rest_answer(scope["method"], scope["path"], self._grpc_address)
        headers = NO_STORE | ({"allow": rest.allow} if rest.allow else {})
        if scope["method"] not in ("GET", "HEAD"):
            headers |= CLOSE
        return Response(rest.body, rest.status, headers, media_type="application/json")


def _with_id(scope: Scope, send: Send) -> Send:
    """Return a `send` that adds the request's id to an answer that is an error."""

    async def send_with_id(message: Message) -> None:
        if message.get("status", 200) >= 400:
            header = (REQUEST_ID_HEADER, request_id_of(scope["headers"]).encode())
            message = {**message, "headers": [*message["headers"], header]}
        await send(message)

    return send_with_id


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
