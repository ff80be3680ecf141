"""Keep a lease: renew it, claim it anew from a Redis that forgot it, and continue without Redis on pledges.

A lease ends at once when a newer epoch of its backend is seen anywhere, because another member owns the backend then.
"""

from __future__ import annotations

from sidecar.ownership import events as ev
from sidecar.ownership.effects import Disown, Own, SendAcquire, SendRenew
from sidecar.ownership.enums import Purpose, Why
from sidecar.ownership.slots import Call, HandingOver, Hold, Lapsed, Owned, Slot
from sidecar.ownership.step import Step


def keep(step: Step, slot: Slot, hold: Hold) -> None:
    """Do what is due for a lease: end it, renew it, ask the witnesses."""
    if step.now >= hold.valid_ns:
        if isinstance(slot.state, Owned) and hold.ask_ns is not None:
            _lapse(step, slot, hold)
        else:
            step.lose(slot, Why.LEASE_ENDED)
        return
    if isinstance(slot.state, Owned) and _is_anothers(step, slot, hold):
        step.lose(slot, Why.TAKEN)
        return
    if hold.call is None and step.now >= hold.renew_ns:
        renewal = SendRenew(step.number(), slot.backend, hold.token, step.witnesses())
        step.know.calls[renewal.number] = slot
        _called(step, hold, renewal)
        step.emit(renewal)
    if isinstance(slot.state, Owned) and hold.ask_ns is not None and step.now >= hold.ask_ns:
        _ask(step, slot, hold)


def _ask(step: Step, slot: Slot, hold: Hold) -> None:
    hold.ask_ns = step.now + step.know.bounds.retry_ns
    hold.round = step.ask(slot.backend, Purpose.GO_ON, _witnesses_of(hold), hold.epoch)
    go_on(step, slot, hold)


def _lapse(step: Step, slot: Slot, hold: Hold) -> None:
    """Stop, but go on asking: a witness that paused for a moment must not cost the backend until Redis is back."""
    if hold.call is not None:
        step.know.calls.pop(hold.call.number, None)
        hold.call = None
    hold.round = None
    hold.ask_ns = step.now
    slot.become(Lapsed(hold))
    step.emit(Disown(slot.backend, Why.LEASE_ENDED))


def review_lapsed(step: Step, slot: Slot, hold: Hold) -> None:
    """Ask the witnesses of a lapsed lease again; drop it when Redis answers, another owner follows or time is up."""
    bounds, know = step.know.bounds, step.know
    too_late = step.now >= hold.granted_ns + bounds.usable_ns(bounds.alone_ns)
    if know.reaches_redis or know.member.draining or too_late or step.is_over(slot.backend, hold.epoch):
        step.give_back(slot)
        step.ask_by(step.now)
    elif hold.ask_ns is not None and step.now >= hold.ask_ns:
        _ask(step, slot, hold)


def _is_anothers(step: Step, slot: Slot, hold: Hold) -> bool:
    """Return True if a newer epoch is known that is certainly not this lease's own.

    The epoch granted to a claim may be heard of before the grant arrives; nothing is dispatched in between.
    """
    return step.know.is_overtaken(slot.backend, hold.epoch) and not hold.claimed


def _called(step: Step, hold: Hold, call: SendRenew | SendAcquire) -> None:
    """Remember the witnesses that a call to Redis named; of calls with equal witnesses only the last."""
    others = {number: named for number, named in hold.witnesses.items() if named != call.witnesses}
    hold.witnesses = {**others, call.number: call.witnesses}
    hold.call = Call(call.number, step.now)


def _witnesses_of(hold: Hold) -> set[str]:
    """Return all members that Redis may have recorded as this lease's witnesses."""
    return {each for witnesses in hold.witnesses.values() for each in witnesses}


def go_on(step: Step, slot: Slot, hold: Hold) -> None:
    """Prolong a lease if all witnesses have pledged and none knows of a newer epoch."""
    bounds = step.know.bounds
    assert hold.round is not None
    if hold.round.refused or step.is_over(slot.backend, hold.epoch):
        hold.round = None
        return
    if hold.round.missing:
        return
    pledged_ns = hold.round.sent_ns + bounds.usable_ns(bounds.ttl_ns)
    alone_ns = hold.granted_ns + bounds.usable_ns(bounds.alone_ns)
    hold.valid_ns = max(hold.valid_ns, min(pledged_ns, alone_ns))
    if hold.ask_ns is not None:
        hold.ask_ns = hold.round.sent_ns + step.know.every_ns
    hold.round = None
    if isinstance(slot.state, Lapsed) and step.now < hold.valid_ns:
        hold.renew_ns = step.now
        slot.become(Owned(hold))
        step.emit(Own(slot.backend, hold.epoch))


def answered(step: Step, slot: Slot, hold: Hold, event: ev.LeaseAnswered) -> None:
    """Handle a renewal's answer: count the lease from the request, or claim it if Redis does not know of it."""
    bounds, call = step.know.bounds, hold.call
    assert call is not None, f"{slot.backend}: one call at a time"
    assert call.number == event.number, f"{slot.backend}: one call at a time"
    hold.call = None
    if event.granted:
        _renewed(step, hold, call)
        if isinstance(slot.state, HandingOver) and slot.state.is_idle:
            step.give_back(slot)
            step.ask_by(step.now + bounds.retry_ns)
            return
        if event.epoch != hold.epoch:
            hold.epoch = event.epoch
            if isinstance(slot.state, Owned):
                step.emit(Own(slot.backend, event.epoch))
    elif event.holder or (isinstance(slot.state, Owned) and _is_anothers(step, slot, hold)):
        step.lose(slot, Why.TAKEN)
    else:
        ground = step.ground(event.generation, event.redis_ns)
        claim = step.acquire(slot, hold.token, ground, (step.know.member.id,), holds=True)
        _called(step, hold, claim)
        hold.claimed = True
        hold.renew_ns = step.now + bounds.retry_ns


def _renewed(step: Step, hold: Hold, call: Call) -> None:
    bounds = step.know.bounds
    hold.granted_ns = call.sent_ns
    hold.valid_ns = max(hold.valid_ns, call.sent_ns + bounds.usable_ns(bounds.ttl_ns))
    hold.renew_ns = call.sent_ns + step.know.every_ns
    hold.witnesses = {number: each for number, each in hold.witnesses.items() if number >= call.number}
    hold.ask_ns = None
    hold.claimed = False


def failed(step: Step, hold: Hold) -> None:
    """Handle a missing answer of Redis: retry soon, and ask the witnesses meanwhile."""
    hold.call = None
    hold.renew_ns = step.now + step.know.bounds.retry_ns
    if hold.ask_ns is None:
        hold.ask_ns = step.now
