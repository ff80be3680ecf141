"""Send one answer to its client: the engine's own bytes, or a response made from its text.

The status is sent with the first bytes. An error before that has a status of its own, and the headers hold what is
known of the answer's origin. A later error is the last event of the stream.

Merge the answers to a list of prompts into the one answer that an engine would give to the list.

Each prompt was a request of its own, perhaps at another engine. Choices are numbered prompt by prompt; all get the
first answer's id and time; token counts are added up.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from time import monotonic_ns
from typing import Any, Protocol

from starlette.types import Receive, Send

from sidecar.backends.api import Reply, Ticket
from sidecar.backends.kind import Native
from sidecar.backends.registry import model_kind
from sidecar.core.effects import Settle
from sidecar.errors import Reason, Refused
from sidecar.fronts import relay
from sidecar.fronts.intake import BodyArrival
from sidecar.fronts.openai.candidates import Destination
from sidecar.fronts.openai.errors import Failure, anthropic_error, failure_of_ending, without_retry
from sidecar.fronts.openai.request import OpenAiRequest
from sidecar.fronts.openai.text_answers import DONE, PassedOn, TextAnswer
from sidecar.shell.gateway import Gateway
from sidecar.tasks import ended
from sidecar.telling.endings import Voice, message_of

Record = dict[str, Any]
BEGIN, END = b"data: ", b"\n\n"


class Merged:
    """The merged answer. `each` is the number of choices for each prompt."""

    def __init__(self, each: int) -> None:
        self._each = each
        self._head: Record = {}
        self._last: Record | None = None
        """A chunk with the counts of one answer; the sums go into it at the end."""
        self._usages: list[Mapping[str, Any]] = []

    def events(self, part: int, raw: bytes) -> bytes:
        """Return the events of one answer as events of the merged one, without token counts and the end."""
        return b"".join(self._event(part, event) for event in raw.split(END) if event and event + END != DONE)

    def _event(self, part: int, event: bytes) -> bytes:
        record = json.loads(event.removeprefix(BEGIN))
        if not record.get("choices"):
            self._last = record
            self._usages.append(record.get("usage") or {})
            return b""
        return BEGIN + _json(self._numbered(part, record)) + END

    def end(self) -> bytes:
        """Return the end of the stream, with the sum of the counts if the answers had any."""
        if self._last is None:
            return DONE
        return BEGIN + _json(self._last | self._head | {"usage": added_up(self._usages)}) + END + DONE

    def whole(self, answers: Sequence[bytes]) -> bytes:
        """Return answers that are not streamed, in the order of their prompts, as one."""
        records = [self._numbered(part, json.loads(answer)) for part, answer in enumerate(answers)]
        choices = [choice for record in records for choice in record["choices"]]
        usages = [record.get("usage") or {} for record in records]
        return _json(records[0] | {"choices": choices, "usage": added_up(usages) or None})

    def _numbered(self, part: int, record: Record) -> Record:
        if not self._head:
            self._head = {name: record[name] for name in ("id", "created") if name in record}
        for choice in record["choices"]:
            choice["index"] += part * self._each
        return record | self._head


def added_up(usages: Sequence[Mapping[str, Any]]) -> Record:
    """Return the sums of counts by name, details within details; a count that no answer has is null.

    A flag of one answer, as that a count is an estimate, is one of the sum.
    """
    total: Record = {}
    for usage in usages:
        for name, value in usage.items():
            total.setdefault(name, None)
            if isinstance(value, Mapping):
                total[name] = added_up([total[name] or {}, value])
            elif isinstance(value, bool):
                total[name] = value or bool(total[name])
            elif value is not None:
                total[name] = (total[name] or 0) + value
    return total


def _json(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


JSON = (b"content-type", b"application/json")
EVENTS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)

DIGITS_MAX = 18
"""Of a content-length; nobody sends a longer body."""

Headers = Iterable[tuple[bytes, bytes]]


class ClientLeft(Exception):
    """The client closed its connection before its request had come in full."""


class TooLong(Refused):
    """The body is longer than `listeners.http.body_bytes_max`."""


class _Ended(Exception):
    """A request ended before its answer was complete."""

    def __init__(self, ending: Settle, ticket: Ticket) -> None:
        super().__init__(message_of(ending, Voice.CLIENT))
        self.ending = ending
        self.ticket = ticket


class _Answer(Protocol):
    """Turns replies into a response; `ended` when it is complete."""

    ended: bool

    def take(self, reply: Reply) -> bytes: ...

    def end(self, prompt_tokens: int | None) -> bytes: ...


def declared_size(headers: Headers, size_bytes_max: int) -> int:
    """Return a body's size in bytes by its headers; `size_bytes_max` if they do not say. Raises TooLong."""
    length = next((value for name, value in headers if name == b"content-length"), b"")
    if not length.isdigit():
        return size_bytes_max
    if len(length) > DIGITS_MAX:  # Python reads no number of any length
        _check_size(size_bytes_max + 1, size_bytes_max)
    _check_size(int(length), size_bytes_max)
    return int(length)


