"""The backends of a process, added and removed while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from sidecar.backends.api import UNTOLD, Backend, Wear
from sidecar.core import events as ev
from sidecar.core.facts import EngineFacts
from sidecar.shell.driver import Driver
from sidecar.shell.weights_check import WeightsCheck

REMOVED_KEPT_MAX = 1024
"""Removed backends whose kind is remembered: an answer of theirs may still be on its way."""


@dataclass(frozen=True)
class Added:
    """A backend, the known facts of its engine, and whether this process has its queue at once."""

    backend: Backend
    facts: EngineFacts
    owned: bool


class Fleet:
    """The backends by id. `driver` gives their events to the core; `check` judges each engine that is reached."""

    def __init__(self, driver: Driver, check: WeightsCheck) -> None:
        self.check = check
        self._checking: set[asyncio.Task[None]] = set()
        self.backends: dict[str, Backend] = {}
        self.successors: Mapping[str, object | None] = {}
        """Of configured backends that are being taken out, what has their id then; None where nothing follows."""
        self._driver = driver
        self._stopping: set[Backend] = set()
        self._removed: dict[str, tuple[str, bool, str]] = {}
        """Of removed backends, the kind of engine, whether it streamed, and its address."""

    def add(self, backend: Backend, facts: EngineFacts, owned: bool, pool: str = "", fresh: bool = False) -> None:
        """Add a backend under an id that no other has; `owned` says that this process has its queue at once."""
        assert backend.id not in self.backends, f"{backend.id} is there already"
        self.backends[backend.id] = backend
        self._driver.step(ev.BackendAdded(backend.id, facts, owned, pool, fresh))

    async def start(self, backend: Backend) -> None:
        """Begin to reach a backend that has been added."""
        await backend.start(self._event_sink(backend))

    def set_leaving(self, backend: str, leaving: bool, serves_queue: bool = False) -> None:
        """Send nothing new to a backend that is about to go, or take it back; with `serves_queue` it still gets what
        waits there and no other backend takes.
        """
        self._driver.step(ev.BackendLeaving(backend, leaving, serves_queue))

    async def remove(self, backend_id: str, cause: str, successor: Callable[[], Added | None] = lambda: None) -> None:
        """Remove a backend that is gone. Its runs are cut off; requests without a token are sent to other backends.

        `successor` is asked at the end for the backend that has its id from then on.
        """
        backend = self.backends[backend_id]
        self.set_leaving(backend_id, True)
        self._removed[backend_id] = (*self._kind_now(backend_id), backend.address)
        if len(self._removed) > REMOVED_KEPT_MAX:
            del self._removed[next(iter(self._removed))]
        self._stopping.add(backend)
        try:
            await backend.stop()  # first: its runs must deliver nothing once the core has sent them elsewhere
        finally:
            self._stopping.discard(backend)
            after = successor()
            added = None if after is None else ev.BackendAdded(backend_id, after.facts, after.owned, fresh=True)
            self._driver.tell(ev.BackendRemoved(backend_id, cause, added))
            del self.backends[backend_id]
            self.check.differing.pop(backend_id, None)
            if after is not None:
                self.backends[backend_id] = after.backend

    def _event_sink(self, backend: Backend) -> Callable[[ev.Event], None]:
        """Return the function by which a backend posts events for as long as it is in the fleet.

        Runs that are cut off end in ways that look like faults. Of a backend that is being stopped only first tokens
        count.
        """

        held: list[ev.Event] | None = None

        def post(event: ev.Event) -> None:
            nonlocal held
            is_ours = self.backends.get(backend.id) is backend and getattr(event, "request", None) != UNTOLD
            if not is_ours or (backend in self._stopping and not isinstance(event, ev.FirstToken)):
                return
            if isinstance(event, ev.BackendUp) and self.check.mode != "off":
                held = [event]
                task = asyncio.create_task(check(event.facts, held))
                self._checking.add(task)
                task.add_done_callback(self._checking.discard)
            elif held is None:
                self._driver.post(event)
            elif held:
                held.append(event)

        async def check(facts: EngineFacts, events: list[ev.Event]) -> None:
            """Let the events of an engine pass, from that it is up; or none, until it is reached anew."""
            nonlocal held
            passes = await self.check.passes(backend, facts, self.backends)
            if held is events:
                held = None if passes else []
                for event in events if passes else ():
                    self._driver.post(event)

        return post

    async def stop(self) -> None:
        await asyncio.gather(*(backend.stop() for backend in self.backends.values()))

    def wear(self) -> dict[str, Wear]:
        """Return what the engines of this process's queues keep until they are restarted, where that is known."""
        owned = {backend.id for backend in self._driver.core.state.backends.values() if backend.owned}
        known = {name: backend.wear for name, backend in self.backends.items() if name in owned}
        return {name: wear for name, wear in known.items() if wear is not None}

    def of_kind(self, kind: str) -> list[Backend]:
        """Return the present backends with this kind of engine."""
        known = self._driver.core.state.backends
        return [backend for name, backend in self.backends.items() if known[name].facts.kind == kind]

    def kind_of(self, backend: str) -> str:
        """Return the kind of engine of a backend that sent an answer and may have been removed meanwhile."""
        return self._kind(backend)[0]

    def streams(self, backend: str) -> bool:
        """Return True if that engine answers token by token."""
        return self._kind(backend)[1]

    def streamed(self, kind: str) -> bool:
        """Return True if the last removed engine of a kind answered token by token, or there was none."""
        return next((streams for other, streams, _ in reversed(self._removed.values()) if other == kind), True)

    def names(self) -> Iterator[str]:
        """Yield the names of the engines that there are, and were: ids, and addresses with and without the port."""
        known = [(name, backend.address) for name, backend in self.backends.items()]
        for name, address in (*known, *((name, address) for name, (_, _, address) in self._removed.items())):
            yield from (name, address)
            host = address.rpartition(":")[0]
            if host:
                yield host

    def _kind(self, backend: str) -> tuple[str, bool]:
        return self._kind_now(backend) if backend in self.backends else self._removed[backend][:2]

    def _kind_now(self, backend: str) -> tuple[str, bool]:
        return self._driver.core.state.backends[backend].facts.kind, self.backends[backend].streams
