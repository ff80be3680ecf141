"""Ownership: `step(event, now_ns) -> effects`, and `may_dispatch` to be asked right before every dispatch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from sidecar.ownership import answering, keeping, moving, taking
from sidecar.ownership import effects as do
from sidecar.ownership import events as ev
from sidecar.ownership.enums import Why
from sidecar.ownership.facts import Bounds, Member
from sidecar.ownership.slots import Acquiring, Asking, HandingOver, Lapsed, Owned, Slot
from sidecar.ownership.step import NEVER_NS, Knowledge, Turn, leases_of


class Ownership:
    """What one member owns, and what it does to own it.

    `backends` maps each backend to the name of its replica, "" if any may own it. `jitter` in [0, 1) spreads members:
    the greater, the up to a tenth more often a member beats and renews.
    """

    def __init__(self, member: Member, backends: Mapping[str, str], bounds: Bounds, jitter: float = 0.0) -> None:
        slots = {backend: Slot(backend, home) for backend, home in sorted(backends.items())}
        self.know = Knowledge(bounds, member, slots, int(bounds.every_ns * (1 - jitter / 10)))

    def may_dispatch(self, backend: str, now_ns: int) -> int | None:
        """Return the epoch under which a request may go to a backend now, None if it may not.

        Never one that is older than the newest that this member has seen.
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
        """Take one event at `now_ns` (monotonic, never smaller than before) and return what is to be done."""
        turn = Turn(now_ns, self.know)
        if self.know.left:
            return []
        _end_what_is_over(turn)
        HANDLERS[type(event)](turn, event)
        _do_what_is_due(turn)
        _set_wake(turn)
        return turn.effects


def _end_what_is_over(turn: Turn) -> None:
    """Before anything else: a lease that ended during a pause must not be prolonged by what came in meanwhile."""
    know = turn.know
    for slot in know.slots.values():
        if slot.hold is not None and turn.now >= slot.hold.valid_ns:
            keeping.keep(turn, slot, slot.hold)
    know.pledges = {backend: each for backend, each in know.pledges.items() if turn.now < each.until_ns}
    know.heard = {said: until_ns for said, until_ns in know.heard.items() if turn.now < until_ns}


def _do_what_is_due(turn: Turn) -> None:
    know = turn.know
    for slot in know.slots.values():
        if isinstance(slot.state, Asking):
            taking.go_ahead(turn, slot)
        elif isinstance(slot.state, Lapsed):
            keeping.look_after(turn, slot, slot.state.hold)
        elif slot.hold is not None:
            keeping.keep(turn, slot, slot.hold)
    if know.move is not None and turn.now >= know.move.again_ns:
        moving.again(turn, know.move)
    moving.drain(turn)
    if know.beat is None and turn.now >= know.beat_ns and not know.left:
        know.beat = turn.number()
        know.beat_ns = turn.now + know.every_ns
        turn.emit(do.SendBeat(know.beat, know.member))


def _set_wake(turn: Turn) -> None:
    know = turn.know
    dues = [know.beat_ns] if know.beat is None else []
    if know.move is not None:
        dues.append(know.move.again_ns)
    for slot in know.slots.values():
        state = slot.state
        if isinstance(state, Asking):
            dues.append(state.round.sent_ns + know.bounds.ask_ns)
        elif isinstance(state, Lapsed):
            dues.append(turn.now if state.hold.ask_ns is None else state.hold.ask_ns)
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
            turn.emit(do.WakeAt(wake_ns))


def _beat_answered(turn: Turn, event: ev.BeatAnswered) -> None:
    know = turn.know
    know.reaches_redis = True
    if event.number != know.beat:
        return
    know.beat = None
    know.members = {member.id: member for member in event.members}
    leases = leases_of(event)
    for lease in event.leases:
        turn.saw(lease.backend, lease.epoch)
        if lease.left_ns >= know.bounds.attempt_ns:  # so nobody follows on what this member agreed to before
            know.over.pop(lease.backend, None)
    if know.member.draining:
        return
    for slot in know.slots.values():
        taking.look(turn, slot, leases.get(slot.backend), event)
    moving.look(turn, event)


