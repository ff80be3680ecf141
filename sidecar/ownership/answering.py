"""What other members ask is answered at once, and an agreement binds."""

from __future__ import annotations

from sidecar.ownership import moving
from sidecar.ownership.effects import Answer
from sidecar.ownership.enums import Purpose
from sidecar.ownership.events import AskReceived
from sidecar.ownership.step import Turn


def received(turn: Turn, event: AskReceived) -> None:
    slot = turn.know.slots.get(event.backend)
    hold = None if slot is None else slot.hold
    agreed = ANSWERS[event.purpose](turn, event)
    turn.saw(event.backend, event.epoch)
    if hold is not None:
        turn.saw(event.backend, hold.epoch)
    epoch, reaches = turn.know.epochs[event.backend], turn.know.reaches_redis
    turn.emit(Answer(event.number, event.member, agreed, hold is not None, reaches, epoch))


def _is_free_for(turn: Turn, event: AskReceived) -> bool:
    """Whether a backend is neither held here nor pledged to another than who asks."""
    slot = turn.know.slots.get(event.backend)
    is_held = slot is not None and slot.hold is not None
    return not is_held and turn.pledged_to(event.backend) in ("", event.member)


def _go_on(turn: Turn, event: AskReceived) -> bool:
    """Agree that an owner goes on if Redis is away from here too. If it is not known to be, find out."""
    if turn.know.reaches_redis:
        turn.look_at(turn.now)
        return False
    if not _is_free_for(turn, event) or turn.is_over(event.backend, event.epoch):
        return False
    turn.pledge(event.backend, event.member)
    return True


def _take_over(turn: Turn, event: AskReceived) -> bool:
    """Agree that another follows on a lease that has ended: nobody goes on with it here, or by a pledge of here."""
    if not _is_free_for(turn, event):
        return False
    turn.agree_to_follower(event.backend, event.epoch)
    return True


ANSWERS = {Purpose.GO_ON: _go_on, Purpose.TAKE_OVER: _take_over, Purpose.MOVE: moving.asked}
