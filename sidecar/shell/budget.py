"""Bytes that several tasks share."""

from __future__ import annotations

import asyncio
from collections import deque


class Budget:
    """Bytes that are taken and given back; who finds none free waits, first come first served."""

    def __init__(self, size_bytes: int | None) -> None:
        self._free = size_bytes
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, size_bytes: int) -> None:
        if self._free is None:
            return
        if not self._waiting and size_bytes <= self._free:
            self._free -= size_bytes
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size_bytes, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back(size_bytes)
            raise

    def give_back(self, size_bytes: int) -> None:
        if self._free is None:
            return
        self._free += size_bytes
        while self._waiting:
            wanted, turn = self._waiting[0]
            if turn.done():
                self._waiting.popleft()
                continue
            if wanted > self._free:
                return
            self._waiting.popleft()
            self._free -= wanted
            turn.set_result(None)
