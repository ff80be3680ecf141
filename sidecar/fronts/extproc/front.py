"""The endpoint picker's services: external processing, access logs, and health as gateways ask for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from starlette.types import Receive, Scope, Send

from sidecar.backends.openai.paths import ROWS
from sidecar.config.listeners import EndpointPickerListener
from sidecar.errors import Misused, Reason, Refused, SidecarError
from sidecar.fronts import callers
from sidecar.fronts.extproc import heads, replies
from sidecar.fronts.extproc.access_log import AccessLog
from sidecar.fronts.extproc.call_exchange import STREAM, UNARY, CallExchange
from sidecar.fronts.extproc.calls import Call, MalformedHeader, answer
from sidecar.fronts.extproc.exchange import Aborted, Elsewhere, Exchange
from sidecar.fronts.extproc.ways import Way
from sidecar.fronts.intake import Intake
from sidecar.fronts.kserve.infer import KServe
from sidecar.fronts.openai.errors import failure
from sidecar.proto import envoy_pb2 as envoy
from sidecar.shell.metrics import PICKED, PickerFigures
from sidecar.tasks import Tasks, ended

logger = logging.getLogger(__name__)

PROCESSOR = "envoy.service.ext_proc.v3.ExternalProcessor"
LOGS = "envoy.service.accesslog.v3.AccessLogService"
HEALTH_NAMES = ("liveness", "readiness", PROCESSOR)
"""What gateways and charts of endpoint pickers ask health of, besides ""."""
MESSAGE_BYTES_MAX = 64 << 20
"""A message has a chunk of a body, or in buffered modes all of it, which gateways bound themselves."""
NO_CALLS = "this gateway carries no gRPC calls; have it route them to the sidecar's data listener"
SETTINGS = "listeners.endpoint_picker"
END: Any = grpc.aio.EOF  # type: ignore[attr-defined]

Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class Picker:
    """Answers Envoy by an ASGI application, and calls by the front of KServe.

    `intake` bounds what calls bring. `named` returns the backend at an address, or ""; `replica` is
    this replica's id, "" if there are no others.
    """

    def __init__(
        self,
        app: Application,
        kserve: KServe,
        settings: EndpointPickerListener,
        intake: Intake,
        named: Callable[[str], str],
        replica: str,
    ) -> None:
        self._app, self._kserve = app, kserve
        self._settings, self._intake = settings, intake
        self.log = AccessLog(replica)
        self._answering = Tasks()
        self._exchanges: set[Exchange] = set()
        self._elsewhere = Elsewhere(named)
        self._way = Way(settings.in_path, f"{SETTINGS}.in_path", "http")
        self._way_of_calls = Way(settings.in_path_grpc, f"{SETTINGS}.in_path_grpc", "data")

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve on a server."""
        process = grpc.stream_stream_rpc_method_handler(
            self._process, envoy.ProcessingRequest.FromString, envoy.ProcessingResponse.SerializeToString
        )
        logs = grpc.stream_unary_rpc_method_handler(
            self._take_logs, envoy.AccessLogMessage.FromString, envoy.Received.SerializeToString
        )
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(PROCESSOR, {"Process": process}),
                grpc.method_handlers_generic_handler(LOGS, {"StreamAccessLogs": logs}),
            )
        )

    def figures(self) -> PickerFigures:
        """Return what is on its way, and what access logs have told."""
        counted = dict.fromkeys(PICKED, 0)
        for exchange in self._exchanges:
            counted[exchange.where] += 1
        counted["unseen"] = self.log.unseen
        return PickerFigures(counted, self.log.entries, self._elsewhere.count)

    async def stop(self) -> None:
        """Cancel what is being answered."""
        await self._answering.stop()

    async def _process(self, requests: Any, context: Any) -> None:
        first = await context.read()
        kind = None if first is END else first.WhichOneof("request")
        if kind == "response_headers":  # a filter of the gateway before us has answered: it checks, or limits, clients
            await self._pass_on(first, context)
            return
        if kind != "request_headers":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must have a request's headers")
        if first.observability_mode:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, "observability_mode must be off: it routes nothing"
            )
        if any(not name.isascii() for name, _ in heads.pairs(first.request_headers.headers)):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a header's name is not of HTTP")
        if (trouble := heads.mode_trouble(first)) is not None:
            if heads.path_of(first) in (UNARY, STREAM, *ROWS):
                self._turned_away(Misused(Reason.CONFIG_INVALID, trouble))
            refused = failure(500, trouble, "gateway_mode")
            await context.write(replies.answered(refused.status, refused.headers, refused.body))
            return
        asked = first, context.write, self.log, self._elsewhere, self._settings
        peer = _peer_of(context.peer())
        exchange: Exchange
        if not heads.is_call(first):
            exchange = Exchange(*asked, self._way)
            work = self._app(heads.scope_of(first, peer, exchange), exchange.receive, exchange.send)
        elif (method := heads.path_of(first)) in (UNARY, STREAM):
            exchange = CallExchange(method == UNARY, *asked, self._way_of_calls)
            try:
                call = Call(exchange, first, peer, self._intake)
            except MalformedHeader as error:
                self._turned_away(Refused(Reason.INVALID_REQUEST, str(error)))
                await context.write(replies.ended_call(grpc.StatusCode.INVALID_ARGUMENT.value[0], str(error)))
                return
            work = answer(self._kserve, call, method, exchange.hides_tokens)
        else:
            await context.write(replies.ended_call(grpc.StatusCode.UNIMPLEMENTED.value[0], NO_CALLS))
            return
        self._exchanges.add(exchange)
        answering = self._answering.spawn(_to_its_end(work, exchange))
        reading = asyncio.create_task(_read(context, exchange))
        try:
            await exchange.begin()
            await asyncio.wait((reading, exchange.finished), return_when=asyncio.FIRST_COMPLETED)
            if reading.done() and not exchange.finished.done() and (broke := reading.exception()) is not None:
                logger.error("a message of Envoy's broke its exchange", exc_info=broke)
                exchange.abort("the sidecar failed")
            if not exchange.finished.done():
                exchange.left()  # before the wait, so that nothing more is written
            await exchange.written()
            if exchange.finished.done():
                exchange.finished.result()
        except Aborted as aborted:
            await context.abort(grpc.StatusCode.ABORTED, str(aborted))
        finally:
            exchange.left()
            if isinstance(exchange, CallExchange) and exchange.is_left:
                answering.cancel()  # as gRPC does with a call whose client leaves
            self._exchanges.discard(exchange)
            await ended(reading)
            if exchange.finished.done() and not exchange.finished.cancelled():
                exchange.finished.exception()  # it has been told, or is of a call that is gone

    def _turned_away(self, error: SidecarError) -> None:
        self._kserve.gateway.turned_away(callers.made_id(), error)

    async def _pass_on(self, first: envoy.ProcessingRequest, context: Any) -> None:
        """Let the answer to a request go on that has not come here."""
        exchange = Exchange(first, context.write, self.log, self._elsewhere, self._settings, self._way)
        exchange.pass_on()
        message = first
        while message is not END and not exchange.finished.done():
            await exchange.take(message)
            if not exchange.finished.done():
                message = await context.read()

    async def _take_logs(self, messages: AsyncIterator[envoy.AccessLogMessage], context: Any) -> envoy.Received:
        async for message in messages:
            self.log.take(message)
        return envoy.Received()


async def _to_its_end(work: Awaitable[None], exchange: Exchange) -> None:
    try:
        await work
        exchange.over()
    except Exception:
        logger.exception("an exchange with Envoy broke")
        exchange.abort("the sidecar failed")


async def _read(context: Any, exchange: Exchange) -> None:
    """Give an exchange Envoy's messages until Envoy ends the call."""
    while (message := await context.read()) is not END:
        await exchange.take(message)


def _peer_of(peer: str) -> str:
    """Return gRPC's name of a peer as HOST:PORT; "" for a socket file."""
    kind, _, address = peer.partition(":")
    return address.replace("%5B", "[").replace("%5D", "]") if kind in ("ipv4", "ipv6") else ""
