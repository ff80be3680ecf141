# ruff: noqa: N802 - names are those of the generated servicer
"""The gRPC service for other replicas: answers forwarded requests, answers questions, and streams reports."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from sidecar.backends.api import Sighting
from sidecar.errors import SidecarError
from sidecar.proto import peers_pb2, peers_pb2_grpc
from sidecar.replicas.answering import Answers
from sidecar.replicas.carrying import sighting_of
from sidecar.replicas.files import FilesHere
from sidecar.shell.gateway import Gateway

logger = logging.getLogger(__name__)

Boards = Callable[[], AsyncIterator[Any]]
Answer = Callable[[Any], Awaitable[Any]]


class PeersService(peers_pb2_grpc.PeersServicer):
    """Serves other replicas. `boards` yields this replica's boards, `answer` answers a question about a backend."""

    def __init__(self, gateway: Gateway, boards: Boards, answer: Answer) -> None:
        self._gateway = gateway
        self._boards = boards
        self._answer = answer
        self._files = FilesHere(gateway)
        self._answers: set[Answers] = set()
        self.told: Callable[[str, Sighting], None] = lambda exchange, sighting: None
        """Takes what another replica's proxy tells of an exchange of ours."""

    async def Forward(self, messages: AsyncIterator[Any], context: Any) -> None:
        """Answer requests until they end; cancelling the call cancels them."""
        answers = Answers(self._gateway, context)
        self._answers.add(answers)
        try:
            await answers.run(messages)
        finally:
            self._answers.discard(answers)

    def leave(self) -> None:
        """End the open calls once their pending replies are sent."""
        for answers in self._answers:
            answers.leave()

    async def Ask(self, request: Any, context: Any) -> Any:
        try:
            return await self._answer(request)
        except SidecarError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, error.message)

    async def Tell(self, request: Any, context: Any) -> Any:
        for sent in request.sightings:
            try:
                self.told(sent.exchange, sighting_of(sent))
            except Exception:  # the others are of other requests
                logger.exception("what another replica's proxy tells of exchange %s cannot be read", sent.exchange)
        return peers_pb2.TellReply()

    async def Source(self, request: Any, context: Any) -> None:
        await self._files.send(request.digest, context)

    async def Keep(self, request: Any, context: Any) -> Any:
        try:
            await self._files.keep(request.digest)
        except SidecarError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, error.message)
        return peers_pb2.KeepReply()

    async def Watch(self, request: Any, context: Any) -> None:
        async for board in self._boards():
            await context.write(board)
