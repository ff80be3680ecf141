"""One request on its way through a vLLM engine: an HTTP body out, events or one body back, as bytes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx

from sidecar.backends.api import HttpForm, HttpRejection, Reply, Ticket
from sidecar.backends.vllm_api import epoch_header, fault_of, message_of
from sidecar.core.effects import Dispatch
from sidecar.core.events import Event, FirstToken, RunEnded, RunFailed
from sidecar.core.words import Fault

END_OF_EVENT = b"\n\n"
DONE = b"data: [DONE]"
ERROR = b'data: {"error"'
CHOICES = b'"choices":[{'
HEADERS = {"content-type": "application/json"}


class VllmRun:
    """A run. `name` is what the engine calls the model; `heard` and `broken` are as for Triton's runs."""

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
        self._said = _named(name), _named(form.model)

    def cancel(self) -> None:
        """Stop the run: vLLM frees its seat when the connection is closed."""
        self.cancelled = True
        if self._work is not None:
            self._work.cancel()

    async def go(self, client: httpx.AsyncClient) -> None:
        """Send the request and deliver what comes. Raises CancelledError when it is cancelled."""
        self._work = asyncio.current_task()
        if self.cancelled:
            raise asyncio.CancelledError
        body = self._form.before + json.dumps(self._name).encode() + self._form.after
        try:
            async with client.stream(
                "POST", self._form.path, content=body, headers=HEADERS | epoch_header(self.effect.epoch)
            ) as reply:
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
                text = message_of(event.removeprefix(b"data: "))
                await self._failed(fault_of(httpx.codes.INTERNAL_SERVER_ERROR, text), text)
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
        """Deliver an event; one that has a choice counts as a token."""
        tokens = int(CHOICES in event)
        is_first = tokens > 0 and self.tokens == 0
        self.tokens += tokens
        self._heard(self.effect.request, tokens)
        self.ticket.deliver(Reply(event.replace(*self._said, 1) + END_OF_EVENT, None, final))
        if is_first:
            self._post(FirstToken(self.effect.request, self.effect.attempt))

    def _whole(self, body: bytes) -> None:
        self.tokens = _completion_tokens(body)
        self._heard(self.effect.request, self.tokens)
        self.ticket.deliver(Reply(body.replace(*self._said, 1), None, True))
        self._post(RunEnded(self.effect.request, self.effect.attempt, self.tokens))

    async def _room(self) -> None:
        """Wait for the client. Meanwhile nothing is read, so the engine's silence is not its own."""
        self.waits_for_client = True
        await self.ticket.room()
        self.waits_for_client = False
        self._heard(self.effect.request, 0)

    async def _rejected(self, status: int, body: bytes) -> None:
        self._heard(self.effect.request, 0)
        text = message_of(body)
        self.ticket.rejected_with = HttpRejection(status, body.replace(self._name.encode(), self._form.model.encode()))
        await self._failed(fault_of(status, text), text)

    async def _wire_broke(self, text: str) -> None:
        await self._failed(Fault.LOST, text)

    async def _failed(self, fault: Fault, text: str) -> None:
        if fault is Fault.LOST and await self._broken(text, self.tokens > 0):
            return  # the loss of the backend ends this run too
        self._post(RunFailed(self.effect.request, self.effect.attempt, fault, text, self.tokens))


async def _split(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the events of a stream, without the empty line that ends each."""
    rest = b""
    async for piece in pieces:
        *events, rest = (rest + piece).split(END_OF_EVENT)
        for event in events:
            if event:
                yield event


def _named(model: str) -> bytes:
    """Return the field that says which model answered, as vLLM writes it."""
    return b'"model":' + json.dumps(model, ensure_ascii=False).encode()


def _completion_tokens(body: bytes) -> int:
    try:
        return int(json.loads(body)["usage"]["completion_tokens"])
    except (ValueError, KeyError, TypeError):
        return 1
