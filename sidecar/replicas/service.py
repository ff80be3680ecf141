# ruff: noqa: N802 - names are those of the generated servicer
"""What a replica does for the others: answers in their place, says what it knows of a backend, tells how it stands."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from time import monotonic_ns
from typing import Any

import grpc

from sidecar.backends.api import Reply, Ticket
from sidecar.core.effects import Settle
from sidecar.errors import Refused, SidecarError
from sidecar.proto import peers_pb2, peers_pb2_grpc
from sidecar.replicas import forms
from sidecar.replicas.files import FilesHere
from sidecar.replicas.forwarding import ended
from sidecar.shell.gateway import Gateway

Told = Callable[[], AsyncIterator[Any]]
Asked = Callable[[Any], Awaitable[Any]]


class PeersService(peers_pb2_grpc.PeersServicer):
    """Serves other replicas. `told` yields this replica's boards, `asked` answers what is asked about a backend."""

    def __init__(self, gateway: Gateway, told: Told, asked: Asked) -> None:
        self._gateway = gateway
        self._told = told
        self._asked = asked
        self._files = FilesHere(gateway)

    async def Forward(self, request: Any, context: Any) -> None:
        """Answer a request to its end; when the call is cancelled, so is the request."""
        facts = forms.facts_of(request)
        try:
            ticket = self._gateway.submit_here(facts, forms.payload_of(request), request.client_id)
        except Refused as refused:
            told = ended(0, facts, refused.reason, refused.message, request.backend, refused.retry_after_s)
            await context.write(peers_pb2.ForwardReply(ending=forms.ending(told, None)))
            return
        try:
            await self._answer(ticket, context)
        finally:
            self._gateway.close(ticket)

    async def _answer(self, ticket: Ticket, context: Any) -> None:
        has_told = False
        while True:
            item = await ticket.next()
            reply = _message(item, ticket)
            if ticket.dispatch is not None and not has_told:
                has_told = True
                reply.origin.CopyFrom(forms.origin(ticket.dispatch))
            ticket.blocked_since_ns = monotonic_ns()
            await context.write(reply)
            ticket.blocked_since_ns = None
            if isinstance(item, Settle):
                return

    async def Ask(self, request: Any, context: Any) -> Any:
        return await self._asked(request)

    async def Source(self, request: Any, context: Any) -> None:
        await self._files.send(request.digest, context)

    async def Keep(self, request: Any, context: Any) -> Any:
        try:
            await self._files.keep(request.digest)
        except SidecarError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, error.message)
        return peers_pb2.KeepReply()

    async def Watch(self, request: Any, context: Any) -> None:
        async for board in self._told():
            await context.write(board)


def _message(item: Reply | Settle, ticket: Ticket) -> Any:
    if isinstance(item, Settle):
        return peers_pb2.ForwardReply(ending=forms.ending(item, ticket.rejected_with))
    return forms.part(item)
