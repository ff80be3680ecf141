"""Simulate in virtual time: engines that step on a cost model, an agenda of all other events, and a front.

No engine runs past the time at which something else may happen: the engine with the earliest next event runs up to the
earliest one of the others and of the agenda. So a front's decision reaches every engine at the time of the decision.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from sidecar.lab.engine.engine import Engine
from sidecar.lab.engine.messages import Event, Request
from sidecar.lab.engine.torch_backend import SLOTS_EXCEEDED
from sidecar.lab.sim.records import Recorder
from sidecar.lab.sim.setup import Setup
from sidecar.lab.sim.workloads import Arrival, Workload

BEGIN_NS = 1_000_000_000
"""The first time of a run; not 0, which means "not yet" in the core."""
PROGRESS_EVERY = 256

OnProgress = Callable[[int], None]


class Front(Protocol):
    """The part between the clients and the engines: the product, or a pass-through for bare engines."""

    def arrive(self, request_id: int, arrival: Arrival) -> None:
        """Take a request that a client sends now."""

    def observe(self, backend: str, event: Event) -> None:
        """Take an event that leaves an engine now: first tokens, endings and failures."""


class World:
    """The engines, the agenda and the clients of one run."""

    def __init__(
        self, setup: Setup, workload: Workload, recorder: Recorder, on_progress: OnProgress | None = None
    ) -> None:
        """`on_progress` is called every `PROGRESS_EVERY` endings with the number of ended requests."""
        self.setup = setup
        self.workload = workload
        self.recorder = recorder
        self.now_ns = BEGIN_NS
        self.engines: dict[str, Engine] = {name: self.build(name) for name in setup.backends}
        self.front: Front | None = None
        self._agenda: list[tuple[int, int, Callable[[], None]]] = []
        self._sequence = 0
        self._arrivals: Iterator[Arrival] = iter(workload)
        self._arrived = 0
        self._outstanding = 0
        self._on_progress = on_progress
        self._filling = False

    def build(self, backend: str) -> Engine:
        """Return a newly started engine."""
        return Engine(self.setup.engine.spec(), self.setup.engine.cost)

    # For fronts.

    def after(self, delay_ns: int, act: Callable[[], None]) -> None:
        """Call a function later; with a delay of 0, when the current event has been handled."""
        self._sequence += 1
        heapq.heappush(self._agenda, (self.now_ns + delay_ns, self._sequence, act))

    def submit(self, backend: str, request: Request) -> None:
        """Give an engine a request now; the next step that begins includes it."""
        self.engines[backend].submit(request, self.now_ns)

    def over(self, request_id: int) -> None:
        """Record that a request has ended; in a closed loop its client then sends the next one."""
        self._outstanding -= 1
        if self._on_progress is not None and (self._arrived - self._outstanding) % PROGRESS_EVERY == 0:
            self._on_progress(self._arrived - self._outstanding)
        if not self.workload.open_loop and not self._filling:
            self._fill()

    # The run.

    def run(self, front: Front) -> None:
        """Run until every request has arrived and no event is left."""
        self.front = front
        if self.workload.open_loop:
            self._next_arrival()
        else:
            self._fill()
        while self._step():
            pass

    def _step(self) -> bool:
        """Handle the next event; return False if there is none."""
        at_ns = self._agenda[0][0] if self._agenda else None
        first, first_ns, until_ns = _earliest(self.engines, at_ns)
        if first is not None and (at_ns is None or first_ns <= at_ns):
            event = self.engines[first].run(until_ns)
            if event is not None:
                self.now_ns = event.at_ns
                if any(failure.text == SLOTS_EXCEEDED for failure in event.failures):
                    self.recorder.batches_failed += 1
                self._front.observe(first, event)
            return True
        if at_ns is None:
            return False
        self.now_ns, _, act = heapq.heappop(self._agenda)
        act()
        return True

    @property
    def _front(self) -> Front:
        assert self.front is not None
        return self.front

    # Clients.

    def _next_arrival(self) -> None:
        arrival = next(self._arrivals, None)
        if arrival is not None:
            assert arrival.at_ns is not None
            self.after(BEGIN_NS + arrival.at_ns - self.now_ns, lambda: self._arrive_in_time(arrival))

    def _arrive_in_time(self, arrival: Arrival) -> None:
        self._next_arrival()
        self.send(arrival)

    def _fill(self) -> None:
        """Send requests until `in_flight` are outstanding. A request may end while it is being sent."""
        self._filling = True
        while self._outstanding < self.setup.in_flight:
            arrival = next(self._arrivals, None)
            if arrival is None:
                break
            self.send(arrival)
        self._filling = False

    def send(self, arrival: Arrival) -> None:
        """Have a client send a request now."""
        self._arrived += 1
        self._outstanding += 1
        self.recorder.arrived(self._arrived, arrival, self.now_ns)
        self._front.arrive(self._arrived, arrival)


def _earliest(engines: Mapping[str, Engine], at_ns: int | None) -> tuple[str | None, int, int]:
    """Return the engine with the earliest event, that time, and the time of the earliest other event."""
    first, first_ns, until_ns = None, 0, at_ns
    for name, engine in engines.items():
        next_ns = engine.next_event_ns()
        if next_ns is None:
            continue
        if first is None or next_ns < first_ns:
            if first is not None and (until_ns is None or first_ns < until_ns):
                until_ns = first_ns
            first, first_ns = name, next_ns
        elif until_ns is None or next_ns < until_ns:
            until_ns = next_ns
    return first, first_ns, 1 << 62 if until_ns is None else until_ns
