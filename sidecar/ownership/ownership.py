"""Ownership: `step(event, now_ns) -> effects`, and `may_dispatch`, which is called right before every dispatch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from sidecar.ownership import effects as do
from sidecar.ownership import events as ev
from sidecar.ownership import keeping, moving, taking
from sidecar.ownership.effects import Answer
from sidecar.ownership.enums import Purpose, Why
from sidecar.ownership.events import AskReceived
from sidecar.ownership.facts import Bounds, Member
from sidecar.ownership.slots import Acquiring, Asking, HandingOver, Lapsed, Owned, Slot
from sidecar.ownership.step import NEVER_NS, Knowledge, Step, leases_of


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
        moving.again(step, know.move)
    moving.drain(step)
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
    moving.request_one(step, event)


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
        moving.answered(step, know.move, event)
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
        moving.in_flight_ended(step, slot)


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


ANSWERS = {Purpose.GO_ON: _go_on, Purpose.TAKE_OVER: _take_over, Purpose.MOVE: moving.asked}


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
