"""Ownership: `step(event, now_ns) -> effects`, and `may_dispatch`, which is called right before every dispatch.

Move backends to their preferred members, one at a time per giving and per taking member.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from sidecar.ownership import effects as do
from sidecar.ownership import events as ev
from sidecar.ownership import keeping, taking
from sidecar.ownership.effects import Answer
from sidecar.ownership.enums import Purpose, Why
from sidecar.ownership.events import AskAnswered, AskReceived, BeatAnswered
from sidecar.ownership.facts import Bounds, Lease, Member
from sidecar.ownership.preference import order
from sidecar.ownership.slots import Acquiring, Asking, Free, HandingOver, Lapsed, Move, Owned, Slot
from sidecar.ownership.step import NEVER_NS, Knowledge, Step, leases_of


def request_one(step: Step, event: BeatAnswered) -> None:
    """Ask for one backend that should be this member's and is another's."""
    know = step.know
    leases = leases_of(event)
    move = know.move
    if move is not None:
        if _is_owned_by(leases.get(move.backend), move.owner):
            step.ask_by(step.now + know.bounds.retry_ns)
            return
        know.move = None
    names = sorted(know.slots)
    start = next((at for at, name in enumerate(names) if name > know.asked_last), 0)
    for name in names[start:] + names[:start]:
        lease = leases.get(name)
        if lease is not None and _belongs_here(step, know.slots[name], lease):
            _ask(step, name, lease.holder)
            return


def _is_owned_by(lease: Lease | None, owner: str) -> bool:
    return lease is not None and lease.holder == owner and lease.left_ns > 0


def _belongs_here(step: Step, slot: Slot, lease: Lease) -> bool:
    know = step.know
    is_held = lease.left_ns > 0 and lease.holder != know.member.id and lease.holder in know.members
    return is_held and isinstance(slot.state, Free) and _preferred(step, slot) == know.member.id


def _preferred(step: Step, slot: Slot) -> str:
    ranked = order(slot.backend, slot.home, step.know.members.values())
    return ranked[0].id if ranked else ""


def _ask(step: Step, backend: str, owner: str) -> None:
    know = step.know
    round_ = step.ask(backend, Purpose.MOVE, [owner], know.epochs.get(backend, 0))
    (number,) = round_.missing
    know.move = Move(backend, owner, number, step.now + know.every_ns)
    know.asked_last = backend


def answered(step: Step, move: Move, event: AskAnswered) -> None:
    if event.agreed:
        move.agreed = True
        step.ask_by(step.now + step.know.bounds.retry_ns)
    else:
        step.know.move = None


def again(step: Step, move: Move) -> None:
    """Repeat an ask that was agreed to until it is done; drop one that was not answered."""
    if move.agreed:
        _ask(step, move.backend, move.owner)
    else:
        step.know.move = None


def asked(step: Step, event: AskReceived) -> bool:
    """Begin to hand over a backend to the member that is preferred for it, unless another hand-over is in progress."""
    slot = step.know.slots.get(event.backend)
    if slot is None or slot.hold is None or _preferred(step, slot) != event.member:
        return False
    if isinstance(slot.state, Owned) and not step.is_handing_over:
        step.hand_over(slot, Why.MOVED)
    return isinstance(slot.state, HandingOver)


def in_flight_ended(step: Step, slot: Slot) -> None:
    """Note that a hand-over has nothing in flight; the lease is given back once Redis has confirmed it."""
    if isinstance(slot.state, HandingOver):  # otherwise the lease has ended meanwhile
        slot.state.is_idle = True
        slot.state.hold.renew_ns = step.now


def drain(step: Step) -> None:
    """Hand over the next backend; leave after the last one."""
    know = step.know
    if not know.member.draining or know.left or step.is_handing_over:
        return
    slots = [know.slots[name] for name in sorted(know.slots)]
    for slot in slots:
        if isinstance(slot.state, Owned):
            step.hand_over(slot, Why.DRAINING)
            return
    if all(isinstance(slot.state, Free) for slot in slots):
        know.left = True
        step.emit(do.SendLeave(know.member.id))


class Ownership:
    """The backends of one member, and its steps to own them.

    `backends` maps each backend to the name of its replica, or "" if any may own it. `jitter` in [0, 1) spreads the
    members: it shortens the interval of beats and renewals by up to a tenth.
    """

    def __init__(self, member: Member, backends: Mapping[str, str], bounds: Bounds, jitter: float = 0.0) -> None:
        slots = {backend: Slot(backend, home) for backend, home in sorted(backends.items())}
        self.know = Knowledge(bounds, member, slots, int(bounds.every_ns * (1 - jitter / 10)))

    def may_dispatch(self, backend: str, now_ns: int) -> int | None:
        """Return the epoch under which a request may be sent to a backend now, or None.

        It is never older than the newest epoch that this member has seen.
        """
        slot = self.know.slots.get(backend)
        state = None if slot is None else slot.state
        if not isinstance(state, Owned) or now_ns >= state.hold.valid_ns:
            return None
        return None if self.know.is_overtaken(backend, state.hold.epoch) else state.hold.epoch

    def is_handing_over(self, backend: str) -> bool:
        slot = self.know.slots.get(backend)
        return slot is not None and isinstance(slot.state, HandingOver)

    def step(self, event: ev.Event, now_ns: int) -> list[do.Effect]:
        """Take one event at `now_ns` (monotonic, never decreasing) and return the effects to carry out."""
        step = Step(now_ns, self.know)
        if self.know.left:
            return []
        _end_leases(step)
        HANDLERS[type(event)](step, event)
        _run_due(step)
        _set_wake(step)
        return step.effects


def _end_leases(step: Step) -> None:
    """End what is over, before anything else: no late answer may prolong a lease that ended during a pause."""
    know = step.know
    for slot in know.slots.values():
        if slot.hold is not None and step.now >= slot.hold.valid_ns:
            keeping.keep(step, slot, slot.hold)
    know.pledges = {backend: each for backend, each in know.pledges.items() if step.now < each.until_ns}
    know.heard = {claim: until_ns for claim, until_ns in know.heard.items() if step.now < until_ns}


def _run_due(step: Step) -> None:
    know = step.know
    for slot in know.slots.values():
        if isinstance(slot.state, Asking):
            taking.acquire_when_agreed(step, slot)
        elif isinstance(slot.state, Lapsed):
            keeping.review_lapsed(step, slot, slot.state.hold)
        elif slot.hold is not None:
            keeping.keep(step, slot, slot.hold)
    if know.move is not None and step.now >= know.move.again_ns:
        again(step, know.move)
    drain(step)
    if know.beat is None and step.now >= know.beat_ns and not know.left:
        know.beat = step.number()
        know.beat_ns = step.now + know.every_ns
        step.emit(do.SendBeat(know.beat, know.member))


def _set_wake(step: Step) -> None:
    know = step.know
    dues = [know.beat_ns] if know.beat is None else []
    if know.move is not None:
        dues.append(know.move.again_ns)
    for slot in know.slots.values():
        state = slot.state
        if isinstance(state, Asking):
            dues.append(state.round.sent_ns + know.bounds.ask_ns)
        elif isinstance(state, Lapsed):
            dues.append(step.now if state.hold.ask_ns is None else state.hold.ask_ns)
        elif isinstance(state, Owned | HandingOver):
            hold = state.hold
            dues.append(hold.valid_ns)
            if hold.call is None:
                dues.append(hold.renew_ns)
            if hold.ask_ns is not None and isinstance(state, Owned):
                dues.append(hold.ask_ns)
    wake_ns = NEVER_NS if know.left else min(dues, default=NEVER_NS)
    if wake_ns != know.wake_ns:
        know.wake_ns = wake_ns
        if wake_ns != NEVER_NS:
            step.emit(do.WakeAt(wake_ns))


def _beat_answered(step: Step, event: ev.BeatAnswered) -> None:
    know = step.know
    know.reaches_redis = True
    if event.number != know.beat:
        return
    know.beat = None
    know.members = {member.id: member for member in event.members}
    leases = leases_of(event)
    for lease in event.leases:
        step.saw(lease.backend, lease.epoch)
        if lease.left_ns >= know.bounds.attempt_ns:  # too late for any takeover that this member agreed to before
            know.over.pop(lease.backend, None)
    if know.member.draining:
        return
    for slot in know.slots.values():
        taking.consider(step, slot, leases.get(slot.backend), event)
    request_one(step, event)


def _beat_failed(step: Step, event: ev.BeatFailed) -> None:
    know = step.know
    if event.number == know.beat:
        know.beat = None
        know.reaches_redis = False
        step.ask_by(step.now + know.bounds.retry_ns)


def _lease_answered(step: Step, event: ev.LeaseAnswered) -> None:
    step.know.reaches_redis = True
    slot = step.know.calls.pop(event.number, None)
    if slot is None:
        return
    step.saw(slot.backend, event.epoch)
    if isinstance(slot.state, Acquiring):
        taking.answered(step, slot, slot.state, event)
    elif slot.hold is not None:
        keeping.answered(step, slot, slot.hold, event)


def _lease_failed(step: Step, event: ev.LeaseFailed) -> None:
    slot = step.know.calls.pop(event.number, None)
    if slot is None:
        return
    step.know.reaches_redis = False
    if slot.hold is not None:
        keeping.failed(step, slot.hold)
    else:
        taking.give_up(step, slot)


def _ask_answered(step: Step, event: ev.AskAnswered) -> None:
    know = step.know
    if know.move is not None and event.number == know.move.number:
        answered(step, know.move, event)
        return
    for slot in know.slots.values():
        state, hold = slot.state, slot.asking_hold
        round_ = state.round if isinstance(state, Asking) else None if hold is None else hold.round
        if round_ is None or event.number not in round_.missing:
            continue
        step.saw(slot.backend, event.epoch)
        del round_.missing[event.number]
        if event.agreed:
            round_.agreed.append(event.member)
        round_.refused |= not event.agreed
        round_.holder |= event.holds
        if hold is not None:
            keeping.go_on(step, slot, hold)
        else:
            step.believe(slot.backend, event.member, event.agreed)


def _in_flight_ended(step: Step, event: ev.InFlightEnded) -> None:
    slot = step.know.slots.get(event.backend)
    if slot is not None:
        in_flight_ended(step, slot)


def _backend_found(step: Step, event: ev.BackendFound) -> None:
    know = step.know
    if event.backend not in know.slots:
        know.slots = dict(sorted({**know.slots, event.backend: Slot(event.backend, event.home)}.items()))
        step.ask_by(step.now)


def _backend_gone(step: Step, event: ev.BackendGone) -> None:
    """Give back a backend's lease, since other members may still know the backend. Its newest epoch is remembered."""
    know = step.know
    slot = know.slots.pop(event.backend, None)
    if slot is None:
        return
    if isinstance(slot.state, Owned):
        step.emit(do.Disown(slot.backend, Why.GONE))
    if isinstance(slot.state, Acquiring | Owned | Lapsed | HandingOver):
        step.give_back(slot)
    know.calls = {number: each for number, each in know.calls.items() if each is not slot}
    if know.move is not None and know.move.backend == event.backend:
        know.move = None
    step.ask_by(step.now)


