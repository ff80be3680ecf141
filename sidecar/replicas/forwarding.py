"""Forward a request to the owner of its backend, and deliver the answer as it arrives."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass, replace
from enum import Enum
from time import monotonic
from typing import Any

from google.protobuf.message import DecodeError
from msgspec import MsgspecError

from sidecar.backends.api import Ticket
from sidecar.backends.http_client import Ending, Sighting, Unseen
from sidecar.backends.openai.events import DONE, END_OF_EVENT, EVENT, prompt_bytes, prompt_tokens
from sidecar.backends.unseen import QUIET_S, Read
from sidecar.core import causes
from sidecar.core.causes import Cause
from sidecar.core.effects import Settle
from sidecar.core.enums import outcome_of
from sidecar.errors import Reason
from sidecar.proto import peers_pb2
from sidecar.replicas import forms
from sidecar.replicas.call import ForwardCall
from sidecar.replicas.carrying import carry, sighting_sent
from sidecar.shell.gateway import Gateway
from sidecar.shell.requests import RequestFacts

AGAIN = frozenset({Reason.NOT_OWNER, Reason.DRAINING, Reason.CRASHED})
"""Reasons with which an owner gives a request back; another owner may then get it."""


SUSPECT_S = 5.0
"""If an owner breaks off, requests that it received or dispatched so recently are suspected to have crashed it.

