"""The call by which one replica forwards all its requests for another, and receives their answers."""

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
    """A forwarded request, as its call sees it."""

    def take(self, reply: Any) -> bool:
        """Handle a part of the answer. Return True if it was the ending."""

    def dispatched(self) -> None:
        """Note that the owner dispatched the request to an engine."""

    def broke(self, why: str, broke_off: bool) -> None:
        """End the request: the call carries no more replies.

        `broke_off` is True if an established connection was lost: the other replica may have crashed.
        """


class ForwardCall:
    """One call to one replica, open while it is used; `is_over` is True once it has ended.

    All that is sent within one iteration of the event loop, or while a message is being written, shares one message: a
    request needs no call of its own, and a part of an answer no message.
    """

    def __init__(self, stub: Any) -> None:
        self.is_over = False
        self._call = stub.Forward()
        self._requests: dict[int, Waits] = {}
        self._numbers = count(1)
        self._leaves = False
        self._outbox = peers_pb2.ForwardRequests()
        self._outbox_changed = asyncio.Event()
        self._writing = asyncio.create_task(self._write())
        self.reading = asyncio.create_task(self._read())

    def open(self, waits: Waits, request: Any) -> int:
        """Forward a request and return its number; `waits` receives its replies."""
        number = request.number = next(self._numbers)
        self._requests[number] = waits
        self._outbox.requests.append(request)
        self._outbox_changed.set()
        return number

    def close(self, number: int, moved: bool) -> None:
        """Stop waiting for a request: the other replica cancels it, unless it has ended."""
        if self._requests.pop(number, None) is not None:
            (self._outbox.moved if moved else self._outbox.ended).append(number)
            self._outbox_changed.set()
        elif self._leaves:
            self._outbox_changed.set()

    def tell(self, carried: Any) -> None:
        """Tell the owner what a proxy has brought of an answer."""
        self._outbox.carried.append(carried)
        self._outbox_changed.set()

    def pause(self, number: int) -> None:
        """Ask the other replica to pause an answer."""
        self._outbox.paused.append(number)
        self._outbox_changed.set()

    def resume(self, number: int) -> None:
        """Ask the other replica to resume an answer."""
        self._outbox.resumed.append(number)
        self._outbox_changed.set()

    def leave(self) -> None:
        """End the call once no request is open on it."""
        self._leaves = True
        self._outbox_changed.set()

    async def _write(self) -> None:
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # _read() gets the error too and handles it
            while not (self._leaves and not self._requests):
                await self._outbox_changed.wait()
                self._outbox_changed.clear()
                message, self._outbox = self._outbox, peers_pb2.ForwardRequests()
                if message.ByteSize():
                    await self._call.write(message)
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
            unanswered, self._requests = self._requests, {}
            for each in unanswered.values():
                each.broke(why, broke_off)

    def _take(self, reply: Any) -> None:
        waits = self._requests.get(reply.number)
        if waits is not None and waits.take(reply):
            self._requests.pop(reply.number, None)
