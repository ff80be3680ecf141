"""The owner's end of a Forward call: answer requests that another replica received."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from google.protobuf.message import Message

from sidecar.backends.api import Payload, Reply, Ticket
from sidecar.backends.buffers import AnswerBuffers
from sidecar.config.identities import REQUEST_ID, is_fit
from sidecar.core import causes
from sidecar.core.admission import name_in
from sidecar.core.effects import Dispatch, Settle
from sidecar.errors import Reason, Refused
from sidecar.proto import peers_pb2
from sidecar.replicas import forms
from sidecar.replicas.carrying import RemoteCarrier
from sidecar.replicas.forwarding import ended
from sidecar.shell.gateway import Gateway
from sidecar.shell.requests import RequestFacts

logger = logging.getLogger(__name__)

UNSENT_BYTES_MAX = 1 << 20
"""With more unsent bytes, engines are not read further: the other replica does not read its replies."""
GATHER_S = 0.001
"""Replies within this time after a message go into the next one: the tokens of one engine step come in a burst."""


class PassedOn(Ticket):
    """A request of another replica. Its replies go straight onto the call that it came by."""

    __slots__ = ("_has_sent_origin", "answers", "number", "paused")

    def __init__(self, request: int, payload: Payload, client_id: str, answers: Answers, number: int) -> None:
        super().__init__(request, payload, client_id, AnswerBuffers())  # replies are buffered where the client is
        self.answers = answers
        self.number = number
        self.paused = False
        self._has_sent_origin = False

    def dispatched(self, effect: Dispatch | None) -> None:
        super().dispatched(effect)
        self.answers.send_dispatched(self.number)

    def deliver(self, reply: Reply, tokens: int = 1) -> None:
        if self.settled is not None:
            return
        self.tokens += tokens
        self.came = reply
        sent = self.answers.send(self.number, "last" if reply.final else "part", reply.raw)
        sent.tokens = max(0, tokens)
        if not self._has_sent_origin:
            self._add_origin(sent)

    def send_carriage(self, carriage: Any) -> None:
        """Have the receiving replica's proxy send the request."""
        sent = self.answers.send(self.number, "carriage", carriage)
        if not self._has_sent_origin:
            self._add_origin(sent)

    def settle(self, effect: Settle) -> None:
        super().settle(effect)
        ending = forms.ending(effect, self.rejected_with, self.answers.is_bystander(effect))
        sent = self.answers.send(self.number, "ending", ending)
        if not self._has_sent_origin:
            self._add_origin(sent)
        self.answers.ended(self)

    @property
    def has_room(self) -> bool:
        return not self.paused and self.answers.has_room

    def resume_if_room(self) -> None:
        """Resume reading the engine if there is room again."""
        if self.has_room:
            self._open_room()

    def _add_origin(self, sent: Any) -> None:
        """Add the answer's origin to a reply, once it is known."""
        if self.dispatch is not None:
            self._has_sent_origin = True
            sent.origin = forms.origin(self.dispatch)


