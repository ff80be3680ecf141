"""One step in progress: what this member knows, the time, and the effects so far."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from sidecar.ownership import effects as do
from sidecar.ownership.enums import Purpose, Why
from sidecar.ownership.events import BeatAnswered
from sidecar.ownership.facts import Bounds, Lease, Member
from sidecar.ownership.slots import Acquiring, Free, Ground, HandingOver, Lapsed, Move, Owned, Pledge, Round, Slot

NEVER_NS = 1 << 62


@dataclass
class Knowledge:
    """All that a member remembers. None of it outlives the member."""

    bounds: Bounds
    member: Member
    slots: dict[str, Slot]
    every_ns: int
    """The time between two beats, and between two renewals of a lease."""
    beat_ns: int = 0
    """When the next beat is due."""
    beat: int | None = None
    """The number of the beat that Redis has not answered yet."""
    reaches_redis: bool = False
    left: bool = False
    members: dict[str, Member] = field(default_factory=dict)
    """The live members in Redis's last answer to a beat."""
    epochs: dict[str, int] = field(default_factory=dict)
    """The newest epoch seen, by backend."""
    over: dict[str, int] = field(default_factory=dict)
    """The newest epoch that is over for good, by backend: this member has agreed to a later owner."""
    pledges: dict[str, Pledge] = field(default_factory=dict)
    heard: dict[tuple[str, str], int] = field(default_factory=dict)
    """By (backend, member): until when its answer that it holds the backend, or has pledged it to another, counts."""
    calls: dict[int, Slot] = field(default_factory=dict)
    """Acquisitions and renewals that await an answer."""
    move: Move | None = None
    asked_last: str = ""
    """The backend for which a move was last asked."""
    numbers: int = 0
    wake_ns: int = NEVER_NS

    def is_overtaken(self, backend: str, epoch: int) -> bool:
        """Return True if a newer epoch of a backend has been seen than the one granted."""
        return self.epochs.get(backend, 0) > epoch


@dataclass
class Step:
    now: int
    know: Knowledge
    effects: list[do.Effect] = field(default_factory=list)

    def emit(self, effect: do.Effect) -> None:
        self.effects.append(effect)

    def number(self) -> int:
        self.know.numbers += 1
        return self.know.numbers

    def ask_by(self, at_ns: int) -> None:
        """Ask Redis for its state at a time, or earlier."""
        self.know.beat_ns = min(self.know.beat_ns, max(at_ns, self.now))

    def saw(self, backend: str, epoch: int) -> None:
        self.know.epochs[backend] = max(epoch, self.know.epochs.get(backend, 0))

    def agree_to_follower(self, backend: str, epoch: int) -> None:
        """Remember that a backend may get owners under epochs that this member never hears of."""
        self.know.over[backend] = max(epoch, self.know.epochs.get(backend, 0), self.know.over.get(backend, 0))

    def is_over(self, backend: str, epoch: int) -> bool:
        return self.know.is_overtaken(backend, epoch) or self.know.over.get(backend, 0) >= epoch

    def pledged_to(self, backend: str) -> str:
        """Return the member to which a backend is pledged, "" if there is none."""
        pledge = self.know.pledges.get(backend)
        return pledge.to if pledge is not None and self.now < pledge.until_ns else ""

    def pledge(self, backend: str, to: str) -> None:
        assert self.pledged_to(backend) in ("", to), f"{backend} is pledged to another"
        self.know.pledges[backend] = Pledge(to, self.now + self.know.bounds.passed_ns(self.know.bounds.ttl_ns))

    def believe(self, backend: str, member: str, is_free: bool) -> None:
        """Remember a member's answer that a backend is not free for the length of a lease; forget it if it is free."""
        self.know.heard.pop((backend, member), None)
        if not is_free:
            self.know.heard[backend, member] = self.now + self.know.bounds.passed_ns(self.know.bounds.ttl_ns)

    def is_believed_taken(self, backend: str) -> bool:
        return any(each == backend and self.now < until_ns for (each, _), until_ns in self.know.heard.items())

    def ask(self, backend: str, purpose: Purpose, whom: Iterable[str], epoch: int) -> Round:
        missing = {self.number(): each for each in sorted(set(whom)) if each != self.know.member.id}
        for number, to in missing.items():
            self.emit(do.SendAsk(number, to, backend, purpose, epoch))
        return Round(self.now, missing)

    def acquire(
        self, slot: Slot, token: str, ground: Ground, agreed: tuple[str, ...], holds: bool = False
    ) -> do.SendAcquire:
        """Ask Redis for a lease; a `token` of "" means a new one."""
        number, know = self.number(), self.know
        know.calls[number] = slot
        call = do.SendAcquire(
            number,
            slot.backend,
            token or f"{know.member.id}:{number}",
            know.epochs.get(slot.backend, 0),
            self.witnesses(),
            agreed,
            holds,
            ground.generation,
            ground.by_ns,
        )
        self.emit(call)
        return call

    def witnesses(self) -> tuple[str, ...]:
        """Return the members that this one would ask if Redis became unreachable now, itself included."""
        return tuple(sorted({*self.know.members, self.know.member.id}))

    def ground(self, generation: str, redis_ns: int) -> Ground:
        return Ground(generation, redis_ns + self.know.bounds.attempt_ns)

    def lose(self, slot: Slot, why: Why) -> None:
        """Give up a lease that is over, and release it in case Redis still has it."""
        hold = slot.hold
        assert hold is not None
        if isinstance(slot.state, Owned):
            self.emit(do.Disown(slot.backend, why))
        self.give_back(slot)
        self.ask_by(self.now)

    def give_back(self, slot: Slot) -> None:
        """Release what this member has, or may have, been granted."""
        state = slot.state
        if isinstance(state, Acquiring):
            token, number = state.call.token, state.call.number
        else:
            assert isinstance(state, Owned | Lapsed | HandingOver), f"{slot.backend}: nothing was granted"
            token, number = state.hold.token, state.hold.call.number if state.hold.call is not None else 0
        self.know.calls.pop(number, None)
        self.emit(do.SendRelease(slot.backend, token))
        slot.become(state.free if isinstance(state, Acquiring) else Free())

    def hand_over(self, slot: Slot, why: Why) -> None:
        """Stop dispatching, so that the lease can be released once nothing is in flight."""
        assert isinstance(slot.state, Owned), f"{slot.backend} is not owned"
        assert not self.is_handing_over, "one at a time"
        slot.state.hold.round = None
        slot.become(HandingOver(slot.state.hold))
        self.emit(do.Disown(slot.backend, why))

    @property
    def is_handing_over(self) -> bool:
        return any(isinstance(slot.state, HandingOver) for slot in self.know.slots.values())


def leases_of(event: BeatAnswered) -> dict[str, Lease]:
    return {lease.backend: lease for lease in event.leases}
