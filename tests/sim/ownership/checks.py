"""What must hold, seen from outside: by who may dispatch, and by what the engines were sent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sidecar.ownership.preference import order
from tests.sim.ownership.scenario import MILLISECOND_NS

if TYPE_CHECKING:
    from tests.sim.ownership.process import Process
    from tests.sim.ownership.world import World

STOPPED_NS = 5 * MILLISECOND_NS
"""Longer from the check to the write only if the process was stopped in between."""


class Violation(Exception):
    """Something that must hold does not."""


def hold(condition: bool, text: str) -> None:
    if not condition:
        raise Violation(text)


class Checks:
    """Follows one world; raises Violation."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.newest: dict[str, tuple[int, str]] = {}
        """By backend: the newest epoch that its engine was sent, and by whom."""
        self._moving: dict[tuple[str, str], int] = {}
        """By member and backend: until when the lease of what is handed over lasts."""

    def stepped(self, process: Process) -> None:
        """Check after each step of a member what it may have changed."""
        moving = [backend for backend in self.world.scenario.backends if process.ownership.is_handing_over(backend)]
        hold(len(moving) <= 1, f"{process.member.id} hands over {moving} at once")
        for backend in self.world.scenario.backends:
            self._is_done_with(process, backend)
            if process.owns(backend) is not None:
                self._is_alone(backend)

    def _is_done_with(self, process: Process, backend: str) -> None:
        """Check that what is handed over is kept until nothing is in flight, or the lease ends."""
        key, hold_ = (process.member.id, backend), process.ownership.know.slots[backend].hold
        if process.ownership.is_handing_over(backend) and hold_ is not None:
            self._moving[key] = hold_.valid_ns
        elif process.local_ns < self._moving.pop(key, 0):
            in_flight = process.in_flight[backend]
            hold(not in_flight, f"{process.member.id} gave {backend} back with {in_flight} requests in flight")

    def _is_alone(self, backend: str) -> None:
        owners = {each.member.id: each.owns(backend) for each in self.world.living() if each.owns(backend) is not None}
        hold(len(owners) == 1, f"{backend} may be dispatched to by {owners}")

    def written(self, process: Process, backend: str, epoch: int, checked_ns: int) -> None:
        """Check the epoch of a request that reaches an engine."""
        newest, owner = self.newest.get(backend, (0, ""))
        world = self.world
        world.counts["dispatched"] += 1
        state = process.ownership.know.slots[backend].hold
        if state is not None and process.local_ns > state.granted_ns + world.scenario.bounds.ttl_ns:
            world.counts["dispatched on pledges"] += 1
        if epoch < newest:
            late_ns = world.net.now_ns - checked_ns
            world.counts["dispatched late, after a stop"] += 1
            hold(late_ns > STOPPED_NS, f"{backend} was sent epoch {epoch} of {process.member.id} after {newest}")
            return
        hold(
            epoch > newest or owner == process.member.id, f"{backend}: epoch {epoch} of {process.member.id} and {owner}"
        )
        self.newest[backend] = (epoch, process.member.id)

    def owner(self, backend: str) -> str:
        """Return the name of the member that has a backend, even if it hands it over; "" if none."""
        for each in self.world.living():
            if each.owns(backend) is not None or each.ownership.is_handing_over(backend):
                return each.member.name
        return ""

    def preferred(self, backend: str) -> str:
        """Return the name of who should have a backend in the end, "" if nobody may."""
        members = [each.member for each in self.world.living() if not each.draining]
        ranked = order(backend, self.world.scenario.backends[backend], members)
        return ranked[0].name if ranked else ""
