"""A simulated process: the ownership of one member, its calls, and the requests that it dispatches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sidecar.ownership import effects as do
from sidecar.ownership import events as ev
from sidecar.ownership.enums import Why
from sidecar.ownership.facts import SECOND_NS, Member
from sidecar.ownership.ownership import Ownership
from sidecar.ownership.slots import Hold, Lapsed
from tests.worlds.ownership.scenario import MILLISECOND_NS

if TYPE_CHECKING:
    from tests.worlds.ownership.world import World


class Process:
    """One life of a process. While it is paused, nothing in it runs, and incoming messages wait."""

    def __init__(self, world: World, member: Member) -> None:
        self.world, self.member = world, member
        self.net = world.net
        self.clock = self.net.clock(world.random.randint(1, 1000) * SECOND_NS)
        self.ownership = Ownership(member, world.scenario.backends, world.scenario.bounds, world.random.random())
        self.alive, self.paused, self.draining = True, False, False
        self.in_flight: Counter[str] = Counter()
        self.ending: dict[str, None] = {}
        """Disowned backends whose requests in flight must end."""
        self.unseen: set[str] = set()
        """Backends that it considers gone."""
        self._addresses: set[str] = set()
        """The live members in Redis' last answer: it can ask only these, but any member can ask it."""
        self._backlog: list[Callable[[], None]] = []
        self._wakes = 0
        self.give(ev.Tick())
        self.net.after(0, self._dispatch)

    @property
    def local_ns(self) -> int:
        return self.clock.at(self.net.now_ns)

    def owns(self, backend: str) -> int | None:
        return self.ownership.may_dispatch(backend, self.local_ns) if self.alive else None

    def holds(self, backend: str) -> int | None:
        """Return the epoch of a lease that is not over by this member's clock, though it may be handed over."""
        lease = self.hold_of(backend) if self.alive else None
        return lease.epoch if lease is not None and self.local_ns < lease.valid_ns else None

    def keeps(self, backend: str) -> int | None:
        """Return the epoch of a lease that is not over, or may be again by pledges alone."""
        slot = self.ownership.know.slots.get(backend) if self.alive else None
        kept = None if slot is None else slot.asking_hold
        if kept is not None and (isinstance(slot.state, Lapsed) or kept.ask_ns is not None):
            return kept.epoch
        return self.holds(backend)

    def do(self, act: Callable[[], None]) -> None:
        """Run `act` in this process: now, or once it is no longer paused."""
        if self.alive and self.paused:
            self._backlog.append(act)
        elif self.alive:
            act()

    def give(self, event: ev.Event) -> None:
        self.do(lambda: self._step(event))

    def sees(self, backend: str, sees: bool) -> None:
        """Make a backend visible to this process, or gone."""
        self.unseen.discard(backend) if sees else self.unseen.add(backend)
        self.do(lambda: self._look_for(backend))

    def _look_for(self, backend: str) -> None:
        """Tell of what is so now: a process that was stopped does not see what was so meanwhile."""
        if backend in self.unseen:
            self._step(ev.BackendGone(backend))
        else:
            self._step(ev.BackendFound(backend, self.world.scenario.backends[backend]))

    def hold_of(self, backend: str) -> Hold | None:
        """Return its lease of a backend, though it may be over and wait for pledges; None if it has none."""
        slot = self.ownership.know.slots.get(backend)
        return None if slot is None else slot.hold or slot.asking_hold

    def resume(self) -> None:
        """Resume the process, with its timer first or with its messages first."""
        self.paused = False
        backlog, self._backlog = self._backlog, []
        if self.world.random.random() < 0.5:
            backlog.reverse()
        for act in backlog:
            self.do(act)

    def _step(self, event: ev.Event) -> None:
        now_ns = self.local_ns
        if isinstance(event, ev.BackendGone):
            self.world.checks.forgets(self, event.backend)
        if isinstance(event, ev.BeatAnswered):
            self._addresses = {member.id for member in event.members}
        effects = self.ownership.step(event, now_ns)
        self.world.trace(self, event, effects)
        if isinstance(event, ev.AskReceived):
            agreed = any(isinstance(effect, do.Answer) and effect.agreed for effect in effects)
            self.world.checks.answered(self, event, agreed)
        for effect in effects:
            EFFECTS[type(effect)](self, effect)
        self.world.checks.stepped(self)

    # Effects.

    def wake_at(self, effect: do.WakeAt) -> None:
        self._wakes += 1
        wake = self._wakes
        tick: Callable[[], None] = lambda: self._step(ev.Tick()) if wake == self._wakes else None  # noqa: E731
        self.net.at(self.clock.when(effect.at_ns), lambda: self.do(tick))

    def call(self, effect: Any, run: Callable[[int], ev.Event | None], failed: ev.Event | None) -> None:
        """Run a script in the current Redis; without an answer in time it fails."""
        world, redis = self.world, self.world.redis
        if failed is not None:
            patience_ns = world.scenario.bounds.retry_ns if redis.up else MILLISECOND_NS
            self.net.at(self.clock.when(self.local_ns + patience_ns), lambda: self.give(failed))

        def arrive() -> None:
            if redis is world.redis and redis.up:
                answer = run(redis.now_ns)
                if answer is not None:
                    self.net.send("redis", self.member.id, lambda: self.give(answer))

        self.net.send(self.member.id, "redis", arrive)

    def beat(self, effect: do.SendBeat) -> None:
        scripts = self.world.redis.scripts
        self.call(
            effect, lambda now_ns: scripts.beat(effect.number, effect.member, now_ns), ev.BeatFailed(effect.number)
        )

    def acquire(self, effect: do.SendAcquire) -> None:
        scripts = self.world.redis.scripts

        def run(now_ns: int) -> ev.LeaseAnswered:
            before = scripts.data.leases.get(effect.backend)
            answer = scripts.acquire(effect, self.member, now_ns)
            if scripts.data.leases.get(effect.backend) is not before:
                self.world.checks.granted(self, effect, before, now_ns)
            return answer

        self.call(effect, run, ev.LeaseFailed(effect.number))

    def renew(self, effect: do.SendRenew) -> None:
        scripts = self.world.redis.scripts
        self.call(effect, lambda now_ns: scripts.renew(effect, now_ns), ev.LeaseFailed(effect.number))

    def release(self, effect: do.SendRelease) -> None:
        scripts = self.world.redis.scripts
        self.call(effect, lambda now_ns: scripts.release(effect, now_ns), None)

    def leave(self, effect: do.SendLeave) -> None:
        scripts = self.world.redis.scripts
        self.call(effect, lambda now_ns: scripts.leave(effect.member, now_ns), None)
        self.alive = False
        self.world.counts["left"] += 1

    def ask(self, effect: do.SendAsk) -> None:
        if effect.to not in self._addresses:
            return
        event = ev.AskReceived(effect.number, self.member.id, effect.backend, effect.purpose, effect.epoch)
        to = self.world.processes[effect.to]
        self.net.send(self.member.id, to.member.id, lambda: to.give(event))

    def answer(self, effect: do.Answer) -> None:
        event = ev.AskAnswered(
            effect.number, self.member.id, effect.agreed, effect.holds, effect.reaches_redis, effect.epoch
        )
        to = self.world.processes[effect.to]
        self.net.send(self.member.id, to.member.id, lambda: to.give(event))

    def own(self, effect: do.Own) -> None:
        self.world.counts["owned"] += 1
        self.ending.pop(effect.backend, None)

    def disown(self, effect: do.Disown) -> None:
        self.world.counts[f"disowned, {effect.why.name}"] += 1
        if effect.why in (Why.MOVED, Why.DRAINING):
            self.ending[effect.backend] = None
            self._end_if_idle(effect.backend)

    # Requests.

    def _dispatch(self) -> None:
        """Periodically send a request to each backend that this member may dispatch to."""
        if not self.alive:
            return
        self.net.after(self.world.random.randint(50, 600) * MILLISECOND_NS, self._dispatch)
        if self.paused:
            return
        for backend in self.world.scenario.backends:
            epoch = self.owns(backend)
            if epoch is not None:
                self.in_flight[backend] += 1
                self._write(backend, epoch)

    def _write(self, backend: str, epoch: int) -> None:
        """Write a request a moment after the check; the process may be stopped in between."""
        checked_ns, strayed = self.net.now_ns, self.member.id in self.world.checks.strays_of(backend)

        def write() -> None:
            self.world.checks.written(self, backend, epoch, checked_ns, strayed)
            longest_ns = self.world.scenario.bounds.ttl_ns // 4
            self.net.after(self.world.random.randint(MILLISECOND_NS, longest_ns), lambda: self.do(ended))

        def ended() -> None:
            self.in_flight[backend] -= 1
            self._end_if_idle(backend)

        self.net.after(self.world.random.randint(0, 3) * MILLISECOND_NS, lambda: self.do(write))
        self.world.checked(self)

    def _end_if_idle(self, backend: str) -> None:
        if backend in self.ending and not self.in_flight[backend]:
            del self.ending[backend]
            self.net.after(0, lambda: self.give(ev.InFlightEnded(backend)))


EFFECTS: dict[type, Callable[[Process, Any], None]] = {
    do.WakeAt: Process.wake_at,
    do.SendBeat: Process.beat,
    do.SendAcquire: Process.acquire,
    do.SendRenew: Process.renew,
    do.SendRelease: Process.release,
    do.SendLeave: Process.leave,
    do.SendAsk: Process.ask,
    do.Answer: Process.answer,
    do.Own: Process.own,
    do.Disown: Process.disown,
}
