"""Pass a request on to the owner of its backend, and its answer back as it comes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import grpc.aio

from sidecar.backends.api import Ticket
from sidecar.core.effects import Settle
from sidecar.core.turn import outcome_of
from sidecar.errors import Reason
from sidecar.replicas import forms
from sidecar.shell.gateway import RequestFacts

AGAIN = frozenset({Reason.NOT_OWNER, Reason.DRAINING})
"""An owner gives a request back with these: it may be sent to the next one."""


@dataclass(frozen=True)
class GivenBack:
    """A request that no owner has answered a token of: it is to be sent to the next one."""

    why: str


class Forward:
    """One request at another replica."""

    def __init__(self, ticket: Ticket, facts: RequestFacts, backend: str, owner: str) -> None:
        self._ticket = ticket
        self._facts = facts
        self.backend = backend
        self.owner = owner
        self._has_begun = False
        self._call: Any = None
        self._why = ""

    async def run(self, stub: Any, member: str) -> GivenBack | None:
        """Have it answered, its ending through the ticket; cancelling this cancels it there."""
        ticket, facts = self._ticket, self._facts
        request = forms.forwarded(member, self.backend, facts, ticket.payload, ticket.client_id)
        try:
            self._call = stub.Forward(request)
            async for reply in self._call:
                ended = await self._take(reply)
                if ended is not None:
                    return self._end(ended)
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            return self._broke(self._why)
        except grpc.aio.AioRpcError as error:
            return self._broke(error.details() or error.code().name)
        return self._broke("it ended the answer without saying how")

    def take_back(self, why: str) -> None:
        """Have it given back, unless its answer has begun: that may go on."""
        if not self._has_begun and self._call is not None:
            self._why = why
            self._call.cancel()

    async def _take(self, reply: Any) -> Any | None:
        """Deliver a part of the answer; return the ending, if that is what came."""
        ticket = self._ticket
        if reply.HasField("origin"):
            ticket.dispatch = forms.dispatch_of(ticket.request, reply.origin)
        which = reply.WhichOneof("reply")
        if which == "ending":
            return reply.ending
        if not ticket.has_room:
            await ticket.room()
        self._has_begun = True
        raw = reply.last if which == "last" else reply.part
        ticket.deliver(forms.reply_of(raw, which == "last", ticket.payload.kind, ticket.payload.unary))
        return None

    def _end(self, sent: Any) -> GivenBack | None:
        ticket = self._ticket
        settled = forms.settle_of(ticket.request, self._facts, self.backend, sent)
        if settled.reason in AGAIN and not self._has_begun:
            return GivenBack(settled.message)
        ticket.rejected_with = forms.rejection_of(sent)
        ticket.settle(settled)
        return None

    def _broke(self, why: str) -> GivenBack | None:
        """The owner is gone, or cannot be reached. What has begun is never repeated."""
        if not self._has_begun:
            return GivenBack(f"replica {self.owner}: {why}")
        name = self._facts.adapter or "base model"
        message = (
            f"{name}: the replica {self.owner} that answered for {self.backend} was lost in the middle: {why}; an "
            "answer that has begun is never repeated, so send the request again if you want a new one"
        )
        self._ticket.settle(ended(self._ticket.request, self._facts, Reason.BACKEND_FAILED, message, self.backend))
        return None


def _is_cancelled() -> bool:
    """Whether this task is to end, rather than only a call that it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def ended(
    request: int,
    facts: RequestFacts,
    reason: Reason,
    message: str,
    backend: str = "",
    retry_after_s: float | None = None,
) -> Settle:
    """Return an ending that this replica gives a request that was not, or not only, its own to answer."""
    return Settle(
        request, outcome_of(reason), facts.adapter, facts.tenant, facts.klass, 0, facts.input_tokens, reason=reason,
        message=message, backend=backend, retry_after_ns=None if retry_after_s is None else int(retry_after_s * 1e9),
    )  # fmt: skip
