"""Run a request on a vLLM engine: send an HTTP body, pass on events or one body as bytes."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import httpx

from sidecar.backends.api import HttpForm, HttpRejection, Reply, Ticket
from sidecar.backends.quoting import wrote_in
from sidecar.backends.vllm.api import epoch_header, fault_of, message_of
from sidecar.core.effects import Dispatch
from sidecar.core.enums import Fault
from sidecar.core.events import Event, FirstToken, RunEnded, RunFailed

END_OF_EVENT = b"\n\n"
DONE = b"data: [DONE]"
ERROR = b'data: {"error"'
CHOICES = b'"choices":[{'
ROLE, NO_CONTENT, ROLE_ONLY = b'"delta":{"role":', b'"content":""', b'"delta":{"role":"assistant"}'
ENDS_ONLY = b'"text":"","finish_reason":"', b'"delta":{},"finish_reason":"'
"""How the Rust front end begins a chat and ends a choice, without a token. The Python server ends it with the last one,
and puts "logprobs" in between.
"""
IDS = b'"token_ids":['
USAGE = b'"usage":{'
# None of these can occur in the text of an answer: there a backslash precedes every quote.
_index = re.compile(rb'"choices":\[\{"index":(\d+)').search
_completion = re.compile(rb'"completion_tokens"\s*:\s*(\d+)').search
HEADERS = {"content-type": "application/json"}
PIECE_BYTES = 1 << 18
"""Bytes that are copied and sent at once. A larger body is sent in pieces, between which other tasks run."""


class VllmRun:
    """A run. `name` is the engine's name for the model; `heard` and `broken` are as for Triton's runs."""

    def __init__(
        self,
        effect: Dispatch,
        ticket: Ticket,
        form: HttpForm,
        name: str,
        post: Callable[[Event], None],
        heard: Callable[[int, int], None],
        broken: Callable[[str, bool], Awaitable[bool]],
    ) -> None:
        self.effect = effect
        self.ticket = ticket
        self.tokens = 0
        self.cancelled = False
        self.waits_for_client = False
        self._form = form
        self._name = name
        self._post = post
        self._heard = heard
        self._broken = broken
        self._work: asyncio.Task[Any] | None = None
        self._has_begun = False
        self._count = StreamedTokens()
        self._model_fields = _named(name), _named(form.model)

    def cancel(self) -> None:
        """Cancel the run: vLLM frees its seat when the connection is closed."""
        self.cancelled = True
        if self._work is not None:
            self._work.cancel()

    async def go(self, client: httpx.AsyncClient) -> None:
        """Send the request and deliver the answer. Raises CancelledError if it is cancelled."""
        self._work = asyncio.current_task()
        if self.cancelled:
            raise asyncio.CancelledError
        body = (self._form.before, json.dumps(self._name).encode(), self._form.after)
        size_bytes = sum(map(len, body))
        content = b"".join(body) if size_bytes <= PIECE_BYTES else _in_pieces(body)
        headers = HEADERS | {"content-length": str(size_bytes)} | epoch_header(self.effect.epoch)
        try:
            async with client.stream("POST", self._form.path, content=content, headers=headers) as reply:
                if reply.status_code != httpx.codes.OK:
                    await self._rejected(reply.status_code, await reply.aread())
                elif self._form.streams:
                    await self._events(reply)
                else:
                    self._whole(await reply.aread())
        except httpx.HTTPError as error:
            await self._wire_broke(str(error) or type(error).__name__)

    async def _events(self, reply: httpx.Response) -> None:
        async for event in _split(reply.aiter_raw()):
            if event.startswith(ERROR):
                await self._refused(httpx.codes.INTERNAL_SERVER_ERROR, message_of(event.removeprefix(b"data: ")))
                return
            final = event.startswith(DONE)
            self._take(event, final)
            if final:
                self._post(RunEnded(self.effect.request, self.effect.attempt, self.tokens))
                return
            if not self.ticket.has_room:
                await self._room()
        await self._wire_broke("the stream ended before the answer was complete")

    def _take(self, event: bytes, final: bool) -> None:
        """Deliver an event."""
        choice = event.find(CHOICES)
        is_first = choice >= 0 and not self._has_begun
        if choice >= 0:
            tokens = self._count.added(event, choice)
            self._has_begun = True
            self.tokens += tokens
        else:
            tokens = self._corrected(event)
        self._heard(self.effect.request, tokens)
        self.ticket.deliver(Reply(event.replace(*self._model_fields, 1) + END_OF_EVENT, None, final))
        if is_first:
            self._post(FirstToken(self.effect.request, self.effect.attempt))

    def _corrected(self, event: bytes) -> int:
        """Correct the count by the engine's total, if the event has it; return how many tokens were missing."""
        total = completion_tokens(event)
        if total is None:
            return 0
        missed = max(0, total - self.tokens)
        self.tokens = total
        return missed

    def _whole(self, body: bytes) -> None:
        found = completion_tokens(body)
        self.tokens = 1 if found is None else found
        self._heard(self.effect.request, self.tokens)
        self.ticket.deliver(Reply(body.replace(*self._model_fields, 1), None, True))
        self._post(RunEnded(self.effect.request, self.effect.attempt, self.tokens))

    async def _room(self) -> None:
        """Wait for the client. Nothing is read meanwhile, so the engine cannot be blamed for silence."""
        self.waits_for_client = True
        await self.ticket.room()
        self.waits_for_client = False
        self._heard(self.effect.request, 0)

    async def _rejected(self, status: int, body: bytes) -> None:
        self._heard(self.effect.request, 0)
        text = message_of(body)
        self.ticket.rejected_with = HttpRejection(status, body.replace(self._name.encode(), self._form.model.encode()))
        await self._refused(status, text)

    async def _refused(self, status: int, text: str) -> None:
        """End by an error of the server's. One of its own making that is not known may be the engine's end."""
        fault = fault_of(status, text, wrote_in(self._form))
        await self._failed(fault, text, in_doubt=status >= httpx.codes.INTERNAL_SERVER_ERROR)

    async def _wire_broke(self, text: str) -> None:
        await self._failed(Fault.LOST, text, in_doubt=True)

    async def _failed(self, fault: Fault, text: str, in_doubt: bool) -> None:
        if in_doubt and await self._broken(text, self._has_begun):
            return  # the backend's loss ends this run, too
        self._post(RunFailed(self.effect.request, self.effect.attempt, fault, text, self.tokens))


