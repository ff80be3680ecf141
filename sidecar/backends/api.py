"""What the shell asks of every kind of backend, and what passes between a backend, a front and the shell.

A front makes a `Ticket` with the request's bytes; the core decides; the backend that is told to run it delivers
`Reply` after `Reply` into the ticket, and posts what the core must know. Tokens never enter the core.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from time import monotonic_ns
from typing import Any, Protocol

from sidecar.backends import faults
from sidecar.backends.buffers import REPLY_BYTES, AnswerBuffers
from sidecar.backends.triton import wire
from sidecar.core.effects import Dispatch, Load, Settle
from sidecar.core.enums import Fault
from sidecar.core.events import Event

WRITE_BYTES = 64 << 10
"""Of an answer that a front writes at once; what it has taken counts as waiting until it comes for more."""


class Prompt(Enum):
    """What a request may ask with."""

    TEXT = "text"
    TOKENS = "tokens"


@dataclass(frozen=True, slots=True)
class HttpForm:
    """A request for an engine's OpenAI API: its JSON body around the model's name, which is put in at dispatch.

    `before` and `after` are the body up to and behind that JSON string. `model` is what the client wrote there, and
    the answer says again; `streams` says that the body asks for events.
    """

    path: str
    before: bytes
    after: bytes
    model: str
    streams: bool


Form = bytes | HttpForm
"""A request as one kind of model takes it: an HTTP body, or bytes that only that kind reads. Bytes for a model that is
native to KServe are a serialized `ModelInferRequest`.
"""


@dataclass(frozen=True, slots=True)
class HttpRejection:
    """An engine's own error, to reach a client of the same API unchanged."""

    status: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Payload:
    """A request in the engine's own form, without id and adapter: those are put in as bytes at dispatch.

    `head` is the request for engines of one `kind`; `forms` is the same for those of other kinds. `raw` says that its
    tensors travel in `raw_input_contents`, so that an appended input must too.
    """

    model: str
    head: Form
    raw: bool
    unary: bool
    metadata: tuple[tuple[str, str], ...] = ()
    prompt: Prompt | None = None
    """What a request of ours carries, so that each backend's own model for that answers; None for a client's own."""
    kind: str = "triton"
    forms: Mapping[str, Form] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of model that it can go to."""
        return (self.kind, *self.forms)

    def spent(self) -> Payload:
        """Return what is left to know of a request that is sent no more: everything but its bytes."""
        return replace(self, head=b"", forms=dict.fromkeys(self.forms, b""))

    def head_for(self, kind: str) -> Form:
        """Return the request as an engine of one of its kinds takes it."""
        return self.head if kind == self.kind else self.forms[kind]


class Reply:
    """One response of the engine, and whether it is the last.

    `raw` is what the reader of the model's kind reads. Of a model that is native to an API it is what a client of that
    API gets: for OpenAI the body, or one event of a stream; for KServe a serialized `ModelInferResponse` where the
    request is `unary`, else a `ModelStreamInferResponse` that says by `triton_final_response` whether it is the last.

    `message` is the parsed `ModelInferResponse`, for KServe only; where it is None, `raw` is parsed when it is needed.
    """

    __slots__ = ("_message", "final", "raw")

    def __init__(self, raw: bytes, message: Any, final: bool) -> None:
        self.raw = raw
        self.final = final
        self._message = message

    @property
    def message(self) -> Any:
        if self._message is None:
            self._message = wire.ModelStreamInferResponse.FromString(self.raw).infer_response
        return self._message


class Ticket:
    """One request between its front, the shell and its backend. All three live on one event loop.

    The engine's answer is taken at the engine's pace and waits here for its client, as far as `buffers` allow.
    """

    __slots__ = (
        "_buffers",
        "_held_bytes",
        "_is_dropped",
        "_reader",
        "_room",
        "_taken_bytes",
        "behind_since_ns",
        "blocked_since_ns",
        "came",
        "client_id",
        "dispatch",
        "payload",
        "rejected_with",
        "replies",
        "request",
        "settled",
        "settled_ns",
        "trip",
    )

    def __init__(self, request: int, payload: Payload, client_id: str, buffers: AnswerBuffers) -> None:
        self.request = request
        self.payload = payload
        self.client_id = client_id
        self.dispatch: Dispatch | None = None
        self.settled: Settle | None = None
        self.settled_ns = 0
        self.replies: deque[Reply] = deque()
        self.came: Reply | None = None
        """What has come of the answer last."""
        self.behind_since_ns: int | None = None
        """Since when the engine is not read from, because of what waits for the client."""
        self.blocked_since_ns: int | None = None
        """Since when the front has been waiting for its client to take a message."""
        self.rejected_with: Any = None
        """The gRPC status code of an engine's unary error, or an `HttpRejection`: it reaches the client unchanged."""
        self.trip: Any = None
        """What the router between replicas has to remember of it."""
        self._reader: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._buffers = buffers
        self._held_bytes = self._taken_bytes = 0
        self._is_dropped = False

    def dispatched(self, effect: Dispatch) -> None:
        """Be told that an engine is given the request now."""
        self.dispatch = effect

    def deliver(self, reply: Reply) -> None:
        """Hand a reply to the front; of one whose client has left nothing is kept."""
        if self._is_dropped:
            return
        self.came = reply
        self.replies.append(reply)
        self._count(len(reply.raw) + REPLY_BYTES)
        if self._reader is not None:
            self._wake()

    def settle(self, effect: Settle) -> None:
        self.settled = effect
        self.settled_ns = monotonic_ns()
        self.payload = self.payload.spent()  # the answer, or a refusal, may wait for its client for long
        self._wake()
        self._open_room()

    @property
    def has_room(self) -> bool:
        """Whether more of the answer may be taken. One reply may always wait, so that no answer ever stands still."""
        return not self._held_bytes or self._held_bytes < self._buffers.allowance()

    async def room(self) -> None:
        """Wait until another reply may be taken."""
        self.behind_since_ns = monotonic_ns()
        try:
            while not self.has_room and self.settled is None:
                self._room = asyncio.get_running_loop().create_future()
                await self._room
        finally:
            self.behind_since_ns = None

    def look(self) -> None:
        """Take more of the answer if half of what is allowed is free again, of its own bytes or of all."""
        if self._room is not None and 2 * self._held_bytes <= self._buffers.allowance():
            self._open_room()

    async def next(self) -> Reply | Settle:
        """Return the next reply; the ending once all replies are taken. What was taken before has been written."""
        self._count(-self._taken_bytes)
        self._taken_bytes = 0
        self.look()
        while True:
            if self.replies:
                return self._take()
            if self.settled is not None:
                self._open_room()
                return self.settled
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader

    def another(self) -> Reply | None:
        """Return a reply that has come already and is to be written along with the last; None to write first."""
        return self._take() if self.replies and self._taken_bytes < WRITE_BYTES else None

    def drop(self) -> None:
        """Free what waits: nobody takes it any more."""
        self._is_dropped = True
        self.replies.clear()
        self._count(-self._held_bytes)
        self._taken_bytes = 0
        self._open_room()

    def _take(self) -> Reply:
        reply = self.replies.popleft()
        self._taken_bytes += len(reply.raw) + REPLY_BYTES
        return reply

    def _count(self, size_bytes: int) -> None:
        self._held_bytes += size_bytes
        self._buffers.held_bytes += size_bytes

    def _wake(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None and not reader.done():
            reader.set_result(None)

    def _open_room(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        self._room = None


class Weights(Protocol):
    """A packed blob as a Load needs it: leased for as long as the Load is under way."""

    @property
    def path(self) -> str:
        """A path under which another process of this machine can map the blob."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and width of `[N, W]`."""

    @property
    def dtype(self) -> str: ...

    @property
    def size_bytes(self) -> int: ...

    @property
    def config(self) -> bytes:
        """The int32 rows of `lora_config`, `[N, 3]`, as bytes."""

    async def ready(self) -> None:
        """Return when the engine can read it. Raises SidecarError."""

    def release(self) -> None: ...


@dataclass(frozen=True)
class LoadResult:
    """How a load ended. `error` is None when it came through, else why not.

    `lost`: its wire broke. `unanswered`: the engine did not get to it in time, or it was never sent. Neither: the text
    is the engine's own, and `means` says what it stands for; None has it looked up in `backends.faults`.
    """

    error: str | None
    lost: bool = False
    unanswered: bool = False
    means: Fault | None = None

    @property
    def fault(self) -> Fault:
        """What the error of a load that did not come through means."""
        if self.lost:
            return Fault.LOST
        if self.unanswered:
            return Fault.NO_ANSWER
        return self.means or faults.classify(self.error or "")


class Backend(Protocol):
    """One engine endpoint. Every method returns at once; what comes of it is posted as an event."""

    id: str
    address: str

    @property
    def streams(self) -> bool:
        """Whether the engine answers token by token, as far as is known."""

    async def start(self, post: Callable[[Event], None]) -> None:
        """Begin to watch the engine; `BackendUp` is posted when it answers."""

    async def stop(self) -> None:
        """Cancel what runs and close."""

    def run(self, effect: Dispatch, ticket: Ticket, weights: Weights | None = None) -> None:
        """Send a request, its weights along with it if any are given; posts FirstToken, RunEnded, RunFailed."""

    def cancel(self, request: int, attempt: int) -> None:
        """Stop a run; its end is posted as usual."""

    def load(self, effect: Load, weights: Weights) -> None:
        """Load a packed adapter; posts LoadDone, LoadFailed."""

    def register_regions(self) -> None:
        """Register shared-memory regions anew, the clients' and ours; runs that follow wait for it.

        Nothing to do for an engine that has none.
        """

    def probe(self, within_s: float) -> None:
        """Find out within a time whether the engine lives; posts BackendProbed, unless it is lost meanwhile."""

    async def forget(self, key: str) -> None:
        """Return when the engine no longer refers to an adapter of the store, or is gone: its files or bytes go next.

        `key` is the packed key of files in a shared folder, or the name of a blob's shared-memory region.
        """

    async def call(self, verb: str, request: Any) -> Any:
        """Pass a KServe verb on as it is. Asked of engines only whose model is native to KServe.

        Raises grpc.aio.AioRpcError with the server's own status, UNIMPLEMENTED for a verb that it does not have.
        """

    def detail(self) -> str:
        """Say in a few words what the operator should know: how it was found, or why it is down."""