The owner did nothing with older ones that could crash a process. Without this limit, killing two owners one after the
other would make every request that waits for long count as poisonous.
"""


ORPHAN_S = 3600.0
"""How long the end of an answer is waited for whose owner is gone, if nothing is told of it."""


class Owner(Enum):
    """How the owner that gave a request back ended, if it did."""

    SOUND = "sound"
    SILENT = "silent"
    """It broke off soon after it got or dispatched the request: a crash that the request caused, or the network."""
    FAILED = "failed"
    """It reported that it crashed and cannot tell on which request."""
    FAILED_ON_ANOTHER = "failed on another"
    """It reported that it crashed on another request."""


@dataclass(frozen=True)
class GivenBack:
    """A request that an owner gave back before the first token: another owner may get it."""

    why: Cause
    owner: Owner = Owner.SOUND


class Forward:
    """One request that another replica answers."""

    def __init__(
        self,
        ticket: Ticket,
        facts: RequestFacts,
        backend: str,
        owner: str,
        gateway: Gateway,
        leg: int,
    ) -> None:
        self._ticket = ticket
        self._gateway = gateway
        self._leg = leg
        self._facts = facts
        self.backend = backend
        self.owner = owner
        self._has_begun = False
        self._is_taken_back = False
        self._has_origin = False
        self._goes_on = self._is_orphaned = False
        """The rest of the answer goes past this process; its owner is gone meanwhile."""
        self._last: Sighting | None = None
        """How such an answer has ended."""
        self._read = Read(0)
        """What has come here of a carried answer."""
        self._carrying: asyncio.Task[None] | None = None
        self._end: asyncio.Future[GivenBack | None] = asyncio.get_running_loop().create_future()
        self._resuming: asyncio.Task[None] | None = None
        self._call: ForwardCall | None = None
        self._number = 0
        self._busy_s = monotonic()
        """The time at which the owner last worked on it: received or dispatched it."""

    async def run(self, call: ForwardCall, member: str) -> GivenBack | None:
        """Forward the request and settle its ticket; return GivenBack if the owner gives it back.

        Cancelling this coroutine cancels the request at the owner.
        """
        ticket = self._ticket
        self._gateway.goes_to(ticket, self.backend)
        request = forms.forwarded(member, self.backend, self._facts, ticket, self._leg)
        self._call, self._number, self._busy_s = call, call.open(self, request), monotonic()
        try:
            return await self._end
        finally:
            call.close(self._number, self._is_taken_back)
            for task in (self._resuming, self._carrying):
                if task is not None:
                    task.cancel()

    def leave(self) -> None:
        """Let the owner count no ending of the request: this replica ends it and counts that."""
        self._is_taken_back = True

    def take_back(self, why: Cause) -> None:
        """Take the request back from its owner, unless its answer has begun."""
        if not self._has_begun and not self._end.done():
            self._is_taken_back = True
            self._ended(GivenBack(why))

    def dispatched(self) -> None:
        self._busy_s = monotonic()
        self._ticket.dispatched(None)

    def take(self, reply: Any) -> bool:
        """Deliver a part of the answer. Return True if it was the ending."""
        if self._end.done():  # nobody waits for it any more; the owner is being told
            return False
        try:
            return self._take(reply)
        except (
            ValueError,
            KeyError,
            RecursionError,
            DecodeError,
            MsgspecError,
        ) as error:  # must not end the other requests of this call
            self._end.set_exception(error)
            return False

    def broke(self, why: str, broke_off: bool) -> None:
        """Handle the loss of the owner: give the request back, or fail it if its answer has begun."""
        if self._end.done():
            return
        if not self._has_begun:
            is_suspect = broke_off and monotonic() - self._busy_s < SUSPECT_S
            self._ended(GivenBack(causes.ReplicaAway(self.owner, why), Owner.SILENT if is_suspect else Owner.SOUND))
            return
        if self._goes_on:
            self._is_orphaned = True  # the answer goes on without its owner, and the proxy tells us its end
            if self._last is not None:
                self._end_orphan(self._last)
            return
        if self._ticket.came is not None and self._ticket.came.final:
            self._gateway.end_here(self._ticket, self._facts, None, None, self.backend)
            self._ended(None)
            return
        cause = causes.ReplicaLost(self.owner, self.backend, why)
        self._gateway.end_here(self._ticket, self._facts, Reason.BACKEND_FAILED, cause, self.backend)
        self._ended(None)

    def _ended(self, given: GivenBack | None) -> None:
        if not self._end.done():
            self._end.set_result(given)

    def _take(self, reply: Any) -> bool:
        ticket = self._ticket
        if not self._has_origin and reply.HasField("origin"):
            self._has_origin = True
            ticket.dispatch = forms.dispatch_of(ticket.request, reply.origin)
        which = reply.WhichOneof("reply")
        if which == "ending":
            self._ended(self._take_ending(reply.ending))
            return True
        if which == "carriage":
            self._carrying = asyncio.create_task(self._carry(reply.carriage))
            return False
        self._begin()
        raw = reply.last if which == "last" else reply.part
        if raw.startswith((b"{", EVENT)):  # only in JSON no text of an answer can look like the engine's own count
            ticket.prompt_tokens = prompt_tokens(raw) or ticket.prompt_tokens
        tokens = reply.tokens if reply.HasField("tokens") else 1  # an older replica omits it
        ticket.deliver(forms.reply_of(raw, which == "last", ticket.payload.unary), tokens)
        if self._resuming is None and not ticket.has_room:
            self._resuming = asyncio.create_task(self._pause())
        return False

    async def _pause(self) -> None:
        """Pause the answer at its owner until the client has caught up; other answers continue."""
        assert self._call is not None
        self._call.pause(self._number)
        await self._ticket.room()
        self._resuming = None
        self._call.resume(self._number)

    async def _carry(self, carriage: Any) -> None:
        """Have our proxy carry the request, as its owner decided, and tell the owner what is seen of the answer."""
        assert self._call is not None
        tell, number = self._call.tell, self._number
        unseen = await carry(self._ticket.carrier, carriage, number, tell, self._came)
        if unseen is None:
            return
        self._goes_on = True
        self._begin()
        try:
            while self._last is None:
                sighting = await self._next_of(unseen)
                tell(peers_pb2.Carried(number=number, sighting=sighting_sent(sighting)))
                self._last = None if sighting.ending is None else sighting
        finally:
            unseen.close()
        if self._is_orphaned:
            self._end_orphan(self._last)

    async def _next_of(self, unseen: Unseen) -> Sighting:
        """Return the next thing that is seen of an answer. While it has an owner, that one judges a silence."""
        since_s = monotonic()
        while True:
            try:
                async with asyncio.timeout(QUIET_S):
                    return await unseen.next()
            except TimeoutError:
                if self._is_orphaned and (unseen.is_lost or monotonic() - since_s > ORPHAN_S):
                    return Sighting(0, Ending.LOST)

    def _came(self, size_bytes: int) -> None:
        """Note a part of a carried answer that its client gets."""
        self._begin()
        self._read.size_bytes += size_bytes

    def _begin(self) -> None:
        """Note that the answer has begun."""
        if not self._has_begun:
            self._has_begun = True
            self._gateway.chronicle.begun_elsewhere(self._ticket)

    def _end_orphan(self, last: Sighting) -> None:
        """End a request by what was seen last of its answer, which went past us; its owner is gone."""
        endings: dict[Ending | None, tuple[Reason | None, Cause | None]] = {
            Ending.WHOLE: (None, None),
            Ending.CLIENT_LEFT: (Reason.CANCELLED, causes.CancelledByClient()),
            Ending.LOST: (Reason.UNOBSERVED, causes.Unobserved()),
        }
        how = endings.get(last.ending, (Reason.BACKEND_FAILED, causes.BrokeOff(self.backend, last.cause)))
        ending = self._gateway.ending_of(self._ticket, self._facts, *how, self.backend)
        self._gateway.end_by(self._ticket, replace(ending, output_tokens=self._estimate(last), is_estimated=True))
        self._ended(None)

    def _estimate(self, last: Sighting) -> int:
        """Return how many tokens an answer has that went past us, by its bytes."""
        came, read = self._ticket.came, self._read
        read.tokens = self._ticket.tokens
        if came is not None and came.raw.startswith(EVENT):
            read.token_bytes = len(came.raw) - prompt_bytes(came.raw)
            read.tail_bytes = len(DONE + END_OF_EVENT)
        elif came is not None:
            read.token_bytes = len(came.raw)
        return min(read.tokens + round(read.told(last)), self._facts.output_tokens_max or sys.maxsize)

    def _take_ending(self, sent: Any) -> GivenBack | None:
        ticket = self._ticket
        settled = forms.settle_of(ticket.request, self._facts, self.backend, sent)
        if settled.reason in AGAIN and not self._has_begun:
            return GivenBack(settled.cause or causes.NoOwner(), _owner_that(settled.reason, sent.is_bystander))
        ticket.rejected_with = forms.rejection_of(sent)
        self._gateway.made.learn(ticket, settled)
        ticket.settle(self._gateway.for_client(settled, ticket))
        return None


def _owner_that(reason: Reason | None, is_bystander: bool) -> Owner:
    if reason is not Reason.CRASHED:
        return Owner.SOUND
    return Owner.FAILED_ON_ANOTHER if is_bystander else Owner.FAILED


def ended(
    request: int,
    facts: RequestFacts,
    reason: Reason,
    cause: Cause,
    backend: str = "",
    retry_after_s: float | None = None,
) -> Settle:
    """Return the ending of a request as the replica tells it that does not count it."""
    return Settle(
        request, outcome_of(reason), facts.adapter, facts.tenant, facts.klass, 0, facts.input_tokens, reason=reason,
        cause=cause, backend=backend, retry_after_ns=None if retry_after_s is None else int(retry_after_s * 1e9),
    )  # fmt: skip
