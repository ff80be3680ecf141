"""Run a request on an engine with an OpenAI API: send an HTTP body, pass on events or one body as bytes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from sidecar.backends.api import HttpRejection, Reply, Ticket
from sidecar.backends.faults import Wrote
from sidecar.backends.http_client import JSON, Answer, HttpClient, ProxyTimedOut, Unseen, WireError
from sidecar.backends.openai.events import (
    DONE,
    END_OF_EVENT,
    completion_tokens,
    message_of,
    prompt_bytes,
    prompt_tokens,
    reader_of,
    split,
    used,
)
from sidecar.backends.openai.naming import Naming
from sidecar.backends.openai.paths import AT_ENGINE, COMPLETIONS, ROWS
from sidecar.backends.openai.server import epoch_header
from sidecar.backends.quoting import wrote_in
from sidecar.backends.unseen import Follower, Read, first_token
from sidecar.core.effects import Dispatch
from sidecar.core.enums import Fault
from sidecar.core.events import Event, RunEnded, RunFailed

INPUT = "'input':"
"""How a server that validates by pydantic quotes what it was sent."""


class OpenAiRun:
    """A run. `naming` writes the adapter into the request, and takes it out of the answer.

    It calls `heard(request, tokens)` for each reply. `broken(text, begun)` returns True if the engine is gone,
    `fault_of(status, text, wrote)` tells what an error of the engine's means, and `failed` is told of it. `follower`
    follows an answer that goes past us.

    A server that takes no body larger than `body_bytes_max` may hang up under one: its refusal is lost then, and no
    other server is asked.
    """

    def __init__(
        self,
        effect: Dispatch,
        ticket: Ticket,
        naming: Naming,
        fault_of: Callable[[int, str, Wrote], Fault],
        post: Callable[[Event], None],
        heard: Callable[[int, int], None],
        broken: Callable[[str, bool], Awaitable[bool]],
        failed: Callable[[Fault], None],
        follower: Follower,
        body_bytes_max: int | None = None,
    ) -> None:
        self.effect = effect
        self.ticket = ticket
        self.tokens = 0
        self.cancelled = False
        self.waits_for_client = False
        self.goes_past = False
        self.run_id = naming.run_id
        self._naming = naming
        self._form = naming.form
        self._fault_of = fault_of
        self._post = post
        self._heard = heard
        self._broken = broken
        self._told = failed
        self._follower = follower
        self._body_bytes_max = body_bytes_max
        self._work: asyncio.Task[Any] | None = None
        self._has_begun = False
        self._row = AT_ENGINE.get(naming.form.path, ROWS[COMPLETIONS])
        self._reader = reader_of(self._row.grammar)
        self._is_named = self._row.grammar.is_named
        self._held = b""
        self._unseen: Unseen | None = None
        self._read = Read(len(DONE + END_OF_EVENT))

    def cancel(self) -> None:
        """Cancel the run: the engine frees its seat when the connection is closed.

        An answer that goes past us cannot be ended from here, and keeps its seat until its end is told.
        """
        self.cancelled = True
        if self._work is not None and not self.goes_past:
            self._work.cancel()

    async def go(self, client: HttpClient) -> None:
        """Send the request and deliver the answer. Raises CancelledError if it is cancelled."""
        self._work = asyncio.current_task()
        if self.cancelled:
            raise asyncio.CancelledError
        headers = JSON | epoch_header(self.effect.epoch)
        if self.ticket.trace is not None:
            headers |= dict(self.ticket.trace.headers(self.effect.attempt))
        request = client.request(self._form.path, headers, self._naming.body())
        carrier = self.ticket.carrier
        try:
            answer = None if carrier is None else await carrier.carry(request)
            if answer is None:
                answer = await client.send(request)
            try:
                await self._take_answer(answer)
            finally:
                answer.close()
        except ProxyTimedOut as error:
            record = {"message": str(error), "type": "timeout_error", "code": HTTPStatus.GATEWAY_TIMEOUT}
            told = json.dumps({"error": record}).encode()
            self.ticket.rejected_with = HttpRejection(HTTPStatus.GATEWAY_TIMEOUT, told)
            await self._failed(Fault.REJECTED, str(error), in_doubt=False)
        except WireError as error:
            text, size_bytes = str(error), request.size_bytes
            if self._body_bytes_max is not None and size_bytes > self._body_bytes_max and not self._has_begun:
                text = f"it takes no body of {size_bytes} bytes, usually {self._body_bytes_max} at most: {text}"
                await self._failed(Fault.REJECTED, text, in_doubt=True)
            else:
                await self._wire_broke(text)

    async def _take_answer(self, answer: Answer) -> None:
        if answer.is_unread:
            await self._unread(answer.status)
        elif answer.status != HTTPStatus.OK:
            await self._rejected(answer.status, await answer.read())
        elif self._form.streams:
            await self._events(answer)
        else:
            self._whole(await answer.read())

    async def _events(self, answer: Answer) -> None:
        unseen = self._unseen = answer.unseen
        try:
            await self._read_events(answer, unseen)
        finally:
            if unseen is not None and not self.goes_past:
                unseen.close()

    async def _read_events(self, answer: Answer, unseen: Unseen | None) -> None:
        reader, rest = self._reader, b""
        async for chunk in answer.chunks:
            events, rest = split(rest + chunk)
            for event in events:
                tokens = reader.tokens(event)
                if tokens is None and reader.is_error(event):
                    told = self._naming.rejection(HTTPStatus.INTERNAL_SERVER_ERROR, event.partition(b"data: ")[2])
                    await self._refused(HTTPStatus.INTERNAL_SERVER_ERROR, message_of(told.body))
                    return
                final = tokens is None and reader.is_final(event)
                self._take(event, tokens, final)
                if final:
                    self._post(RunEnded(self.effect.request, self.effect.attempt, self.tokens))
                    return
                if not self.ticket.has_room:
                    await self._room()
        if unseen is not None and unseen.goes_on:
            await self._watch(unseen)
        else:
            await self._wire_broke("the stream ended before the answer was complete")

    async def _watch(self, unseen: Unseen) -> None:
        """Follow an answer that goes past us."""
        self._has_begun = True
        await self._follower.follow(self, unseen, self._read, self._wire_broke)

    def _take(self, event: bytes, tokens: int | None, final: bool) -> None:
        """Deliver an event with so many tokens; None if it has none by its kind."""
        is_first = tokens is not None and not self._has_begun
        if self._unseen is not None:
            self._note_read(event, tokens)
        if tokens is None:
            tokens = self._corrected(event)
        else:
            self._has_begun = True
            self.tokens += tokens
        self._heard(self.effect.request, tokens)
        shown = self._naming.shown(event) + END_OF_EVENT
        if self._is_named:
            self._held += shown
            if not (self._has_begun or final):
                return  # what precedes the first token: the request may run again elsewhere
            shown, self._held = self._held, b""
        self.ticket.deliver(Reply(shown, None, final), tokens)
        if is_first:
            self._post(first_token(self, self._unseen))

    def _note_read(self, event: bytes, tokens: int | None) -> None:
        """Note an event of an answer whose rest may go past us."""
        self._read.size_bytes += len(event) + len(END_OF_EVENT)
        if tokens is not None:
            self._read.tokens = self.tokens + tokens
            self._read.token_bytes = len(event) - prompt_bytes(event) + len(END_OF_EVENT)

    def _corrected(self, event: bytes) -> int:
        """Correct the count by the engine's total, if the event has it; return how many tokens were missing."""
        prompt, total = self._usage(event)
        if total is None:
            return 0
        self.ticket.prompt_tokens = prompt or self.ticket.prompt_tokens
        missed = max(0, total - self.tokens)
        self.tokens = total
        return missed

    def _whole(self, body: bytes) -> None:
        prompt, found = self._usage(body)
        self.ticket.prompt_tokens = prompt or self.ticket.prompt_tokens
        self.tokens = int(self._row.generates) if found is None else found
        self._heard(self.effect.request, self.tokens)
        self.ticket.deliver(Reply(self._naming.shown(body), None, True), self.tokens)
        self._post(RunEnded(self.effect.request, self.effect.attempt, self.tokens))

    def _usage(self, raw: bytes) -> tuple[int | None, int | None]:
        """Return the tokens of the prompt and of the answer that an event, or a whole answer, tells."""
        return used(raw) if self._is_named else (prompt_tokens(raw), completion_tokens(raw))

    async def _room(self) -> None:
        """Wait for the client. Nothing is read meanwhile, so the engine cannot be blamed for silence."""
        self.waits_for_client = True
        await self.ticket.room()
        self.waits_for_client = False
        self._heard(self.effect.request, 0)

    async def _unread(self, status: int) -> None:
        """End by an error whose text cannot be read. Engines know every path: what is not found is a model."""
        self._heard(self.effect.request, 0)
        text = f"it answers {status}; the gateway's mode keeps the text of its error from the sidecar"
        faults: dict[int, Fault] = {HTTPStatus.NOT_FOUND: Fault.MISS, HTTPStatus.SERVICE_UNAVAILABLE: Fault.LOST}
        await self._failed(faults.get(status, Fault.REJECTED), text, in_doubt=status >= 500)

    async def _rejected(self, status: int, body: bytes) -> None:
        self._heard(self.effect.request, 0)
        text = message_of(body)
        self.ticket.rejected_with = self._naming.rejection(status, body)
        await self._refused(status, text)

    async def _refused(self, status: int, text: str) -> None:
        """End by an error of the server's. One of its own making that is not known may be the engine's end."""
        fault = self._fault_of(status, text, wrote_in(self._form))
        self._told(fault)
        is_unknown = fault is Fault.REJECTED and status >= HTTPStatus.INTERNAL_SERVER_ERROR
        await self._failed(fault, without_input(text), in_doubt=is_unknown or fault is Fault.LOST)

    async def _wire_broke(self, text: str) -> None:
        await self._failed(Fault.LOST, text, in_doubt=True)

    async def _failed(self, fault: Fault, text: str, in_doubt: bool) -> None:
        if in_doubt and await self._broken(text, self._has_begun):
            return  # the backend's loss ends this run, too
        self._post(RunFailed(self.effect.request, self.effect.attempt, fault, text, self.tokens))


def without_input(text: str) -> str:
    """Return an error without the request that a failed validation quotes: prompts do not belong into logs."""
    kept, quoted, _ = text.partition(INPUT)
    return f"{kept.rstrip(', ')}…" if quoted else text
