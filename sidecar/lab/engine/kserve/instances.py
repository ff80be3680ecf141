"""Several instances of one model behind one address, as Triton's `instance_group` makes them.

Each has an engine of its own: caches, queue, seats. A request cannot say which one it goes to, and does not learn which
one it was; what one instance was sent, the others do not have.

They take turns, whatever is in flight: the backend hands a request to its executor and returns, so that to Triton an
instance is free again at once. Measured on Triton 24.10 with three instances of a decoupled model: 24 requests at once
went 8 to each, and one with work in flight was given every third all the same. There one is now and then taken twice
before another's turn, which is not modelled. Nor is that Triton gives a `stop` to any instance: here it reaches the one
that runs the request.
"""

from __future__ import annotations

from collections.abc import Sequence

from sidecar.lab.engine.engine import Engine
from sidecar.lab.engine.kserve.driver import Driver
from sidecar.lab.engine.kserve.work import Work


class Instances:
    """Gives the requests to the instances in turn."""

    def __init__(self, drivers: Sequence[Driver]) -> None:
        self._drivers = drivers
        self._next = 0

    @property
    def engine(self) -> Engine:
        """The first instance's engine; all are built alike."""
        return self._drivers[0].engine

    @property
    def has_log_probs(self) -> bool:
        """Whether requests may ask for log probabilities."""
        return self._drivers[0].has_log_probs

    def has_adapter(self, task_id: int) -> bool:
        """Whether every instance has an adapter."""
        return all(driver.has_adapter(task_id) for driver in self._drivers)

    async def submit(self, work: Work) -> None:
        """Hand a request to an instance. Raises BackendError as `Driver.submit` does."""
        chosen = self._drivers[self._next]
        self._next = (self._next + 1) % len(self._drivers)
        await chosen.submit(work)

    def cancel(self, request_ids: Sequence[int]) -> None:
        """Ask the instances to end requests; those that none of them has are ignored."""
        for driver in self._drivers:
            driver.cancel(request_ids)

    def last_writer(self) -> Engine:
        """Return the engine that was the last to write its gauges, the first one while none has."""
        return max(self._drivers, key=lambda driver: driver.reported_ns).engine
