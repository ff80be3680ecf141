"""The protocol that every backend implements, and the values passed between backends, fronts and the shell.

A front makes a `Ticket` with the request's bytes, and the core decides. The backend that runs the request delivers each
`Reply` to the ticket, and posts the events that the core needs. Tokens never enter the core.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from time import monotonic_ns
from typing import Any, Protocol

from policies.record import record
from sidecar.backends import faults, wire
from sidecar.backends.buffers import REPLY_BYTES, AnswerBuffers
from sidecar.backends.http_client import Answer, Request
from sidecar.core.effects import Dispatch, Load, Settle
from sidecar.core.enums import Fault
from sidecar.core.events import Event

UNTOLD = -1
"""The number of requests of ours of which the core hears nothing."""
WEIGHTS_ID = "lora-sidecar-weights"
"""Its id at engines that see one: `weights_check` is what asks so."""
WRITE_BYTES = 64 << 10
"""Bytes of an answer that a front writes at once. They count as waiting until it asks for more."""


class Prompt(Enum):
    """The kinds of prompt."""

    TEXT = "text"
    TOKENS = "tokens"


@record(frozen=True, slots=True)
class HttpForm:
    """A request for an engine's OpenAI API: its JSON body around the model's name, which is added at dispatch.

    `before` and `after` are the body's bytes before and after that JSON string. `model` is the client's own name for
    it, which the answer repeats. `streams` says that the body asks for events.
    """

    path: str
    before: bytes
    after: bytes
    model: str
    streams: bool


Form = bytes | HttpForm
"""A request as one kind of model takes it: an HTTP body, or bytes that only that kind reads. For a model that is native
to KServe the bytes are a serialized `ModelInferRequest`.
"""


@record(frozen=True, slots=True)
class HttpRejection:
    """An engine's own error, passed unchanged to a client of the same API."""

    status: int
    body: bytes


@record(frozen=True, slots=True)
class Whole:
    """What a KServe request for a whole answer says of the tokens in it.

    The prompt's `prompt_tokens` are in it, too, unless it `excludes` them; None leaves that to the model. It is without
    inputs of its own for that if the engine `may_ask` be asked to count.
    """

    excludes: bool | None = True
    prompt_tokens: int = 0
    rows: int = 1
    may_ask: bool = True


@record(frozen=True, slots=True)
class Payload:
    """A request in the engine's form, without id and adapter: these are added as bytes at dispatch.

    `head` is the request for models of `kind`; `forms` has it for models of other kinds. With `raw` its tensors are in
    `raw_input_contents`, and an added input must be there, too.
    """

    model: str
    head: Form
    raw: bool
    unary: bool
    metadata: tuple[tuple[str, str], ...] = ()
    prompt: Prompt | None = None
    """The prompt of a request of ours, by which each backend picks its model; None for a client's own request."""
    kind: str = "triton"
    forms: Mapping[str, Form] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    """Those that a client's own KServe request lists; () for all."""
    whole: Whole | None = None
    """None for a request that streams, and for one of ours that streams wherever its model can."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of model that it is written for."""
        return (self.kind, *self.forms)

    def spent(self) -> Payload:
        """Return the payload without its bytes, for a request that will not be sent again."""
        if not self.head and not self.forms:
            return self
        forms: dict[str, Form] = dict.fromkeys(self.forms, b"")
        return replace(self, head=b"", forms=forms)

    def is_whole(self, kind: str) -> bool:
        """Return True if a model of that kind is asked for the whole answer at once."""
        form = self.forms.get(kind, self.head)
        return not form.streams if isinstance(form, HttpForm) else self.unary or self.whole is not None

    def head_for(self, kind: str) -> Form:
        """Return the request for one of its kinds of model. Raises ValueError for another one."""
        if kind != self.kind and kind not in self.forms:
            raise ValueError(f"it is not written for a model of the kind {kind}, whose ModelKind may lack an asking")
        return self.head if kind == self.kind else self.forms[kind]


