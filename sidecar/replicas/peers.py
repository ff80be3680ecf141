"""The other replicas: a connection to each, and what each of them tells."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any

import grpc
import grpc.aio

from sidecar.proto import peers_pb2, peers_pb2_grpc
from sidecar.replicas.board import Board
from sidecar.replicas.call import ForwardCall

logger = logging.getLogger(__name__)

RETRY_S, RETRY_S_MAX = 0.1, 0.5
ANSWER_S = 3600.0
"""How long an answer that has begun may still come from a former member; one that is dead is found out by gRPC."""
ASK_S = 0.5
"""How long an answer is waited for; to an owner that has to decide, none is as good as a late one."""


LARGE_BYTES = 1 << 20
"""A request of so many has a call of its own: nobody's answer waits until it is through."""


@dataclass
class _Peer:
    address: str
    channel: grpc.aio.Channel
    stub: Any
    watch: asyncio.Task[None]
    line: ForwardCall | None = None


class Peers:
    """Connections to the members of a pool, by member id. `open_channel` returns a channel to an address."""

    def __init__(self, member: str, board: Board, open_channel: Callable[[str], grpc.aio.Channel]) -> None:
        self._member = member
        self._board = board
        self._open_channel = open_channel
        self._peers: dict[str, _Peer] = {}
        self._left: set[grpc.aio.Channel] = set()
        """Channels to former members: answers that have begun still come by them."""
        self._lines: set[ForwardCall] = set()
        self.gone: Callable[[str], None] = lambda member: None
        """Called with each member that is one no more."""

    def are(self, addresses: Mapping[str, str]) -> None:
        """Be told which other members there are, and where."""
        for member in [known for known in self._peers if known not in addresses]:
            self._forget(member)
        for member, address in addresses.items():
            if member not in self._peers:
                channel = self._open_channel(address)
                stub = peers_pb2_grpc.PeersStub(channel)
                watch = asyncio.create_task(self._watch(member, stub))
                self._peers[member] = _Peer(address, channel, stub, watch)

    def addresses(self) -> dict[str, str]:
        """Return where each of the others is reached."""
        return {member: peer.address for member, peer in self._peers.items()}

    def stubs(self) -> dict[str, Any]:
        """Return what each of the others is called by."""
        return {member: peer.stub for member, peer in self._peers.items()}

    def stub(self, member: str) -> Any:
        """Return what a member is called by, None if no such member is known."""
        peer = self._peers.get(member)
        return None if peer is None else peer.stub

    def line(self, member: str, size_bytes: int) -> ForwardCall | None:
        """Return the way to a member for a request of so many bytes, None if no such member is known."""
        peer = self._peers.get(member)
        if peer is None:
            return None
        if size_bytes > LARGE_BYTES:
            own = self._open(peer)
            own.leave()
            return own
        if peer.line is None or peer.line.is_over:
            peer.line = self._open(peer)
        return peer.line

    def _open(self, peer: _Peer) -> ForwardCall:
        line = ForwardCall(peer.stub)
        self._lines.add(line)
        line.reading.add_done_callback(lambda _: self._lines.discard(line))
        return line

    async def ask(self, member: str, request: Any) -> Any | None:
        """Return a member's answer, None if there is none in time."""
        stub = self.stub(member)
        if stub is None:
            return None
        try:
            return await stub.Ask(request, timeout=ASK_S)
        except grpc.aio.AioRpcError as error:
            logger.info("replica %s does not answer: %s", member, error.details())
            return None

    async def close(self) -> None:
        for peer in self._peers.values():
            peer.watch.cancel()
        channels = {*self._left, *(peer.channel for peer in self._peers.values())}
        await asyncio.gather(*(channel.close(None) for channel in channels))
        self._peers.clear()

    def _forget(self, member: str) -> None:
        peer = self._peers.pop(member)
        peer.watch.cancel()
        if peer.line is not None:
            peer.line.leave()
        self._board.lost(member)
        self._left.add(peer.channel)
        closing = asyncio.get_running_loop().create_task(peer.channel.close(ANSWER_S))
        closing.add_done_callback(lambda _: self._left.discard(peer.channel))
        self.gone(member)

    async def _watch(self, member: str, stub: Any) -> None:
        """Follow what a member tells for as long as it is one."""
        pause_s = RETRY_S
        while True:
            try:
                watched = stub.Watch(peers_pb2.PeersWatchRequest(member=self._member), wait_for_ready=True)
                async for board in watched:
                    self._board.heard(board, monotonic())
                    pause_s = RETRY_S
            except grpc.aio.AioRpcError as error:
                logger.info("replica %s cannot be heard: %s", member, error.details())
            self._board.lost(member)
            await asyncio.sleep(pause_s)
            pause_s = min(RETRY_S_MAX, 2 * pause_s)
