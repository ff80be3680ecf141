"""KServe's inference calls that Envoy asks about, answered by the same front as those of the data listener."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from time import monotonic
from typing import Any, NoReturn

import grpc
import grpc.aio

from sidecar.access.principal import Action, Purpose
from sidecar.backends import wire
from sidecar.backends.triton.framing import Compressed, Frames, framed
from sidecar.errors import Reason, Refused, SidecarError
from sidecar.fronts import callers
from sidecar.fronts.arriving import SMALL_BYTES
from sidecar.fronts.extproc import heads
from sidecar.fronts.extproc.call_exchange import UNARY, CallExchange
from sidecar.fronts.intake import Intake
from sidecar.fronts.kserve.infer import KServe
from sidecar.fronts.status import Metadata, status_of, status_of_error
from sidecar.proto import envoy_pb2 as envoy

HALF_CLOSED_S, REFUSED_S = 0.1, 2.0
"""How long after a stream's first message its client may take to say that there is no other: it delays those that go to
the data listener, and where none can it saves a client that is slow.
"""
UNITS_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
"""Of gRPC's timeouts."""
TIMEOUT = re.compile(r"[0-9]{1,8}[HMSmun]")
PUSHBACK_MS = 1000
"""When a stream that was refused may come again: its message does not say."""
OPEN = (
    "the gateway cannot carry a stream that stays open; close your side after the request, or have the operator set "
    "listeners.endpoint_picker.in_path_grpc, or one_request_per_stream there"
)
UNCOUNTED = (
    "the gateway cannot carry a stream whose tokens count for a budget, or whose engine has TLS; have the operator set "
    "listeners.endpoint_picker.in_path_grpc, or estimates_allowed there for budgets"
)
_OWN = frozenset(("te", "content-type", "grpc-timeout", "grpc-encoding", "grpc-accept-encoding", "user-agent"))
END: Any = grpc.aio.EOF  # type: ignore[attr-defined]


class MalformedHeader(Exception):
    """A header of a call is none of gRPC's."""


class CallEnded(Exception):
    """The call has ended with a status of the front's."""


class Redirected(Exception):
    """The call goes to the data listener."""