async def _in_pieces(parts: Iterable[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        for begin in range(0, len(part), PIECE_BYTES):
            yield part[begin : begin + PIECE_BYTES]


async def _split(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the events of a stream, without the empty line after each."""
    rest = b""
    async for piece in pieces:
        *events, rest = (rest + piece).split(END_OF_EVENT)
        for event in events:
            if event:
                yield event


def _named(model: str) -> bytes:
    """Return the field with the answering model's name, as vLLM writes it."""
    return b'"model":' + json.dumps(model, ensure_ascii=False).encode()


class StreamedTokens:
    """Counts the tokens in events. vLLM puts several into one when it lags, by its stream_interval, or when it guesses.

    It counts token ids if the request asked for them, else reads the usage if every event has one, else counts one for
    each event except those that only begin a chat or only end a choice. An event without text may well be a token: one
    that is half a letter.
    """

    def __init__(self) -> None:
        self._has_some = False
        self._by_choice: dict[bytes, int] = {}

    def added(self, event: bytes, choice: int) -> int:
        """Return the number of tokens in an event whose choice begins at this index."""
        begin = event.find(IDS, choice)
        if begin >= 0:
            return _ids_in(event, begin + len(IDS))
        if event.find(USAGE, choice) >= 0:
            return self._used(event)
        if not self._has_some and ROLE in event and NO_CONTENT in event:
            return 0
        if event.find(ROLE_ONLY, choice) >= 0 or any(event.find(end, choice) >= 0 for end in ENDS_ONLY):
            return 0
        self._has_some = True
        return 1

    def _used(self, event: bytes) -> int:
        """Return by how much the usage of the event's choice has grown: each choice has its own."""
        total, choice = completion_tokens(event), _index(event)
        if total is None or choice is None:
            return 1
        before = self._by_choice.get(choice[1], 0)
        self._by_choice[choice[1]] = total
        return max(0, total - before)


def _ids_in(event: bytes, begin: int) -> int:
    end = event.find(b"]", begin)
    return event.count(b",", begin, end) + 1 if end > begin else 0


def completion_tokens(body: bytes) -> int | None:
    """Return the number of tokens in an answer's usage; None if it has none."""
    begin = body.rfind(b'"usage"')
    found = _completion(body, begin) if begin >= 0 else None
    return None if found is None else int(found[1])