async def body_of(receive: Receive, size_bytes_max: int, arrival: BodyArrival) -> tuple[list[bytes], int]:
    """Return a request's body in the pieces in which it came, and its size in bytes. Raises TooLong, ClientLeft."""
    pieces: list[bytes] = []
    size_bytes, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        pieces.append(message["body"])
        size_bytes += len(message["body"])
        _check_size(size_bytes, size_bytes_max)
        arrival.count(len(message["body"]))
        more = message["more_body"]
    arrival.has_come()
    return pieces, size_bytes


def _check_size(size_bytes: int, size_bytes_max: int) -> None:
    if size_bytes > size_bytes_max:
        raise TooLong(
            Reason.INVALID_REQUEST,
            f"the body is longer than {size_bytes_max} bytes; send less, or raise listeners.http.body_bytes_max",
        )


async def send_failure(send: Send, failed: Failure, request_id: str = "", origin: Headers = ()) -> None:
    """Send a response that is complete, as errors are."""
    length = (b"content-length", str(len(failed.body)).encode())
    kind = [(b"content-type", failed.media_type)] if failed.media_type else []
    headers = [*kind, length, *failed.headers, *request_id_header(request_id), *origin]
    await send({"type": "http.response.start", "status": failed.status, "headers": headers})
    await send({"type": "http.response.body", "body": failed.body, "more_body": False})


def request_id_header(request_id: str) -> Headers:
    return ((b"x-request-id", request_id.encode()),) if request_id else ()