class Reply:
    """One response of the engine, `final` if it is the last.

    The reader of the model's kind reads `raw`. For a model that is native to an API, `raw` is what a client of that API
    gets. For OpenAI: the body, or one event of a stream. For KServe: a serialized `ModelInferResponse` if the request
    is `unary`, else a `ModelStreamInferResponse` whose parameter `triton_final_response` says whether it is the last.

    `message` is the parsed `ModelInferResponse`, for KServe only; without one, `raw` is parsed on demand.
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


class Charged(Protocol):
    """What a request costs its tenant."""

    def dispatched(self) -> None: ...

    def settle(self, output_tokens: int, ran: bool, prompt_tokens: int | None) -> None:
        """Charge what was taken. `prompt_tokens` are the prompt's by the engine's count, None if it does not tell."""


class Traced(Protocol):
    """The trace that a request belongs to."""

    @property
    def is_sampled(self) -> bool: ...

    def headers(self, leg: int) -> tuple[tuple[str, str], ...]:
        """Return the trace context to send along, as W3C's traceparent and tracestate; () if it is not sampled.

        `leg` numbers where the request is sent: an engine's attempt, or below zero another replica.
        """


class Carrier(Protocol):
    """Something else that takes a request to its engine, and the answer to its client: a proxy."""

    head: Callable[[], Iterable[tuple[bytes, bytes]]]
    """Returns the headers that the answer gets from us."""
    answer_id: str
    """The id that the answer to a KServe request has for its client."""

    @property
    def estimates(self) -> bool:
        """True if tokens that count for budgets may be estimated."""

    async def redirect(self, body: bytes) -> bool:
        """Send a client's request as it came to the http listener; return False if there is no way."""

    async def carry(self, request: Request) -> Answer | None:
        """Have a request sent, and return the answer as far as it comes here; None if it is to be sent from here.

        Raises WireError.
        """


