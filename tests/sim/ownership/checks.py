"""What must hold, seen from outside: by who may dispatch, and by what the engines were sent.

One thing is counted instead, the known hole: a *stray* goes on on pledges while Redis grants its backend, `grace_ns`
later, to a member that none of its witnesses answered. All else is checked, and that strays end, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sidecar.ownership import effects as do
from sidecar.ownership.preference import order
from tests.sim.ownership.redis import Record
from tests.sim.ownership.scenario import MILLISECOND_NS

if TYPE_CHECKING:
    from tests.sim.ownership.process import Process
    from tests.sim.ownership.world import World

STRAYS = "strays: went on unheard of by a newcomer"
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
        self.strays: dict[str, set[str]] = {}
        """By backend: who may dispatch to it besides its owner, because of the known hole."""
        self._moving: dict[tuple[str, str], int] = {}
        """By member and backend: until when the lease of what is handed over lasts."""

    def stepped(self, process: Process) -> None:
        """Check after each step of a member what it may have changed."""
        moving = [backend for backend in self.world.scenario.backends if process.ownership.is_handing_over(backend)]
        hold(len(moving) <= 1, f"{process.member.id} hands over {moving} at once")
        for backend in self.world.scenario.backends:
            self._is_done_with(process, backend)
            if process.owns(backend) is not None:
                self._goes_on_in_time(process, backend)
                self._is_alone(backend)

    def _goes_on_in_time(self, process: Process, backend: str) -> None:
        hold_, bounds = process.hold_of(backend), self.world.scenario.bounds
        alone_ns = 0 if hold_ is None else process.local_ns - hold_.granted_ns
        hold(alone_ns < bounds.alone_ns, f"{process.member.id} has had {backend} for {alone_ns} ns without Redis")

    def _is_done_with(self, process: Process, backend: str) -> None:
        """Check that what is handed over is kept until nothing is in flight, or the lease ends."""
        key, hold_ = (process.member.id, backend), process.hold_of(backend)
        if process.ownership.is_handing_over(backend) and hold_ is not None:
            self._moving[key] = hold_.valid_ns
        elif process.local_ns < self._moving.pop(key, 0):
            in_flight = process.in_flight[backend]
            hold(not in_flight, f"{process.member.id} gave {backend} back with {in_flight} requests in flight")

    def forgets(self, process: Process, backend: str) -> None:
        """Take in that a member takes a backend for gone: what is in flight there is no reason to keep it."""
        self._moving.pop((process.member.id, backend), None)

    def _is_alone(self, backend: str) -> None:
        owners = {each.member.id: each.owns(backend) for each in self._owners(backend)}
        strays = self.strays_of(backend)
        hold(len(owners.keys() - strays) <= 1, f"{backend} may be dispatched to by {owners}, of whom {strays} stray")

    def _owners(self, backend: str) -> list[Process]:
        return [each for each in self.world.living() if each.owns(backend) is not None]

    def strays_of(self, backend: str) -> set[str]:
        """Return who strays still, and forget who does no longer."""
        strays = self.strays.pop(backend, set()) & {each.member.id for each in self._owners(backend)}
        if strays:
            self.strays[backend] = strays
        return strays

    def granted(self, process: Process, call: do.SendAcquire, before: Record | None, now_ns: int) -> None:
        """Look at a lease that Redis has just granted in place of `before`: whether somebody strays from now on."""
        others = [each for each in self._owners(call.backend) if each is not process]
        has_strays = bool(self.strays_of(call.backend))
        if others and (has_strays or self._is_the_hole(others, call, before, now_ns)):
            self.strays[call.backend] = {each.member.id for each in others}
            self.world.counts[STRAYS] += not has_strays

    def _is_the_hole(self, others: list[Process], call: do.SendAcquire, before: Record | None, now_ns: int) -> bool:
        """Whether nobody vouched, Redis waited for long enough, and all others go on on pledges of members unheard."""
        bounds, data = self.world.scenario.bounds, self.world.redis.scripts.data
        if before is None or before.generation != data.generation:
            since_ns, asked = data.born_ns, set[str]()
            is_open = not call.holds
        else:
            since_ns, asked = before.renewed_ns, {before.holder, *before.witnesses}
            is_open = not before.released
        if not is_open or now_ns < since_ns + bounds.grace_ns or not asked.isdisjoint(call.agreed):
            return False
        for other in others:
            kept = other.hold_of(call.backend)
            assert kept is not None, f"{other.member.id} owns {call.backend} without a lease"
            witnesses = {each for named in kept.witnesses.values() for each in named}
            is_on_pledges = other.local_ns >= kept.granted_ns + bounds.usable_ns(bounds.ttl_ns)
            if not is_on_pledges or not witnesses.isdisjoint(call.agreed):
                return False
        return True

    def written(self, process: Process, backend: str, epoch: int, checked_ns: int, strays: bool) -> None:
        """Check the epoch of a request that reaches an engine, sent by who owned the backend or strayed."""
        newest, owner = self.newest.get(backend, (0, ""))
        world = self.world
        world.counts["dispatched"] += 1
        state = process.hold_of(backend)
        if state is not None and process.local_ns > state.granted_ns + world.scenario.bounds.ttl_ns:
            world.counts["dispatched on pledges"] += 1
        if strays:
            world.counts["dispatched by a stray"] += 1
            return
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