class Answering:
    """Relay the replies of one ticket, or merge those of several, one for each prompt of a list."""

    def __init__(
        self,
        gateway: Gateway,
        requests: Sequence[tuple[OpenAiRequest, Destination]],
        tickets: Sequence[Ticket],
        hide_backend: bool,
        limits: Headers = (),
    ) -> None:
        self._limits = limits
        self._gateway = gateway
        self._requests = requests
        self._asked, self._destination = requests[0]
        self._tickets = tickets
        self._hide_backend = hide_backend
        self._request_id = tickets[0].client_id
        self._has_begun = False

    async def serve(self, receive: Receive, send: Send) -> None:
        """Answer to the end, or until the client leaves: then all that is queued or running is cancelled."""
        leaving = asyncio.create_task(self._cancel_when_left(receive))
        try:
            async with relay.unless_stalled(self._tickets) as patience:
                try:
                    await self._relay(send)
                except _Ended as early:
                    await self._end_early(send, early.ending, early.ticket)
        except TimeoutError:
            if not patience.expired():
                raise
            # The client reads nothing: returning in the middle of a response closes its connection.
        finally:
            await ended(leaving)

    def head(self) -> Headers:
        """Return the headers of the answer that are ours, once an engine has the request."""
        return [*request_id_header(self._request_id), *self._origin()]

    async def _cancel_when_left(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        for ticket in reversed(self._tickets):  # queued ones first, or they would get the seats that become free
            self._gateway.cancel(ticket)

    async def _relay(self, send: Send) -> None:
        if len(self._tickets) > 1:
            await self._relay_all(send)
            return
        async for body, is_last in self._pieces(0):
            if body or self._asked.streams:
                await self._write(send, body, is_last)

    async def _relay_all(self, send: Send) -> None:
        """Relay the answers to several prompts. They are one request: the first that ends early ends all."""
        merged, writing = Merged(self._asked.answers), asyncio.Lock()

        async def relay_one(part: int) -> bytes:
            answer = b""
            async for body, _ in self._pieces(part):
                if not self._asked.streams:
                    answer = body
                elif events := merged.events(part, body):
                    async with writing:
                        await self._write(send, events, False)
            return answer

        relays = [asyncio.create_task(relay_one(part)) for part in range(len(self._tickets))]
        try:
            answers = await asyncio.gather(*relays)
        finally:
            await ended(*relays)
        await self._write(send, merged.end() if self._asked.streams else merged.whole(answers), True)

    async def _pieces(self, part: int) -> AsyncIterator[tuple[bytes, bool]]:
        """Yield the bytes to write of one ticket's answer, and True with the last.

        Replies that came during a write go together. Raises _Ended if the answer is incomplete.
        """
        ticket = self._tickets[part]
        answer: _Answer | None = None
        while answer is None or not answer.ended:
            item = await ticket.next()
            if isinstance(item, Settle):
                raise _Ended(item, ticket)
            if answer is None:
                answer = self._new_answer(part)
            pieces = [answer.take(item)]
            while not answer.ended and (more := ticket.another()) is not None:
                pieces.append(answer.take(more))
            if answer.ended:
                if ticket.counting is not None and (self._asked.wants_usage or not self._asked.streams):
                    await asyncio.wait([ticket.counting])
                pieces.append(answer.end(ticket.prompt_tokens))
            yield pieces[0] if len(pieces) == 1 else b"".join(pieces), answer.ended

    def _new_answer(self, part: int) -> _Answer:
        (asked, destination), ticket = self._requests[part], self._tickets[part]
        dispatch = ticket.dispatch
        assert dispatch is not None
        model = model_kind(self._gateway.fleet.kind_of(dispatch.backend))
        if model.native is Native.OPENAI:
            return PassedOn()
        assert destination.text is not None, "a request without a text for an engine that takes nothing else"
        reader = relay.reader_of(self._gateway, ticket, is_text=True)
        streams = self._gateway.fleet.streams(dispatch.backend)
        return TextAnswer(asked, destination.text, streams, reader, ticket.length_max)

    async def _write(self, send: Send, body: bytes, ended: bool) -> None:
        self._blocked(monotonic_ns())
        if not self._has_begun:
            self._has_begun = True
            length = (b"content-length", str(len(body)).encode())
            kind = EVENTS if self._asked.streams else (JSON, length)
            await send({"type": "http.response.start", "status": 200, "headers": [*kind, *self.head()]})
        if body or ended:
            await send({"type": "http.response.body", "body": body, "more_body": not ended})
        self._blocked(None)

    def _blocked(self, since_ns: int | None) -> None:
        for ticket in self._tickets:
            ticket.blocked_since_ns = since_ns

    async def _end_early(self, send: Send, ending: Settle, ticket: Ticket) -> None:
        """Report why there is no answer, or no more of it."""
        if ending.reason is None:
            await self._write(send, b"", True)
            return
        failed = failure_of_ending(ending, ticket, Voice.of_clients(self._hide_backend))
        if not self._has_begun:
            if any(other.dispatch is not None for other in self._tickets if other is not ticket):
                failed = without_retry(failed)
            await send_failure(send, failed, self._request_id, self._origin())
        else:
            row = self._asked.row
            body = anthropic_error(failed.body) if row.is_anthropics else failed.body
            await self._write(send, row.error_event(body.replace(b"\n", b" ")), True)

    def _origin(self) -> Headers:
        yield from self._limits
        for name, value in relay.origin_of_all(self._tickets, self._hide_backend).items():
            if value != "":
                yield b"x-" + name.replace("_", "-").encode(), str(value).encode("latin-1", "replace")
        ran = [ticket.dispatch.backend for ticket in self._tickets if ticket.dispatch is not None]
        models = (model_kind(self._gateway.fleet.kind_of(backend)) for backend in ran)
        length = self._destination.length
        if any(ticket.length_max is not None for ticket in self._tickets):
            return  # told already
        if length is not None or (not self._asked.has_length and any(model.long_by_default for model in models)):
            length_max = self._destination.length_max if length is None else length
            yield b"x-lora-max-tokens", b"context" if length_max is None else str(length_max).encode()
