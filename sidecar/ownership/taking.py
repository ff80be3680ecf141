"""Acquire a backend without an owner: at once if its lease was released or as a witness, else with one's agreement.

If no witness answers, it is acquired after `grace_ns`, unless any member has answered within the length of a lease that
it holds the backend or has pledged it to its owner.
"""

from __future__ import annotations

from sidecar.ownership import events as ev
from sidecar.ownership.effects import Own
from sidecar.ownership.enums import Purpose
from sidecar.ownership.facts import Lease
from sidecar.ownership.preference import order
from sidecar.ownership.slots import Acquiring, Asking, Free, Ground, Hold, Owned, Slot
from sidecar.ownership.step import Step


def consider(step: Step, slot: Slot, lease: Lease | None, event: ev.BeatAnswered) -> None:
    """Take a backend if it is free, not pledged and this member is preferred; otherwise schedule the next look."""
    state, know = slot.state, step.know
    if not isinstance(state, Free):
        return
    left_ns = event.newborn_ns if lease is None else lease.left_ns
    if left_ns > 0:
        state.since_ns = None
        step.ask_by(step.now + (min(left_ns, know.bounds.retry_ns) if _is_coming(step, lease) else left_ns))
        return
    if state.since_ns is None:
        state.since_ns = step.now
    rank = _rank(step, slot, lease)
    if rank is None:
        return
    at_ns = state.since_ns + rank * know.bounds.retry_ns
    if step.pledged_to(slot.backend):
        at_ns = max(at_ns, know.pledges[slot.backend].until_ns)
    if step.now < at_ns:
        step.ask_by(min(at_ns, step.now + know.bounds.retry_ns))  # a preferred member may be found dead meanwhile
        return
    _take(step, slot, state, lease, step.ground(event.generation, event.redis_ns))
    if lease is not None and lease.unattended_ns > 0:
        step.ask_by(step.now + lease.unattended_ns)


def _is_coming(step: Step, lease: Lease | None) -> bool:
    """Return True if a backend's owner drains, so that it may be given back at any time."""
    holder = None if lease is None else step.know.members.get(lease.holder)
    return holder is not None and holder.draining


def _rank(step: Step, slot: Slot, lease: Lease | None) -> int | None:
    """Return how many members are preferred to this one, None if it may not own the backend.

    The member that let the lease end is not counted.
    """
    know = step.know
    gone = lease.holder if lease is not None and not lease.released else ""
    ranked = [
        member.id
        for member in order(slot.backend, slot.home, know.members.values())
        if member.id != gone or gone == know.member.id
    ]
    return ranked.index(know.member.id) if know.member.id in ranked else None


def _take(step: Step, slot: Slot, state: Free, lease: Lease | None, ground: Ground) -> None:
    know, me = step.know, step.know.member
    vouched = [me.id]
    if lease is not None and lease.holder_name == me.name:
        vouched.append(lease.holder)  # an earlier life of this name, which is over
    witnesses = () if lease is None else (*lease.witnesses, lease.holder)
    if lease is not None and (lease.released or not set(witnesses).isdisjoint(vouched)):
        _acquire(step, slot, state, ground, tuple(vouched))
        return
    epoch = know.epochs.get(slot.backend, 0)
    round_ = step.ask(slot.backend, Purpose.TAKE_OVER, [*know.members, *witnesses], epoch)
    slot.become(Asking(state, ground, round_, tuple(vouched), witnesses))
    acquire_when_agreed(step, slot)


def _acquire(step: Step, slot: Slot, free: Free, ground: Ground, agreed: tuple[str, ...]) -> None:
    slot.become(Acquiring(free, step.acquire(slot, "", ground, agreed), step.now))


def acquire_when_agreed(step: Step, slot: Slot) -> None:
    """Acquire a backend once all asked members have answered or had the time to.

    A member that does not answer prevents nothing, unless its earlier answer still counts. A pledge to the owner
    prevents it, unless a witness answers that it has given none: the owner needs all of them.
    """
    state, bounds = slot.state, step.know.bounds
    assert isinstance(state, Asking)
    if state.round.missing and step.now < state.round.sent_ns + bounds.ask_ns and not state.round.holder:
        return
    agreed = (*state.vouched, *state.round.agreed)
    is_taken = step.is_believed_taken(slot.backend) and set(state.witnesses).isdisjoint(agreed)
    if state.round.holder or is_taken or step.know.member.draining or step.pledged_to(slot.backend):
        slot.become(state.free)
        step.ask_by(step.now + bounds.retry_ns)
        return
    _acquire(step, slot, state.free, state.ground, agreed)


def answered(step: Step, slot: Slot, state: Acquiring, event: ev.LeaseAnswered) -> None:
    """Own what Redis granted, for the rest of the lease since it was requested."""
    bounds = step.know.bounds
    valid_ns = state.sent_ns + bounds.usable_ns(bounds.ttl_ns)
    if not event.granted:
        slot.become(state.free)
        step.ask_by(step.now + bounds.retry_ns)
    elif step.now >= valid_ns or step.know.is_overtaken(slot.backend, event.epoch):
        give_up(step, slot)
    else:
        renew_ns = state.sent_ns + step.know.every_ns
        witnesses = {state.call.number: state.call.witnesses}
        slot.become(Owned(Hold(state.call.token, event.epoch, state.sent_ns, valid_ns, renew_ns, witnesses)))
        step.emit(Own(slot.backend, event.epoch))


def give_up(step: Step, slot: Slot) -> None:
    """Release what an acquisition may have brought whose answer came too late or never."""
    step.give_back(slot)
    step.ask_by(step.now + step.know.bounds.retry_ns)
