"""The KServe v2 front: an unmodified Triton client changes its address, names an adapter and drops the weights.

Inference passes as bytes: a request is parsed to see what it asks, and sent on as it came with a fragment appended;
a response is the engine's own with the client's id appended, and on the last one where it came from.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2

from sidecar.backends import wire
from sidecar.backends.api import Reply, Ticket
from sidecar.config import Config
from sidecar.core.effects import Settle
from sidecar.core.words import Phase
from sidecar.errors import Reason, Refused, SidecarError
from sidecar.fronts import callers, kserve_request, relay
from sidecar.fronts.kserve_request import Asked
from sidecar.fronts.status import abort, status_of_ending
from sidecar.shell.gateway import Gateway

SERVICE = "inference.GRPCInferenceService"
PASSED_ON = ("ModelReady", "ServerMetadata", "ModelMetadata", "ModelConfig", "ModelStatistics")
REGIONS = ("SystemSharedMemoryRegister", "SystemSharedMemoryStatus", "SystemSharedMemoryUnregister")


def add_kserve(server: grpc.aio.Server, gateway: Gateway, config: Config) -> None:
    """Add the inference verbs and the read-only ones to a server."""
    front = KServe(gateway, config)
    handlers: dict[str, grpc.RpcMethodHandler] = {
        "ModelInfer": grpc.unary_unary_rpc_method_handler(front.infer),
        "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(front.stream_infer),
        "ServerLive": verb_handler("ServerLive", front.live),
        "ServerReady": verb_handler("ServerReady", front.ready),
    }
    handlers |= {verb: verb_handler(verb, passing(gateway, verb, everywhere=False)) for verb in PASSED_ON}
    handlers |= {verb: verb_handler(verb, passing(gateway, verb, everywhere=True)) for verb in REGIONS}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


def verb_handler(verb: str, handle: Callable[[Any, Any], Any]) -> grpc.RpcMethodHandler:
    """Return the handler of a unary verb with its messages parsed."""
    method = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name[verb]
    request, response = (getattr(service_pb2, kind.name) for kind in (method.input_type, method.output_type))
    return grpc.unary_unary_rpc_method_handler(
        handle, request_deserializer=request.FromString, response_serializer=response.SerializeToString
    )


def passing(gateway: Gateway, verb: str, everywhere: bool) -> Callable[[Any, Any], Any]:
    """Return a handler that passes a verb on to a backend that is up, or to all of them; the first's reply counts."""

    async def handle(request: Any, context: Any) -> Any:
        up = [backend for backend in gateway.state.backends.values() if backend.phase is Phase.UP]
        if not up:
            await abort(context, Refused(Reason.NO_BACKEND, f"{verb}: no backend is up", retry_after_s=1.0))
        chosen = up if everywhere else up[:1]
        calls = (gateway.backends[backend.id].call(verb, request) for backend in chosen)
        replies = await asyncio.gather(*calls, return_exceptions=True)
        for reply in replies:
            if isinstance(reply, grpc.aio.AioRpcError):
                await context.abort(reply.code(), reply.details() or "")
            elif isinstance(reply, BaseException):
                raise reply
        return replies[0]

    return handle


