"""Virtual time: engines that step on a cost model, an agenda of everything else, and a front before the engines.

No engine is ever run past the time at which something else may happen: the engine with the least next event runs up
to the least of the others' and the agenda's. So what a front decides at a time reaches every engine at that time.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from sidecar.lab.engine.engine import Engine
from sidecar.lab.engine.messages import Event, Request
from sidecar.lab.sim.records import Recorder
from sidecar.lab.sim.setup import Setup
from sidecar.lab.sim.workloads import Arrival, Workload

BEGIN_NS = 1_000_000_000
"""The first instant: 0 is what the core takes for "not yet"."""
TOLD_EVERY = 256

Told = Callable[[int], None]


class Front(Protocol):
    """What stands between the clients and the engines."""

    def arrive(self, request_id: int, arrival: Arrival) -> None:
        """A client sends a request now."""

    def observe(self, backend: str, event: Event) -> None:
        """Something left an engine now."""


class World:
    """The engines, the agenda and the clients of one run."""

    def __init__(self, setup: Setup, workload: Workload, recorder: Recorder, told: Told | None = None) -> None:
        """`told` is given the number of requests that have ended, now and then."""
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
        self._told = told
        self._filling = False

    def build(self, backend: str) -> Engine:
        """Return an engine that has just been started."""
        return Engine(self.setup.engine.spec(), self.setup.engine.cost)

    # What fronts use.

    def after(self, delay_ns: int, act: Callable[[], None]) -> None:
        """Have something happen later, or at this instant once what is under way has been dealt with."""
        self._sequence += 1
        heapq.heappush(self._agenda, (self.now_ns + delay_ns, self._sequence, act))

    def submit(self, backend: str, request: Request) -> None:
        """Give an engine a request now; it is part of the next step that begins."""
        self.engines[backend].submit(request, self.now_ns)

    def over(self, request_id: int) -> None:
        """A client has its ending: in a closed loop it sends the next request."""
        self._outstanding -= 1
        if self._told is not None and (self._arrived - self._outstanding) % TOLD_EVERY == 0:
            self._told(self._arrived - self._outstanding)
        if not self.workload.open_loop and not self._filling:
            self._fill()

    # The run.

    def run(self, front: Front) -> None:
        """Let time pass until every arrival has come and nothing is left to happen."""
        self.front = front
        if self.workload.open_loop:
            self._next_arrival()
        else:
            self._fill()
        while self._step():
            pass

    def _step(self) -> bool:
        """Let the next thing happen; False when there is none."""
        at_ns = self._agenda[0][0] if self._agenda else None
        first, first_ns, until_ns = _earliest(self.engines, at_ns)
        if first is not None and (at_ns is None or first_ns <= at_ns):
            event = self.engines[first].run(until_ns)
            if event is not None:
                self.now_ns = event.at_ns
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
        """Send until as many are outstanding as may be. A request may end while it is being sent."""
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
    """Return the engine of the least next event, that time, and how far it may run: to the next of all others."""
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
