"""Move backends to their preferred members, one at a time per giving and per taking member."""

from __future__ import annotations

from sidecar.ownership import effects as do
from sidecar.ownership.enums import Purpose, Why
from sidecar.ownership.events import AskAnswered, AskReceived, BeatAnswered
from sidecar.ownership.facts import Lease
from sidecar.ownership.preference import order
from sidecar.ownership.slots import Free, HandingOver, Move, Owned, Slot
from sidecar.ownership.step import Step, leases_of


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