class Ticket:
    """One request between its front, the shell and its backend, all on one event loop.

    The engine's answer is taken at the engine's pace and waits here for its client, within the limits of `buffers`.
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
        "caller",
        "came",
        "carrier",
        "client_id",
        "counting",
        "dispatch",
        "dispatched_ns",
        "facts",
        "is_whole",
        "length_max",
        "payload",
        "peer",
        "prompt_tokens",
        "rejected_with",
        "replies",
        "request",
        "reservation",
        "settled",
        "settled_ns",
        "tokens",
        "trace",
        "trip",
    )

    def __init__(self, request: int, payload: Payload, client_id: str, buffers: AnswerBuffers) -> None:
        self.request = request
        self.payload = payload
        self.client_id = client_id
        self.dispatch: Dispatch | None = None
        self.dispatched_ns = 0
        """When an engine got it last; 0 if none has it."""
        self.is_whole = False
        """The engine that it is sent to gives the whole answer at once, and tells nothing before."""
        self.settled: Settle | None = None
        self.settled_ns = 0
        self.replies: deque[Reply] = deque()
        self.came: Reply | None = None
        """The last reply that has come."""
        self.behind_since_ns: int | None = None
        """Since when the engine is not being read because too much waits for the client."""
        self.blocked_since_ns: int | None = None
        """Since when the front has been waiting for its client to read."""
        self.rejected_with: Any = None
        """The gRPC status code of an engine's unary error, or an `HttpRejection`: passed on to the client unchanged."""
        self.caller: Any = None
        """Who sent it (`access.Caller`); None for a request that another replica has passed on."""
        self.facts: Any = None
        """What it asks for (`shell.requests.RequestFacts`)."""
        self.peer = ""
        """The address from which it came to the first replica."""
        self.trace: Traced | None = None
        """None if nothing is traced."""
        self.prompt_tokens: int | None = None
        """The prompt's tokens as the engine or its tokenizer has counted them, once that is known."""
        self.counting: asyncio.Future[int] | None = None
        """Done when the tokenizer has counted the prompt, if it does."""
        self.reservation: Charged | None = None
        """What it has taken of its tenant's budgets until it is settled."""
        self.tokens = 0
        """The tokens in the replies that have come."""
        self.length_max: int | None = None
        """The longest answer that its engine can give, if it asks for a longer one."""
        self.carrier: Carrier | None = None
        """What takes it to its engine, if that is not this process."""
        self.trip: Any = None
        """The router's own record of the request, if there are other replicas."""
        self._reader: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._buffers = buffers
        self._held_bytes = self._taken_bytes = 0
        self._is_dropped = False

    def dispatched(self, effect: Dispatch | None) -> None:
        """Note that an engine gets the request, maybe again; None if another replica gives it, and tells which once."""
        self.dispatch, self.dispatched_ns = effect or self.dispatch, monotonic_ns()
        if self.reservation is not None:
            self.reservation.dispatched()

    def deliver(self, reply: Reply, tokens: int = 1) -> None:
        """Hand a reply with so many tokens to the front; it is dropped if the client has left."""
        self.tokens += tokens
        if self._is_dropped:
            return
        self.came = reply
        self.replies.append(reply)
        self._count(len(reply.raw) + REPLY_BYTES)
        if self._reader is not None:
            self._wake()

    def counted(self, prompt_tokens: int) -> None:
        """Note how many tokens the prompt has, unless the engine has told."""
        if self.prompt_tokens is None:
            self.prompt_tokens = prompt_tokens

    def settle(self, effect: Settle) -> None:
        self.settled = effect
        self.settled_ns = monotonic_ns()
        if self.reservation is not None:
            ran = self.dispatched_ns > 0
            self.reservation.settle(effect.output_tokens, ran, self.prompt_tokens)
        self.payload = self.payload.spent()  # the answer, or a refusal, may wait for its client for long
        self._wake()
        self._open_room()

    @property
    def has_room(self) -> bool:
        """True if more of the answer may be taken. One reply may always wait, so no answer stands still."""
        return not self._held_bytes or self._held_bytes < self._buffers.allowance()

    async def room(self) -> None:
        """Wait until another reply may be taken, or the request is settled."""
        self.behind_since_ns = monotonic_ns()
        try:
            while not self.has_room and self.settled is None:
                self._room = asyncio.get_running_loop().create_future()
                await self._room
        finally:
            self.behind_since_ns = None

    def resume(self) -> None:
        """Take more of the answer if half of the allowance is free again, through this answer or others."""
        if 2 * self._held_bytes <= self._buffers.allowance():
            self._open_room()

    async def next(self) -> Reply | Settle:
        """Return the next reply, or the ending after the last one. Replies taken before count as written."""
        self._count(-self._taken_bytes)
        self._taken_bytes = 0
        if self._room is not None:
            self.resume()
        while True:
            if self.replies:
                return self._take()
            if self.settled is not None:
                self._open_room()
                return self.settled
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader

    def another(self) -> Reply | None:
        """Return a reply that is already here, to be written with the last one; None if that must be written first."""
        return self._take() if self.replies and self._taken_bytes < WRITE_BYTES else None

    def drop(self) -> None:
        """Free the waiting replies: the client has left."""
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
    """An adapter's weights for a load. They are leased until `release`."""

    @property
    def path(self) -> str:
        """A path by which another process of this machine can map the blob, or the folder of files."""

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
        """Return once the engine can read them. Raises SidecarError."""

    def release(self, settled: bool = False) -> None:
        """End the lease. With `settled` the engine has answered, so that nothing reads the bytes any more."""


