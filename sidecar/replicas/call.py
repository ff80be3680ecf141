"""The call between two replicas by which one passes requests on to the other: all of them, and their answers."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from itertools import count
from typing import Any, Protocol

import grpc.aio

from sidecar.proto import peers_pb2

logger = logging.getLogger(__name__)


class Waits(Protocol):
    """A request that was passed on, as its line sees it."""

    def take(self, reply: Any) -> bool:
        """Take a part of the answer; return whether it was the ending."""

    def dispatched(self) -> None:
        """Be told that an engine is given it."""

    def broke(self, why: str, broke_off: bool) -> None:
        """Be told that no more will come.

        `broke_off` says whether the other replica may have ended with it: the connection to it was there and is not.
        """


class ForwardCall:
    """One call to one replica, open for as long as it is used; `is_over` says that it carries nothing any more.

    What is said within one turn of the event loop, or while a message is being sent, leaves in one message: a request
    costs no call of its own and an answer's part no message.
    """

    def __init__(self, stub: Any) -> None:
        self.is_over = False
        self._call = stub.Forward()
        self._requests: dict[int, Waits] = {}
        self._numbers = count(1)
        self._leaves = False
        self._outbox = peers_pb2.ForwardRequests()
        self._said = asyncio.Event()
        self._writing = asyncio.create_task(self._write())
        self.reading = asyncio.create_task(self._read())

    def open(self, waits: Waits, request: Any) -> int:
        """Pass a request on and return its number; what comes of it is given to `waits`."""
        number = request.number = next(self._numbers)
        self._requests[number] = waits
        self._outbox.requests.append(request)
        self._said.set()
        return number

    def close(self, number: int, moved: bool) -> None:
        """Nobody waits for a request here any more: it is cancelled there, unless it has ended."""
        if self._requests.pop(number, None) is not None:
            (self._outbox.moved if moved else self._outbox.ended).append(number)
            self._said.set()
        elif self._leaves:
            self._said.set()

    def pause(self, number: int) -> None:
        """Ask for no more of an answer for now."""
        self._outbox.paused.append(number)
        self._said.set()

    def resume(self, number: int) -> None:
        """Ask for the rest of an answer."""
        self._outbox.resumed.append(number)
        self._said.set()

    def leave(self) -> None:
        """End the call once nothing is open on it."""
        self._leaves = True
        self._said.set()

    async def _write(self) -> None:
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the reader learns why
            while not (self._leaves and not self._requests):
                await self._said.wait()
                self._said.clear()
                said, self._outbox = self._outbox, peers_pb2.ForwardRequests()
                if said.ByteSize():
                    await self._call.write(said)
            await self._call.done_writing()

    async def _read(self) -> None:
        why, was_there, broke_off = "it ended the call", False, False
        try:
            await self._call.initial_metadata()
            was_there = True
            async for message in self._call:
                for number in message.dispatched:
                    if (waits := self._requests.get(number)) is not None:
                        waits.dispatched()
                for reply in message.replies:
                    self._take(reply)
        except grpc.aio.AioRpcError as error:
            why = error.details() or error.code().name
            broke_off = was_there and error.code() is grpc.StatusCode.UNAVAILABLE
        finally:
            self.is_over = True
            self._writing.cancel()
            left, self._requests = self._requests, {}
            for each in left.values():
                each.broke(why, broke_off)

    def _take(self, reply: Any) -> None:
        waits = self._requests.get(reply.number)
        if waits is not None and waits.take(reply):
            self._requests.pop(reply.number, None)
