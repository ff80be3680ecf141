"""A backend that completes every load at once and holds every run until it is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from sidecar.backends.api import Payload, Signs, Ticket, Wear, Weights
from sidecar.core.effects import Dispatch, Load
from sidecar.core.events import BackendProbed, BackendUp, Event, LoadDone, RunEnded
from sidecar.core.facts import EngineFacts
from tests.kit.peft_files import BASE_MODEL

PAYLOAD = Payload("tensorrt_llm", b"", raw=True, unary=False)


class ScriptedBackend:
    """Implements the backend protocol without an engine."""

    streams = True
    is_encrypted = False
    wear: Wear | None = None

    def __init__(self, backend_id: str, up: bool = True, seats: int = 2) -> None:
        self.id = backend_id
        self.address = f"scripted:{backend_id.rpartition('-')[2]}"
        self.facts = EngineFacts(base_models=(BASE_MODEL,), dtype="float16", seats=seats, host_pages=8)
        self.loaded = asyncio.Event()
        self.running: dict[int, Dispatch] = {}
        self._changed = asyncio.Condition()
        self._up = up
        self._post: Callable[[Event], None] = lambda event: None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, post: Callable[[Event], None]) -> None:
        self._post = post
        if self._up:
            post(BackendUp(self.id, self.facts))
            await asyncio.sleep(0)  # the driver's turn comes next

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    def run(self, effect: Dispatch, ticket: Ticket, weights: Weights | None = None) -> None:
        self.running[effect.request] = effect
        self._tell()

    def cancel(self, request: int, attempt: int) -> None:
        del self.running[request]
        self._post(RunEnded(request, attempt, 0))
        self._tell()

    def load(self, effect: Load, weights: Weights) -> None:
        weights.release()
        self._post(LoadDone(effect.load))
        asyncio.get_running_loop().call_soon(asyncio.get_running_loop().call_soon, self.loaded.set)

    async def forget(self, region: str) -> None:
        pass

    def register_regions(self) -> None:
        """Return at once: there are no regions."""

    def probe(self, within_s: float) -> None:
        self._post(BackendProbed(self.id, True))

    async def files_removed(self) -> None:
        """Nothing."""

    def keeps_at_least(self, versions: int) -> None:
        """Return at once: it keeps nothing."""

    def signs(self) -> Signs:
        """Return that it is well."""
        return Signs(0.0 if self.running else None)

    def restarted(self) -> None:
        """Return at once: nobody restarts it."""

    def detail(self) -> str:
        return "scripted"

    async def running_are(self, count: int) -> None:
        """Wait until `count` requests run here."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self.running) == count)

    def _tell(self) -> None:
        task = asyncio.get_running_loop().create_task(self._notify())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