class Answers:
    """The owner's end of one Forward call."""

    def __init__(self, gateway: Gateway, context: Any) -> None:
        self._gateway = gateway
        self._context = context
        self._tickets: dict[int, PassedOn] = {}
        self._over: list[PassedOn] = []
        """Tickets whose ending is not sent yet: they stay open, so that the process does not exit before."""
        self._outbox = peers_pb2.ForwardReplies()
        self._unsent_bytes = 0
        self._outbox_changed = asyncio.Event()
        self._is_read = self._leaves = False

    async def run(self, messages: AsyncIterator[Any]) -> None:
        """Answer until the other replica ends the call, or this one leaves."""
        reading = asyncio.create_task(self._read(messages))
        await self._context.send_initial_metadata(())  # tells the other replica that the call has arrived
        try:
            while not self._is_over:
                await self._outbox_changed.wait()
                self._outbox_changed.clear()
                await self._write()
                await asyncio.sleep(GATHER_S)
        finally:
            reading.cancel()
            for ticket in (*self._tickets.values(), *self._over):
                self._lost(ticket)

    def leave(self) -> None:
        """End the call once all replies are sent."""
        self._leaves = True
        self._outbox_changed.set()

    @property
    def _is_over(self) -> bool:
        return not self._has_more and (self._leaves or (self._is_read and not self._tickets))

    @property
    def _has_more(self) -> bool:
        return bool(self._outbox.replies or self._outbox.dispatched)

    @property
    def has_room(self) -> bool:
        return self._unsent_bytes < UNSENT_BYTES_MAX

    def send(self, number: int, what: str, content: Any) -> Any:
        """Put a reply into the next message and return it."""
        self._unsent_bytes += content.ByteSize() if isinstance(content, Message) else len(content)
        self._outbox_changed.set()
        return self._outbox.replies.add(number=number, **{what: content})

    def send_dispatched(self, number: int) -> None:
        """Report in the next message that a request was dispatched to an engine."""
        self._outbox.dispatched.append(number)
        self._outbox_changed.set()

    def is_bystander(self, effect: Settle) -> bool:
        """Return True if a request ends because this process crashed on another request."""
        raised = self._gateway.crash.raised
        return effect.reason is Reason.CRASHED and raised is not None and raised.request is not None

    def ended(self, ticket: PassedOn) -> None:
        """Keep an ended ticket until its ending is sent."""
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
                ticket.resume_if_room()

    async def _read(self, messages: AsyncIterator[Any]) -> None:
        async for message in messages:
            for request in message.requests:
                self._begin(request)
            for number in message.ended:
                self._close(number)
            for number in message.moved:
                self._close(number, moved=True)
            for carried in message.carried:
                self._hear(carried)
            for number in message.paused:
                self._pause(number, True)
            for number in message.resumed:
                self._pause(number, False)
        self._is_read = True
        self._outbox_changed.set()

    def _begin(self, request: Any) -> None:
        facts = RequestFacts("", only=("",))
        try:
            facts, payload = forms.facts_of(request), forms.payload_of(request)
            if self._gateway.state.draining:  # the core would count a refusal, but another owner may still answer it
                self._refuse(request.number, ended(0, facts, Reason.DRAINING, causes.ShuttingDown(), facts.only[0]))
                return
            self._gateway.submit_here(facts, lambda number: self._ticket(number, payload, request))
        except Refused as refused:
            cause = causes.Said(refused.message)
            ending = ended(0, facts, refused.reason, cause, facts.only[0], refused.retry_after_s)
            self._refuse(request.number, ending)
        except Exception as error:  # a malformed request must not end the others on this call
            called = request.client_id if is_fit(REQUEST_ID, request.client_id) else ""
            logger.exception("a request (id %s) that another replica passed on cannot be read", called)
            ending = ended(0, facts, Reason.BACKEND_FAILED, causes.Broken(str(error)), facts.only[0])
            self._refuse(request.number, ending)
            named = replace(ending, name=name_in(self._gateway.state, facts.adapter))
            self._gateway.driver.show_endings([named])

    def _ticket(self, number: int, payload: Payload, request: Any) -> PassedOn:
        ticket = PassedOn(number, payload, request.client_id, self, request.number)
        ticket.peer = request.peer
        if request.is_carried:
            ticket.carrier = RemoteCarrier(ticket.send_carriage, request.answer_id)
        self._tickets[request.number] = ticket
        return ticket

    def _refuse(self, number: int, settle: Settle) -> None:
        self._tickets.pop(number, None)
        self.send(number, "ending", forms.ending(settle, None))

    def _close(self, number: int, moved: bool = False) -> None:
        ticket = self._tickets.pop(number, None)
        if ticket is not None:
            self._gateway.close(ticket, moved)
            if isinstance(ticket.carrier, RemoteCarrier):
                ticket.carrier.lose()

    def _lost(self, ticket: PassedOn) -> None:
        """Close a ticket whose replica is gone. An answer that goes past that one goes on, and nobody tells its end."""
        if isinstance(ticket.carrier, RemoteCarrier) and ticket.carrier.goes_on:
            ticket.drop()
            self._gateway.tickets.pop(ticket.request, None)
            ticket.carrier.lose()
        else:
            self._gateway.close(ticket)

    def _hear(self, carried: Any) -> None:
        """Take what a proxy has brought of one answer. What cannot be read ends no other."""
        ticket = self._tickets.get(carried.number)
        if ticket is None or not isinstance(ticket.carrier, RemoteCarrier):
            return
        try:
            ticket.carrier.hear(carried)
        except Exception as error:
            logger.exception("what another replica tells of the request with id %s cannot be read", ticket.client_id)
            ticket.carrier.hear(peers_pb2.Carried(failed=str(error)))
            ticket.carrier.lose()

    def _pause(self, number: int, paused: bool) -> None:
        ticket = self._tickets.get(number)
        if ticket is not None:
            ticket.paused = paused
            ticket.resume_if_room()
