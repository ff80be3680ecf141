"""Backends move to whom they belong, one at a time for each member that gives and for each that takes."""

from __future__ import annotations

from sidecar.ownership import effects as do
from sidecar.ownership.enums import Purpose, Why
from sidecar.ownership.events import AskAnswered, AskReceived, BeatAnswered
from sidecar.ownership.facts import Lease
from sidecar.ownership.preference import order
from sidecar.ownership.slots import Free, HandingOver, Move, Owned, Slot
from sidecar.ownership.step import Turn, leases_of


def look(turn: Turn, event: BeatAnswered) -> None:
    """Ask for one backend that should be this member's and is another's."""
    know = turn.know
    leases = leases_of(event)
    move = know.move
    if move is not None:
        if _is_owned_by(leases.get(move.backend), move.owner):
            turn.look_at(turn.now + know.bounds.retry_ns)
            return
        know.move = None
    names = sorted(know.slots)
    start = next((at for at, name in enumerate(names) if name > know.asked_last), 0)
    for name in names[start:] + names[:start]:
        lease = leases.get(name)
        if lease is not None and _belongs_here(turn, know.slots[name], lease):
            _ask(turn, name, lease.holder)
            return


def _is_owned_by(lease: Lease | None, owner: str) -> bool:
    return lease is not None and lease.holder == owner and lease.left_ns > 0


def _belongs_here(turn: Turn, slot: Slot, lease: Lease) -> bool:
    know = turn.know
    is_held = lease.left_ns > 0 and lease.holder != know.member.id and lease.holder in know.members
    return is_held and isinstance(slot.state, Free) and _preferred(turn, slot) == know.member.id


def _preferred(turn: Turn, slot: Slot) -> str:
    ranked = order(slot.backend, slot.home, turn.know.members.values())
    return ranked[0].id if ranked else ""


def _ask(turn: Turn, backend: str, owner: str) -> None:
    know = turn.know
    round_ = turn.ask(backend, Purpose.MOVE, [owner], know.epochs.get(backend, 0))
    (number,) = round_.missing
    know.move = Move(backend, owner, number, turn.now + know.every_ns)
    know.asked_last = backend


def answered(turn: Turn, move: Move, event: AskAnswered) -> None:
    if event.agreed:
        move.agreed = True
        turn.look_at(turn.now + turn.know.bounds.retry_ns)
    else:
        turn.know.move = None


def again(turn: Turn, move: Move) -> None:
    """Ask again for what was agreed, for as long as it takes; leave what was not answered."""
    if move.agreed:
        _ask(turn, move.backend, move.owner)
    else:
        turn.know.move = None


def asked(turn: Turn, event: AskReceived) -> bool:
    """Begin to hand over what the asking member is preferred for, unless something else is under way."""
    slot = turn.know.slots.get(event.backend)
    if slot is None or slot.hold is None or _preferred(turn, slot) != event.member:
        return False
    if isinstance(slot.state, Owned) and not turn.is_handing_over:
        turn.hand_over(slot, Why.MOVED)
    return isinstance(slot.state, HandingOver)


def in_flight_ended(turn: Turn, slot: Slot) -> None:
    """Give back a lease whose work is done, once Redis has confirmed it."""
    if isinstance(slot.state, HandingOver):  # else the lease has ended meanwhile
        slot.state.is_idle = True
        slot.state.hold.renew_ns = turn.now


def drain(turn: Turn) -> None:
    """Hand over the next, and leave after the last."""
    know = turn.know
    if not know.member.draining or know.left or turn.is_handing_over:
        return
    slots = [know.slots[name] for name in sorted(know.slots)]
    for slot in slots:
        if isinstance(slot.state, Owned):
            turn.hand_over(slot, Why.DRAINING)
            return
    if all(isinstance(slot.state, Free) for slot in slots):
        know.left = True
        turn.emit(do.SendLeave(know.member.id))