class Call:
    """A call as a servicer's context. `carrier` takes its request to an engine."""

    def __init__(self, exchange: CallExchange, first: envoy.ProcessingRequest, peer: str, intake: Intake) -> None:
        self.carrier = exchange
        self._exchange = exchange
        self._peer = heads.client_of(first) or peer
        self._intake = intake
        self._frames = Frames()
        self._messages: list[bytes] = []
        self._so_far: list[bytes] = []
        self._is_whole = self._is_stream = False
        self._trailing: Metadata = ()
        self._has_begun = False
        self._last = b""
        """The last message of the answer."""
        found = dict(heads.pairs(first.request_headers.headers))
        self._ends_s = _timeout_s(found.get("grpc-timeout", b"").decode("latin-1"))
        self._began_s = monotonic()
        self._metadata = tuple(
            (name, _binary(name, value) if name.endswith("-bin") else value.decode("latin-1"))
            for name, value in found.items()
            if name[:1] != ":" and name not in _OWN
        )

    # As a servicer's context.

    def invocation_metadata(self) -> Any:
        return self._metadata

    def peer(self) -> str:
        return f"ipv4:{self._peer}" if self._peer else "unix:"

    def auth_context(self) -> dict[str, Any]:
        return {}

    def time_remaining(self) -> float | None:
        return None if self._ends_s is None else max(0.0, self._began_s + self._ends_s - monotonic())

    def set_trailing_metadata(self, metadata: Metadata) -> None:
        self._trailing = metadata

    async def write(self, raw: bytes) -> None:
        """Write a message of the answer."""
        if not self._has_begun:
            self._has_begun = True
            start = [(b"content-type", b"application/grpc"), *self._exchange.head()]
            await self._exchange.send({"type": "http.response.start", "status": 200, "headers": start})
        self._last = raw
        await self._exchange.send({"type": "http.response.body", "body": framed(raw), "more_body": True})

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        """End the call with a status."""
        await self._exchange.end(code.value[0], details, _wire(trailing_metadata))
        raise CallEnded

    # Its messages.

    async def one(self) -> bytes:
        """Return the message of a unary call, or the first one. What follows that of a unary call is dropped."""
        async with self._intake.body(SMALL_BYTES) as arrival:
            while not self._messages:
                if self._is_whole:
                    raise Refused(Reason.INVALID_REQUEST, "the call ended without a message; send one")
                arrival.count(await self._read())
            arrival.has_come()
        if not self._is_stream:
            self._exchange.end_request()
        return self._messages.pop(0)

    async def messages(self, must_see: bool) -> AsyncIterator[bytes]:
        """Yield the message of a stream that is closed after it; raise Redirected for another, or if `must_see`."""
        self._is_stream = True
        first = await self.one()
        takes_one = self._exchange.takes_one
        with suppress(TimeoutError):
            async with asyncio.timeout(0 if takes_one else HALF_CLOSED_S if self._exchange.has_way else REFUSED_S):
                while not self._is_whole and not self._messages:
                    await self._read()
        if must_see or (not takes_one and (self._messages or not self._is_whole)):
            if await self._exchange.redirect(b"".join(self._so_far)):
                raise Redirected
            raise _refused(grpc.StatusCode.FAILED_PRECONDITION, UNCOUNTED if must_see else OPEN)
        if not self._is_whole:
            self._exchange.end_request()
        self._so_far.clear()
        yield first

    async def _read(self) -> int:
        """Take the next piece of the client's, and return its size in bytes."""
        piece = await self._exchange.receive()
        if piece["type"] == "http.disconnect":
            raise CallEnded
        self._so_far.append(piece["body"])
        self._is_whole = not piece["more_body"]
        try:
            self._messages += self._frames.take(piece["body"])
        except Compressed:
            raise _refused(grpc.StatusCode.UNIMPLEMENTED, "messages must not be compressed") from None
        if self._frames.size_bytes > (size_bytes_max := self._intake.limits.message_bytes):
            text = f"the message is longer than {size_bytes_max} bytes (listeners.data.message_bytes_max)"
            raise _refused(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        return len(piece["body"])

    async def ended(self) -> None:
        """End the call well, or by the error that its last message tells, if no message reaches the client."""
        told = wire.ModelStreamInferResponse.FromString(self._last) if self._is_stream else None
        if told is not None and told.error_message and not self._exchange.is_answered:
            code, text, metadata = _status_of(told)
            await self._exchange.end(code.value[0], text, _wire(metadata))
        else:
            await self._exchange.end(0, "", _wire(self._trailing))


async def answer(kserve: KServe, call: Call, method: str, hides_tokens: bool) -> None:
    """Answer a call as the data listener does."""
    callers.CALL_ID.set(callers.made_id())
    callers.HEADERS.set(call.invocation_metadata())
    gateway, told = kserve.gateway, kserve.hiding.context(call)
    try:
        purpose = Purpose(callers.id_of_call(call), Action.INFER)
        callers.CALLER.set(await gateway.access.identify(callers.presented(call, method), purpose))
        if not gateway.takes_requests:
            raise Refused(Reason.NO_BACKEND, "no engine is ready; try again later", retry_after_s=1.0)
        if method == UNARY:
            await call.write(await kserve.infer(await call.one(), told))
        else:
            budgets = gateway.access.budgets
            are_counted = budgets is not None and budgets.count_tokens and not call.carrier.estimates
            is_encrypted = any(backend.is_encrypted for backend in gateway.backends.values())
            must_see = (hides_tokens and are_counted) or is_encrypted
            await kserve.stream_infer(call.messages(must_see), told)
        await call.ended()
    except SidecarError as error:
        gateway.turned_away(callers.id_of_call(call), error, callers.CALLER.get(None))
        try:
            await told.abort(*status_of_error(error, callers.id_of_call(call)))
        except CallEnded:
            return
    except (CallEnded, Redirected):
        return
    except BaseExceptionGroup as errors:
        if errors.split((CallEnded, Redirected))[1] is not None:
            raise


def _refused(code: grpc.StatusCode, text: str) -> Refused:
    refused = Refused(Reason.INVALID_REQUEST, text)
    refused.code = code.name
    return refused


def _status_of(told: Any) -> tuple[grpc.StatusCode, str, Metadata]:
    """Return the status for a stream's message that says `[REASON] text`."""
    word, _, text = told.error_message.removeprefix("[").partition("] ")
    reason, request_id = Reason(word), told.infer_response.parameters["lora_request_id"].string_param
    return status_of(reason, text, {}, PUSHBACK_MS if reason.row.retryable else None, request_id=request_id)


def _timeout_s(text: str) -> float | None:
    """Return a timeout in seconds; None without one. Raises MalformedHeader."""
    if not text:
        return None
    if not TIMEOUT.fullmatch(text):
        raise MalformedHeader(f"grpc-timeout: {text[:20]!r} is not 1 to 8 digits and one of {', '.join(UNITS_S)}")
    return int(text[:-1]) * UNITS_S[text[-1]]


def _binary(name: str, value: bytes) -> bytes:
    """Return the value of a binary header. Raises MalformedHeader."""
    try:
        return base64.b64decode(value + b"==")
    except ValueError as error:
        raise MalformedHeader(f"{name[:40]}: {error}") from error


def _wire(metadata: Iterable[tuple[str, str | bytes]]) -> list[tuple[bytes, bytes]]:
    """Return metadata as HTTP/2 has it: a binary value in base64."""
    return [
        (name.encode(), base64.b64encode(value).rstrip(b"=") if isinstance(value, bytes) else value.encode())
        for name, value in metadata
    ]