def _beat_failed(turn: Turn, event: ev.BeatFailed) -> None:
    know = turn.know
    if event.number == know.beat:
        know.beat = None
        know.reaches_redis = False
        turn.look_at(turn.now + know.bounds.retry_ns)


def _lease_answered(turn: Turn, event: ev.LeaseAnswered) -> None:
    turn.know.reaches_redis = True
    slot = turn.know.calls.pop(event.number, None)
    if slot is None:
        return
    turn.saw(slot.backend, event.epoch)
    if isinstance(slot.state, Acquiring):
        taking.answered(turn, slot, slot.state, event)
    elif slot.hold is not None:
        keeping.answered(turn, slot, slot.hold, event)


def _lease_failed(turn: Turn, event: ev.LeaseFailed) -> None:
    slot = turn.know.calls.pop(event.number, None)
    if slot is None:
        return
    turn.know.reaches_redis = False
    if slot.hold is not None:
        keeping.failed(turn, slot.hold)
    else:
        taking.give_up(turn, slot)


def _ask_answered(turn: Turn, event: ev.AskAnswered) -> None:
    know = turn.know
    if know.move is not None and event.number == know.move.number:
        moving.answered(turn, know.move, event)
        return
    for slot in know.slots.values():
        state, hold = slot.state, slot.asking_hold
        round_ = state.round if isinstance(state, Asking) else None if hold is None else hold.round
        if round_ is None or event.number not in round_.missing:
            continue
        turn.saw(slot.backend, event.epoch)
        del round_.missing[event.number]
        if event.agreed:
            round_.agreed.append(event.member)
        round_.refused |= not event.agreed
        round_.holder |= event.holds
        if hold is not None:
            keeping.go_on(turn, slot, hold)
        else:
            turn.believe(slot.backend, event.member, event.agreed)


def _in_flight_ended(turn: Turn, event: ev.InFlightEnded) -> None:
    slot = turn.know.slots.get(event.backend)
    if slot is not None:
        moving.in_flight_ended(turn, slot)


def _backend_found(turn: Turn, event: ev.BackendFound) -> None:
    know = turn.know
    if event.backend not in know.slots:
        know.slots = dict(sorted({**know.slots, event.backend: Slot(event.backend, event.home)}.items()))
        turn.look_at(turn.now)


def _backend_gone(turn: Turn, event: ev.BackendGone) -> None:
    """Give back what this member has of it: others may still know it. The newest epoch of it stays known."""
    know = turn.know
    slot = know.slots.pop(event.backend, None)
    if slot is None:
        return
    if isinstance(slot.state, Owned):
        turn.emit(do.Disown(slot.backend, Why.GONE))
    if isinstance(slot.state, Acquiring | Owned | Lapsed | HandingOver):
        turn.give_back(slot)
    know.calls = {number: each for number, each in know.calls.items() if each is not slot}
    if know.move is not None and know.move.backend == event.backend:
        know.move = None
    turn.look_at(turn.now)


def _drain_begun(turn: Turn, _: ev.DrainBegun) -> None:
    turn.know.member = replace(turn.know.member, draining=True)
    turn.know.move = None
    turn.look_at(turn.now)


def _tick(turn: Turn, _: ev.Tick) -> None:
    turn.know.wake_ns = NEVER_NS


HANDLERS: dict[type, Callable[[Turn, Any], None]] = {
    ev.BeatAnswered: _beat_answered,
    ev.BeatFailed: _beat_failed,
    ev.LeaseAnswered: _lease_answered,
    ev.LeaseFailed: _lease_failed,
    ev.AskAnswered: _ask_answered,
    ev.AskReceived: answering.received,
    ev.InFlightEnded: _in_flight_ended,
    ev.BackendFound: _backend_found,
    ev.BackendGone: _backend_gone,
    ev.DrainBegun: _drain_begun,
    ev.Tick: _tick,
}
