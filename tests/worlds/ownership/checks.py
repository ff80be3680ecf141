"""The invariants of ownership, seen from outside: who may dispatch, and what the engines received.

Two things are counted apart. *Late*: a write whose process was stopped after the check. *The known hole*: Redis grants
a backend, `grace_ns` after the last renewal, to a member that none of its owner's witnesses answered, while that owner,
a *stray* from then on, goes on by their pledges. A stray is one under the epoch that it had at that moment: under any
other, and for any other two who own one backend, nothing is excused. That strays end is checked, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sidecar.ownership import effects as do
from sidecar.ownership import events as ev
from sidecar.ownership.enums import Purpose
from sidecar.ownership.preference import order
from tests.worlds.ownership.redis import Record
from tests.worlds.ownership.scenario import MILLISECOND_NS

if TYPE_CHECKING:
    from tests.worlds.ownership.process import Process
    from tests.worlds.ownership.world import World

HOLE = "known hole, granted beside a stray"
HOLE_WRITES = "known hole, sent under an older epoch"
LATE_WRITES = "dispatched late, after a stop"
STOPPED_NS = 5 * MILLISECOND_NS
"""A longer time from the check to the write means that the process was stopped in between."""


class Violation(Exception):
    """An invariant is violated."""


def hold(condition: bool, text: str) -> None:
    if not condition:
        raise Violation(text)


class Checks:
    """Follows one world; raises Violation."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.newest: dict[str, tuple[int, str]] = {}
        """By backend: the newest epoch that its engine received, and the sender."""
        self.strays: dict[str, dict[str, int]] = {}
        """By backend: members that may dispatch besides the owner because of the known hole, with their epochs."""
        self._pledged: dict[tuple[str, str, str], int] = {}
        """By who agreed, with whom, and by backend: until when by its clock it keeps off."""
        self._moving: dict[tuple[str, str], int] = {}
        """By member and backend: until when the lease of what is handed over lasts."""

    def stepped(self, process: Process) -> None:
        """Check after each step of a member what it may have changed."""
        moving = [backend for backend in self.world.scenario.backends if process.ownership.is_handing_over(backend)]
        hold(len(moving) <= 1, f"{process.member.id} hands over {moving} at once")
        for backend in self.world.scenario.backends:
            self._is_done_with(process, backend)
            epoch = process.owns(backend)
            if epoch is not None:
                self._goes_on_in_time(process, backend)
                self._is_unaware(process, backend, epoch)
                self._is_alone(backend)

    def _is_unaware(self, process: Process, backend: str, epoch: int) -> None:
        """Check that no member uses an epoch that it knows to be over: a stray ends when it hears of a newer one."""
        seen = process.ownership.know.epochs.get(backend, 0)
        hold(seen <= epoch, f"{process.member.id} goes on with {backend} under {epoch} and has seen {seen}")

    def _goes_on_in_time(self, process: Process, backend: str) -> None:
        hold_, bounds = process.hold_of(backend), self.world.scenario.bounds
        alone_ns = 0 if hold_ is None else process.local_ns - hold_.granted_ns
        hold(alone_ns < bounds.alone_ns, f"{process.member.id} has had {backend} for {alone_ns} ns without Redis")

    def _is_done_with(self, process: Process, backend: str) -> None:
        """Check that a handed-over backend is kept until nothing is in flight or the lease ends."""
        key, hold_ = (process.member.id, backend), process.hold_of(backend)
        if process.ownership.is_handing_over(backend) and hold_ is not None:
            self._moving[key] = hold_.valid_ns
        elif process.local_ns < self._moving.pop(key, 0):
            in_flight = process.in_flight[backend]
            strayed = process.member.id in self.strays.get(backend, {})
            hold(
                not in_flight or strayed, f"{process.member.id} gave {backend} back with {in_flight} requests in flight"
            )

    def forgets(self, process: Process, backend: str) -> None:
        """Note that a member considers a backend gone: requests in flight there no longer keep it."""
        self._moving.pop((process.member.id, backend), None)

    def _is_alone(self, backend: str) -> None:
        owners = {each.member.id: each.owns(backend) for each in self._owners(backend)}
        strays = self.strays_of(backend)
        hold(len(owners.keys() - strays) <= 1, f"{backend} may be dispatched to by {owners}, of whom {strays} stray")

    def _owners(self, backend: str) -> list[Process]:
        return [each for each in self.world.living() if each.owns(backend) is not None]

    def strays_of(self, backend: str) -> set[str]:
        """Return the current strays, and forget former ones."""
        strays = self.strays.pop(backend, {})
        left = {
            member: epoch for member, epoch in strays.items() if self.world.processes[member].keeps(backend) == epoch
        }
        if left:
            self.strays[backend] = left
        return set(left)

    def granted(self, process: Process, call: do.SendAcquire, before: Record | None, now_ns: int) -> None:
        """Look at a lease that Redis has just granted in place of `before`: who strays from now on.

        A stray that claims its own, from a Redis that knows of nobody, makes a stray of whom it strayed from: neither
        has heard of the other. It is one itself until it hears that it has a newer epoch.
        """
        strays = self.strays_of(call.backend)
        for other in self.world.living():
            epoch = other.keeps(call.backend)
            if other is process or epoch is None or other.member.id in strays:
                continue
            if process.member.id in strays or self._is_the_hole(other, call, before, now_ns):
                self.strays.setdefault(call.backend, {})[other.member.id] = epoch
                self.world.note(f"{HOLE}: {call.backend} to {process.member.id} while {other.member.id} has {epoch}")
            elif other.holds(call.backend) is not None:
                raise Violation(
                    f"{call.backend} is granted to {process.member.id}; {other.member.id} has it under {epoch}"
                )

    def _is_the_hole(self, other: Process, call: do.SendAcquire, before: Record | None, now_ns: int) -> bool:
        """Whether nobody vouched, Redis waited for long enough, and `other` goes on by pledges of members unheard."""
        bounds, data = self.world.scenario.bounds, self.world.redis.scripts.data
        if before is None or before.generation != data.generation:
            since_ns, asked = data.born_ns, set[str]()
            is_open = not call.holds
        else:
            since_ns, asked = before.renewed_ns, {before.holder, *before.witnesses}
            is_open = not before.released
        if not is_open or now_ns < since_ns + bounds.grace_ns or not asked.isdisjoint(call.agreed):
            return False
        kept = other.hold_of(call.backend)
        assert kept is not None, f"{other.member.id} holds {call.backend} without a lease"
        witnesses = {each for named in kept.witnesses.values() for each in named}
        if other.holds(call.backend) is None and not witnesses.isdisjoint(call.agreed):
            return False  # it has lapsed, and for good: who agreed to another never pledges it again
        is_on_pledges = other.local_ns >= kept.granted_ns + bounds.usable_ns(bounds.ttl_ns)
        return is_on_pledges and not any(self._is_pledged(each, other, call.backend) for each in call.agreed)

    def _is_pledged(self, member: str, to: Process, backend: str) -> bool:
        until_ns = self._pledged.get((member, to.member.id, backend), 0)
        return self.world.processes[member].local_ns < until_ns

    def answered(self, process: Process, event: ev.AskReceived, agreed: bool) -> None:
        """Note what a member pledges when it agrees that another goes on."""
        if agreed and event.purpose is Purpose.GO_ON:
            bounds = self.world.scenario.bounds
            until_ns = process.local_ns + bounds.passed_ns(bounds.ttl_ns)
            self._pledged[process.member.id, event.member, event.backend] = until_ns

    def written(self, process: Process, backend: str, epoch: int, checked_ns: int, strayed: bool) -> None:
        """Check the epoch of a request that reaches an engine; `strayed` is whether its sender did at the check."""
        newest, owner = self.newest.get(backend, (0, ""))
        world = self.world
        world.counts["dispatched"] += 1
        state = process.hold_of(backend)
        if state is not None and process.local_ns > state.granted_ns + world.scenario.bounds.ttl_ns:
            world.counts["dispatched on pledges"] += 1
        if epoch >= newest:
            is_alone = epoch > newest or owner == process.member.id
            hold(is_alone, f"{backend}: epoch {epoch} of {process.member.id} and {owner}")
            self.newest[backend] = (epoch, process.member.id)
        elif world.net.now_ns - checked_ns > STOPPED_NS:
            world.counts[LATE_WRITES] += 1
        elif strayed or process.member.id in self.strays_of(backend):
            world.counts[HOLE_WRITES] += 1
        else:
            raise Violation(f"{backend} was sent epoch {epoch} of {process.member.id} after {newest}")

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
