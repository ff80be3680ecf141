"""A lease is kept: renewed, claimed anew from a Redis that forgot it, and without Redis by the pledges of all.

Until a newer epoch of its backend is seen, wherever it is heard of: then another owns it, and this one stops at once.
"""

from __future__ import annotations

from sidecar.ownership import events as ev
from sidecar.ownership.effects import Disown, Own, SendAcquire, SendRenew
from sidecar.ownership.enums import Purpose, Why
from sidecar.ownership.slots import Call, HandingOver, Hold, Lapsed, Owned, Slot
from sidecar.ownership.step import Turn


def keep(turn: Turn, slot: Slot, hold: Hold) -> None:
    """Do what is due for a lease: let it end, renew it, ask the witnesses."""
    if turn.now >= hold.valid_ns:
        if isinstance(slot.state, Owned) and hold.ask_ns is not None:
            _lapse(turn, slot, hold)
        else:
            turn.lose(slot, Why.LEASE_ENDED)
        return
    if isinstance(slot.state, Owned) and _is_anothers(turn, slot, hold):
        turn.lose(slot, Why.TAKEN)
        return
    if hold.call is None and turn.now >= hold.renew_ns:
        renewal = SendRenew(turn.number(), slot.backend, hold.token, turn.witnesses())
        turn.know.calls[renewal.number] = slot
        _called(turn, hold, renewal)
        turn.emit(renewal)
    if isinstance(slot.state, Owned) and hold.ask_ns is not None and turn.now >= hold.ask_ns:
        _ask(turn, slot, hold)


def _ask(turn: Turn, slot: Slot, hold: Hold) -> None:
    hold.ask_ns = turn.now + turn.know.bounds.retry_ns
    hold.round = turn.ask(slot.backend, Purpose.GO_ON, _witnesses_of(hold), hold.epoch)
    go_on(turn, slot, hold)


def _lapse(turn: Turn, slot: Slot, hold: Hold) -> None:
    """Stop, and go on asking: a witness that stood still for a moment must not cost the backend until Redis is back."""
    if hold.call is not None:
        turn.know.calls.pop(hold.call.number, None)
        hold.call = None
    hold.round = None
    hold.ask_ns = turn.now
    slot.become(Lapsed(hold))
    turn.emit(Disown(slot.backend, Why.LEASE_ENDED))


def look_after(turn: Turn, slot: Slot, hold: Hold) -> None:
    """Ask the witnesses of a lapsed lease again; leave it when Redis answers, another follows or time is up."""
    bounds, know = turn.know.bounds, turn.know
    too_late = turn.now >= hold.granted_ns + bounds.usable_ns(bounds.alone_ns)
    if know.reaches_redis or know.member.draining or too_late or turn.is_over(slot.backend, hold.epoch):
        turn.give_back(slot)
        turn.look_at(turn.now)
    elif hold.ask_ns is not None and turn.now >= hold.ask_ns:
        _ask(turn, slot, hold)


def _is_anothers(turn: Turn, slot: Slot, hold: Hold) -> bool:
    """Whether a newer epoch is known that is not this lease's own for certain.

    What Redis granted to a claim may be heard of before its answer comes; nothing is dispatched meanwhile.
    """
    return turn.know.is_overtaken(slot.backend, hold.epoch) and not hold.claimed


def _called(turn: Turn, hold: Hold, call: SendRenew | SendAcquire) -> None:
    """Remember whom a call to Redis named; of calls that named the same only the last."""
    others = {number: named for number, named in hold.witnesses.items() if named != call.witnesses}
    hold.witnesses = {**others, call.number: call.witnesses}
    hold.call = Call(call.number, turn.now)


def _witnesses_of(hold: Hold) -> set[str]:
    """Return all whom Redis may know as this lease's witnesses."""
    return {each for witnesses in hold.witnesses.values() for each in witnesses}


def go_on(turn: Turn, slot: Slot, hold: Hold) -> None:
    """Prolong a lease by the pledges of all witnesses, if they are complete and nobody knows of a newer one."""
    bounds = turn.know.bounds
    assert hold.round is not None
    if hold.round.refused or turn.is_over(slot.backend, hold.epoch):
        hold.round = None
        return
    if hold.round.missing:
        return
    pledged_ns = hold.round.sent_ns + bounds.usable_ns(bounds.ttl_ns)
    alone_ns = hold.granted_ns + bounds.usable_ns(bounds.alone_ns)
    hold.valid_ns = max(hold.valid_ns, min(pledged_ns, alone_ns))
    if hold.ask_ns is not None:
        hold.ask_ns = hold.round.sent_ns + turn.know.every_ns
    hold.round = None
    if isinstance(slot.state, Lapsed) and turn.now < hold.valid_ns:
        hold.renew_ns = turn.now
        slot.become(Owned(hold))
        turn.emit(Own(slot.backend, hold.epoch))


def answered(turn: Turn, slot: Slot, hold: Hold, event: ev.LeaseAnswered) -> None:
    """Count a renewal from when it was sent; claim what this generation of Redis does not know of."""
    bounds, call = turn.know.bounds, hold.call
    assert call is not None, f"{slot.backend}: one call at a time"
    assert call.number == event.number, f"{slot.backend}: one call at a time"
    hold.call = None
    if event.granted:
        _renewed(turn, hold, call)
        if isinstance(slot.state, HandingOver) and slot.state.is_idle:
            turn.give_back(slot)
            turn.look_at(turn.now + bounds.retry_ns)
            return
        if event.epoch != hold.epoch:
            hold.epoch = event.epoch
            if isinstance(slot.state, Owned):
                turn.emit(Own(slot.backend, event.epoch))
    elif event.holder or (isinstance(slot.state, Owned) and _is_anothers(turn, slot, hold)):
        turn.lose(slot, Why.TAKEN)
    else:
        ground = turn.ground(event.generation, event.redis_ns)
        claim = turn.acquire(slot, hold.token, ground, (turn.know.member.id,), holds=True)
        _called(turn, hold, claim)
        hold.claimed = True
        hold.renew_ns = turn.now + bounds.retry_ns


def _renewed(turn: Turn, hold: Hold, call: Call) -> None:
    bounds = turn.know.bounds
    hold.granted_ns = call.sent_ns
    hold.valid_ns = max(hold.valid_ns, call.sent_ns + bounds.usable_ns(bounds.ttl_ns))
    hold.renew_ns = call.sent_ns + turn.know.every_ns
    hold.witnesses = {number: each for number, each in hold.witnesses.items() if number >= call.number}
    hold.ask_ns = None
    hold.claimed = False


def failed(turn: Turn, hold: Hold) -> None:
    """Redis did not answer: try again soon, and ask the witnesses meanwhile."""
    hold.call = None
    hold.renew_ns = turn.now + turn.know.bounds.retry_ns
    if hold.ask_ns is None:
        hold.ask_ns = turn.now