def _drain_begun(step: Step, _: ev.DrainBegun) -> None:
    step.know.member = replace(step.know.member, draining=True)
    step.know.move = None
    step.ask_by(step.now)


def _tick(step: Step, _: ev.Tick) -> None:
    step.know.wake_ns = NEVER_NS


def received(step: Step, event: AskReceived) -> None:
    slot = step.know.slots.get(event.backend)
    hold = None if slot is None else slot.hold
    agreed = ANSWERS[event.purpose](step, event)
    step.saw(event.backend, event.epoch)
    if hold is not None:
        step.saw(event.backend, hold.epoch)
    epoch, reaches = step.know.epochs[event.backend], step.know.reaches_redis
    step.emit(Answer(event.number, event.member, agreed, hold is not None, reaches, epoch))


def _is_free_for(step: Step, event: AskReceived) -> bool:
    """Return True if a backend is neither held here nor pledged to a member other than the asking one."""
    slot = step.know.slots.get(event.backend)
    is_held = slot is not None and slot.hold is not None
    return not is_held and step.pledged_to(event.backend) in ("", event.member)


def _go_on(step: Step, event: AskReceived) -> bool:
    """Agree that an owner continues, if Redis is unreachable from here too; if it is not known to be, find out."""
    if step.know.reaches_redis:
        step.ask_by(step.now)
        return False
    if not _is_free_for(step, event) or step.is_over(event.backend, event.epoch):
        return False
    step.pledge(event.backend, event.member)
    return True


def _take_over(step: Step, event: AskReceived) -> bool:
    """Agree that another member takes over an ended lease, if neither this member nor a pledge of it keeps it."""
    if not _is_free_for(step, event):
        return False
    step.agree_to_follower(event.backend, event.epoch)
    return True


ANSWERS = {Purpose.GO_ON: _go_on, Purpose.TAKE_OVER: _take_over, Purpose.MOVE: asked}


HANDLERS: dict[type, Callable[[Step, Any], None]] = {
    ev.BeatAnswered: _beat_answered,
    ev.BeatFailed: _beat_failed,
    ev.LeaseAnswered: _lease_answered,
    ev.LeaseFailed: _lease_failed,
    ev.AskAnswered: _ask_answered,
    ev.AskReceived: received,
    ev.InFlightEnded: _in_flight_ended,
    ev.BackendFound: _backend_found,
    ev.BackendGone: _backend_gone,
    ev.DrainBegun: _drain_begun,
    ev.Tick: _tick,
}
