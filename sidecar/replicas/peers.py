"""The connections to the other replicas, and their reports."""

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
from sidecar.tasks import Tasks

logger = logging.getLogger(__name__)

RETRY_S, RETRY_S_MAX = 0.1, 0.5
ANSWER_S = 3600.0
"""How long a begun answer may still come from a former member; gRPC detects a dead one sooner."""
DRAINS_S = 600.0
"""How long a former member may be told of the ends of answers that it waits for: twice as long as drains by default."""
ASK_S = 0.5
"""The timeout of a question; an owner that must decide has no use for a later answer."""


LARGE_BYTES = 1 << 20
"""A larger request gets a call of its own, so that no other request's answer waits while it is sent."""


@dataclass
class _Peer:
    address: str
    channel: grpc.aio.Channel
    stub: Any
    watch: asyncio.Task[None]
    call: ForwardCall | None = None


class Peers:
    """Connections to the members of a pool, by member id. `open_channel` returns a channel to an address."""

    def __init__(self, member: str, board: Board, open_channel: Callable[[str], grpc.aio.Channel]) -> None:
        self._member = member
        self._board = board
        self._open_channel = open_channel
        self._peers: dict[str, _Peer] = {}
        self._left: set[grpc.aio.Channel] = set()
        """Channels to former members, which still carry begun answers."""
        self._drains: dict[str, Any] = {}
        """The stubs of former members that may still be told of answers' ends."""
        self._tasks = Tasks()
        self._calls: set[ForwardCall] = set()
        self.gone: Callable[[str], None] = lambda member: None
        """Called with the id of each member that leaves."""

    def are(self, addresses: Mapping[str, str]) -> None:
        """Set the other members and their addresses: connect to new ones, close the connections to former ones."""
        for member in [known for known in self._peers if known not in addresses]:
            self._forget(member)
        for member, address in addresses.items():
            if member not in self._peers:
                channel = self._open_channel(address)
                stub = peers_pb2_grpc.PeersStub(channel)
                watch = self._tasks.spawn(self._watch(member, stub))
                self._peers[member] = _Peer(address, channel, stub, watch)

    def addresses(self) -> dict[str, str]:
        """Return the address of each other member."""
        return {member: peer.address for member, peer in self._peers.items()}

    def stubs(self) -> dict[str, Any]:
        """Return the gRPC stub of each other member."""
        return {member: peer.stub for member, peer in self._peers.items()}

    def stub(self, member: str) -> Any:
        """Return a member's gRPC stub, or None if the member is unknown."""
        peer = self._peers.get(member)
        return None if peer is None else peer.stub

    def stub_of_any(self, member: str) -> Any:
        """Return the gRPC stub of a member, also of one that has left lately; None if it is unknown."""
        return self.stub(member) or self._drains.get(member)

    def forward_call(self, member: str, size_bytes: int) -> ForwardCall | None:
        """Return the Forward call to a member for a request of `size_bytes`, or None if the member is unknown."""
        peer = self._peers.get(member)
        if peer is None:
            return None
        if size_bytes > LARGE_BYTES:
            own = self._open(peer)
            own.leave()
            return own
        if peer.call is None or peer.call.is_over:
            peer.call = self._open(peer)
        return peer.call

    def _open(self, peer: _Peer) -> ForwardCall:
        call = ForwardCall(peer.stub)
        self._calls.add(call)
        call.reading.add_done_callback(lambda _: self._calls.discard(call))
        return call

    async def ask(self, member: str, request: Any) -> Any | None:
        """Return a member's answer, or None if none comes in time."""
        stub = self.stub(member)
        if stub is None:
            return None
        try:
            return await stub.Ask(request, timeout=ASK_S)
        except grpc.aio.AioRpcError as error:
            logger.info("replica %s does not answer: %s", member, error.details())
            return None

    async def close(self) -> None:
        await self._tasks.stop()
        channels = {*self._left, *(peer.channel for peer in self._peers.values())}
        await asyncio.gather(*(channel.close(None) for channel in channels))
        self._peers.clear()

    def _forget(self, member: str) -> None:
        peer = self._peers.pop(member)
        peer.watch.cancel()
        if peer.call is not None:
            peer.call.leave()
        self._board.lost(member)
        self._left.add(peer.channel)
        self._tasks.spawn(self._close_later(member, peer))
        self.gone(member)

    async def _close_later(self, member: str, peer: _Peer) -> None:
        self._drains[member] = peer.stub
        await asyncio.sleep(DRAINS_S)
        self._drains.pop(member, None)
        await peer.channel.close(ANSWER_S)  # from now on it takes no new calls
        self._left.discard(peer.channel)

    async def _watch(self, member: str, stub: Any) -> None:
        """Follow a member's reports while it is a member."""
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
