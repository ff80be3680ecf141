"""The other end of a line between two replicas: requests that another one received, answered in its place."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from sidecar.backends.api import Payload, Reply, Ticket
from sidecar.backends.buffers import AnswerBuffers
from sidecar.config.identities import REQUEST_ID, is_fit
from sidecar.core.effects import Dispatch, Settle
from sidecar.errors import Reason, Refused
from sidecar.proto import peers_pb2
from sidecar.replicas import forms
from sidecar.replicas.forwarding import ended
from sidecar.shell.gateway import Gateway

logger = logging.getLogger(__name__)

UNSENT_BYTES_MAX = 1 << 20
"""Above this, engines are read no further: the other replica does not take what it is sent."""
GATHER_S = 0.001
"""What is said within this after a message leaves with the next one: the tokens of one engine step come in a burst."""


class PassedOn(Ticket):
    """A request of another replica. What comes of it goes straight onto the line that it came by."""

    __slots__ = ("_has_told", "line", "number", "paused")

    def __init__(self, request: int, payload: Payload, client_id: str, line: Answers, number: int) -> None:
        super().__init__(request, payload, client_id, AnswerBuffers())  # what waits, waits where the client is
        self.line = line
        self.number = number
        self.paused = False
        self._has_told = False

    def dispatched(self, effect: Dispatch) -> None:
        super().dispatched(effect)
        self.line.say_dispatched(self.number)

    def deliver(self, reply: Reply) -> None:
        if self.settled is not None:
            return
        self.came = reply
        sent = self.line.say(self.number, "last" if reply.final else "part", reply.raw)
        if not self._has_told:
            self._tell(sent)

    def settle(self, effect: Settle) -> None:
        super().settle(effect)
        told = forms.ending(effect, self.rejected_with, self.line.is_bystander(effect))
        sent = self.line.say(self.number, "ending", told)
        if not self._has_told:
            self._tell(sent)
        self.line.ended(self)

    @property
    def has_room(self) -> bool:
        return not self.paused and self.line.has_room

    def look(self) -> None:
        """Go on if there is room again."""
        if self.has_room:
            self._open_room()

    def _tell(self, sent: Any) -> None:
        """Say where the answer comes from, once that is known."""
        if self.dispatch is not None:
            self._has_told = True
            sent.origin.CopyFrom(forms.origin(self.dispatch))


class Answers:
    """One line, for as long as its call lasts."""

    def __init__(self, gateway: Gateway, context: Any) -> None:
        self._gateway = gateway
        self._context = context
        self._tickets: dict[int, PassedOn] = {}
        self._over: list[PassedOn] = []
        """Those whose ending is still to be sent: the process must not go before."""
        self._outbox = peers_pb2.ForwardReplies()
        self._unsent_bytes = 0
        self._said = asyncio.Event()
        self._is_last = self._leaves = False

    async def run(self, messages: AsyncIterator[Any]) -> None:
        """Answer until the other replica says that there is nothing more, or this one leaves."""
        reading = asyncio.create_task(self._read(messages))
        await self._context.send_initial_metadata(())  # so the other one knows that it is here what it sends
        try:
            while not self._is_over:
                await self._said.wait()
                self._said.clear()
                await self._write()
                await asyncio.sleep(GATHER_S)
        finally:
            reading.cancel()
            for ticket in (*self._tickets.values(), *self._over):
                self._gateway.close(ticket)

    def leave(self) -> None:
        """End the call once what was said has been sent."""
        self._leaves = True
        self._said.set()

    @property
    def _is_over(self) -> bool:
        return not self._has_more and (self._leaves or (self._is_last and not self._tickets))

    @property
    def _has_more(self) -> bool:
        return bool(self._outbox.replies or self._outbox.dispatched)

    @property
    def has_room(self) -> bool:
        return self._unsent_bytes < UNSENT_BYTES_MAX

    def say(self, number: int, what: str, content: Any) -> Any:
        """Have a reply sent, with all that is said meanwhile; return it."""
        if what != "ending":
            self._unsent_bytes += len(content)
        self._said.set()
        return self._outbox.replies.add(number=number, **{what: content})

    def say_dispatched(self, number: int) -> None:
        """Have it said that an engine is given a request."""
        self._outbox.dispatched.append(number)
        self._said.set()

    def is_bystander(self, effect: Settle) -> bool:
        """Whether a request ends because of another one, on which this process has failed."""
        raised = self._gateway.crash.raised
        return effect.reason is Reason.CRASHED and raised is not None and raised.request is not None

    def ended(self, ticket: PassedOn) -> None:
        """A request has ended and said so."""
        if self._tickets.pop(ticket.number, None) is not None:
            self._over.append(ticket)

    async def _write(self) -> None:
        has_more, replies, self._outbox = self._has_more, self._outbox, peers_pb2.ForwardReplies()
        over, self._over = self._over, []
        size_bytes = self._unsent_bytes
        if has_more:
            await self._context.write(replies)
        for ticket in over:
            self._gateway.close(ticket)
        was_full = not self.has_room
        self._unsent_bytes -= size_bytes
        if was_full:
            for ticket in list(self._tickets.values()):
                ticket.look()

    async def _read(self, messages: AsyncIterator[Any]) -> None:
        async for message in messages:
            for request in message.requests:
                self._begin(request)
            for number in message.ended:
                self._close(number)
            for number in message.moved:
                self._close(number, moved=True)
            for number in message.paused:
                self._pause(number, True)
            for number in message.resumed:
                self._pause(number, False)
        self._is_last = True
        self._said.set()

    def _begin(self, request: Any) -> None:
        facts = forms.facts_of(request)
        try:
            payload = forms.payload_of(request)
            self._gateway.submit_here(facts, lambda number: self._ticket(number, payload, request))
        except Refused as refused:
            told = ended(0, facts, refused.reason, refused.message, request.backend, refused.retry_after_s)
            self._refuse(request.number, told)
        except Exception as error:  # what one request says, others on the same line must not suffer from
            called = request.client_id if is_fit(REQUEST_ID, request.client_id) else ""
            logger.exception("a request (id %s) that another replica passed on cannot be read", called)
            message = f"the sidecar failed: {error}"
            self._refuse(request.number, ended(0, facts, Reason.BACKEND_FAILED, message, request.backend))

    def _ticket(self, number: int, payload: Payload, request: Any) -> PassedOn:
        ticket = PassedOn(number, payload, request.client_id, self, request.number)
        self._tickets[request.number] = ticket
        return ticket

    def _refuse(self, number: int, told: Settle) -> None:
        self._tickets.pop(number, None)
        self.say(number, "ending", forms.ending(told, None))

    def _close(self, number: int, moved: bool = False) -> None:
        ticket = self._tickets.pop(number, None)
        if ticket is not None:
            self._gateway.close(ticket, moved)

    def _pause(self, number: int, paused: bool) -> None:
        ticket = self._tickets.get(number)
        if ticket is not None:
            ticket.paused = paused
            ticket.look()