class KServe:
    """Inference for Triton's clients."""

    def __init__(self, gateway: Gateway, config: Config) -> None:
        self._gateway = gateway
        self._tenant_from = config.tenant_from
        self._hide_backend = config.hide_backend
        self._rules = kserve_request.Rules(config.legacy_task_ids, config.allow_client_lora)
        self._by_client: dict[tuple[str, str], Ticket] = {}
        """Live requests by connection and client's id, for `stop`."""

    async def live(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerLiveResponse(live=True)

    async def ready(self, request: Any, context: Any) -> Any:
        backends = self._gateway.state.backends.values()
        ready = not self._gateway.state.draining and any(backend.takes_requests for backend in backends)
        return service_pb2.ServerReadyResponse(ready=ready)

    # Unary.

    async def infer(self, raw: bytes, context: Any) -> bytes:
        """`ModelInfer`: the engine's own response, or its own error."""
        try:
            asked = self._read(raw, context, unary=True)
            if asked.stop:
                return self._stop(asked, context).SerializeToString()
            ticket = self._submit(asked, context)
        except SidecarError as error:
            await abort(context, error)
        written: list[bytes] = []

        async def write(reply: Reply) -> None:
            written.append(reply.raw + wire.response_fragment(asked.client_id, self._origin(ticket)))

        try:
            ending = await relay.relay(ticket, write)
            if ending is not None:
                await _abort_unary(context, ticket, ending)
            context.set_trailing_metadata(relay.origin_metadata(ticket, self._hide_backend))
            return written[0]
        finally:
            self._close(asked, ticket, context)

    def _read(self, raw: bytes, context: Any, unary: bool) -> Asked:
        return kserve_request.read(raw, unary, callers.metadata_of(context), self._rules)

    def _submit(self, asked: Asked, context: Any) -> Ticket:
        tenant = callers.tenant_of(context, self._tenant_from, {}, asked.facts.tenant)
        facts = kserve_request.with_deadline(asked.facts, callers.remaining_s(context), tenant)
        ticket = self._gateway.submit(facts, asked.payload, asked.client_id)
        if asked.client_id:
            self._by_client[context.peer(), asked.client_id] = ticket
        return ticket

    def _close(self, asked: Asked, ticket: Ticket, context: Any) -> None:
        key = (context.peer(), asked.client_id)
        if self._by_client.get(key) is ticket:
            del self._by_client[key]
        self._gateway.close(ticket)

    def _origin(self, ticket: Ticket) -> dict[str, str | int | float]:
        return relay.origin_parameters(ticket, self._hide_backend)

    def _stop(self, asked: Asked, context: Any) -> Any:
        """Cancel this client's request with that id, queued or running; an unknown id is no error, as in the engine."""
        if not asked.client_id:
            raise Refused(
                Reason.INVALID_REQUEST, "Trying to stop a request but request ID is not provided; set the request's id"
            )
        ticket = self._by_client.get((context.peer(), asked.client_id))
        if ticket is not None:
            self._gateway.cancel(ticket)
        response = wire.ModelInferResponse(model_name=asked.model, id=asked.client_id)
        response.parameters[wire.FINAL].bool_param = True
        return response

    # Streams.

    async def stream_infer(self, requests: AsyncIterator[bytes], context: Any) -> None:
        """`ModelStreamInfer`: any number of requests at once on one stream, each answered as it goes."""
        writing = asyncio.Lock()
        running: set[asyncio.Task[None]] = set()

        async def write(raw: bytes) -> None:
            async with writing:
                await context.write(raw)

        try:
            async for raw in requests:
                task = asyncio.create_task(self._answer_in_stream(raw, context, write))
                running.add(task)
                task.add_done_callback(running.discard)
            await asyncio.gather(*running)
        finally:
            for task in running:
                task.cancel()

    async def _answer_in_stream(self, raw: bytes, context: Any, write: Callable[[bytes], Any]) -> None:
        """Answer one request of a stream. Its errors are messages: the stream stays open for the others."""
        client_id = ""
        try:
            client_id = _id_of(raw)
            asked = self._read(raw, context, unary=False)
            if asked.stop:
                response = wire.ModelStreamInferResponse(infer_response=self._stop(asked, context))
                await write(response.SerializeToString())
                return
            ticket = self._submit(asked, context)
        except SidecarError as error:
            await write(_stream_error(client_id, error.reason, error.message))
            return
        try:
            await self._relay_in_stream(asked, ticket, write)
        finally:
            self._close(asked, ticket, context)

    async def _relay_in_stream(self, asked: Asked, ticket: Ticket, write: Callable[[bytes], Any]) -> None:
        only_id = wire.in_stream_response(wire.response_fragment(asked.client_id))

        async def pass_on(reply: Reply) -> None:
            if not reply.final:
                await write(reply.raw + only_id)
            elif reply.message.outputs or asked.wants_empty_final:
                fragment = wire.response_fragment(asked.client_id, self._origin(ticket))
                await write(reply.raw + wire.in_stream_response(fragment))

        ending = await relay.relay(ticket, pass_on)
        if ending is not None and ending.reason is not None:
            await write(_stream_error(asked.client_id, ending.reason, ending.message))


def _id_of(raw: bytes) -> str:
    """Return a request's id, "" if not even that can be read."""
    try:
        return str(wire.ModelInferRequest.FromString(raw).id)
    except Exception:  # noqa: BLE001 — protobuf's own classes; reading the request again says what is wrong with it
        return ""


def _stream_error(client_id: str, reason: Reason, message: str) -> bytes:
    """Return an error in the form of a stream: `[REASON] message`, the client's id, the final flag."""
    response = wire.ModelStreamInferResponse(error_message=f"[{reason.value}] {message}")
    response.infer_response.id = client_id
    response.infer_response.parameters[wire.FINAL].bool_param = True
    return bytes(response.SerializeToString())


async def _abort_unary(context: Any, ticket: Ticket, ending: Settle) -> None:
    """End a unary call; an engine's own rejection keeps the engine's own code."""
    code, message, metadata = status_of_ending(ending)
    if ending.reason is Reason.BACKEND_REJECTED and ticket.rejected_with is not None:
        code = ticket.rejected_with
    await context.abort(code, message, metadata)