@dataclass(frozen=True)
class LoadResult:
    """How a load ended. `error` is None if it succeeded.

    With `lost` the connection broke. With `unanswered` the engine did not answer in time, or it was never sent. Else
    the text is the engine's own, and `means` is its fault; if that is None, `backends.faults` classifies the text.
    """

    error: str | None
    lost: bool = False
    unanswered: bool = False
    means: Fault | None = None

    @property
    def fault(self) -> Fault:
        """The fault of a load that failed."""
        if self.lost:
            return Fault.LOST
        if self.unanswered:
            return Fault.NO_ANSWER
        return self.means or faults.classify(self.error or "")


@record(frozen=True, slots=True)
class Wear:
    """The adapter versions that an engine keeps in memory until it is restarted, and how many it may keep.

    `limit` is None if nobody has said how many fit.
    """

    versions: int
    limit: int | None = None

    @property
    def is_out(self) -> bool:
        """True if the engine keeps as many as it may."""
        return self.limit is not None and self.versions >= self.limit


@record(frozen=True, slots=True)
class Signs:
    """The signs of life of an engine.

    `silent_s` is how long nothing has come from it; None if nothing has to: it runs nothing, or only what it answers
    all at once, and does not count its steps. `tokens_per_s` is by its own counter, None without one.
    """

    silent_s: float | None = None
    tokens_per_s: float | None = None


class Backend(Protocol):
    """One engine endpoint. Its synchronous methods return at once and post their results as events."""

    id: str
    address: str

    @property
    def streams(self) -> bool:
        """True if the engine answers token by token, as far as is known."""

    @property
    def is_encrypted(self) -> bool:
        """True if it is reached by TLS."""

    @property
    def wear(self) -> Wear | None:
        """What the engine keeps until it is restarted; None if it frees all that it loads, or is not reached."""

    async def files_removed(self) -> None:
        """Have the engine forget what it knows of files that an earlier process left and that are removed now."""

    def keeps_at_least(self, versions: int) -> None:
        """Count on from the number of versions that another replica has counted, for an engine that was its own."""

    def restarted(self) -> None:
        """Take an engine that was restarted on purpose for a new one: it is lost now, and reached again once it is up.

        A restart may be quicker than a look at the engine, which would not notice it then.
        """

    def signs(self) -> Signs:
        """Return how alive the engine is now."""

    async def start(self, post: Callable[[Event], None]) -> None:
        """Begin to watch the engine; posts `BackendUp` when it answers."""

    async def stop(self) -> None:
        """Cancel all runs and close."""

    def run(self, effect: Dispatch, ticket: Ticket, weights: Weights | None = None) -> None:
        """Send a request, with its weights if given; posts FirstToken, RunEnded or RunFailed."""

    async def ask(self, ticket: Ticket) -> None:
        """Put a request of ours to the base model that the core knows nothing of; its replies come by the ticket."""

    def cancel(self, request: int, attempt: int) -> None:
        """Cancel a run; its end is posted as usual."""

    def load(self, effect: Load, weights: Weights) -> None:
        """Load an adapter; posts LoadDone or LoadFailed."""

    def register_regions(self) -> None:
        """Register all shared-memory regions again, clients' and ours; later runs wait for that.

        Does nothing for an engine without regions.
        """

    def probe(self, within_s: float) -> None:
        """Find out within a time whether the engine lives; posts BackendProbed, unless it is lost meanwhile."""

    async def forget(self, key: str) -> None:
        """Return once the engine no longer refers to an adapter, or is gone. Then the adapter's bytes are freed.

        `key` is the packed key of files in a shared folder, or the name of a blob's shared-memory region.
        """

    @property
    def own_models(self) -> tuple[str, ...]:
        """KServe's names of the models that serve adapters, the one that takes text first; () if it has none."""

    async def call(self, verb: str, request: Any) -> Any:
        """Pass on a KServe verb unchanged. Called only for engines whose model is native to KServe.

        Raises grpc.aio.AioRpcError with the server's own status; UNIMPLEMENTED for a verb that it lacks.
        """

    def detail(self) -> str:
        """Return a phrase for operators: how the engine was found, or why it is down."""
