"""Decide what to do about a name, from its declaration and its record. The time is an argument; no I/O."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum

from sidecar.errors import Invalid, Refused
from sidecar.kubernetes.choosing import Desired
from sidecar.kubernetes.declarations import GRACE_S, Declaration
from sidecar.shell.managing import Wanted, taken_over
from sidecar.state.records import Declared, Record, as_declared


class Do(Enum):
    """The next action for one name."""

    NOTHING = "nothing"
    BRING = "bring"
    """Read the source, and make its content the name's current version."""
    SET = "set"
    """Set the name as declared, from its existing versions."""
    MARK = "mark"
    """Record that its declaration was deleted."""
    FORGET = "forget"


def is_held(record: Record | None, now: float) -> bool:
    """Return True while an operator's override of the declaration lasts."""
    return record is not None and record.declared is not None and now < record.held_until


def belongs_elsewhere(declaration: Declaration, record: Record | None, now: float) -> str:
    """Return who else owns a declared name and how the declaration can get it, or "" if it may have the name."""
    if record is None or is_held(record, now):
        return ""
    try:
        taken_over(record, Wanted(managed_by=declaration.source.owner, take_over=declaration.take_over), now)
    except Invalid as invalid:
        return invalid.message
    return ""


def to_do(declaration: Declaration, record: Record | None, now: float) -> Do:
    """Return the next action for a declared name."""
    if declaration.problem or is_held(record, now) or belongs_elsewhere(declaration, record, now):
        return Do.NOTHING
    if record is None or record.declared is None or record.declared.said != declaration.declared.said:
        return Do.BRING
    try:
        return Do.NOTHING if set_back(declaration, record) == record else Do.SET
    except Refused:  # the version was dropped after an operator had tried many others
        return Do.BRING


def set_back(declaration: Declaration, record: Record) -> Record:
    """Return a record set as declared. Raises Refused(UNKNOWN_ADAPTER) if that needs the source."""
    digest = record.declared.digest if record.declared is not None else ""
    declared = replace(declaration.declared, digest=digest)
    return as_declared(record, declared, declaration.source.owner, declaration.tenants, declaration.pinned)


def to_do_without(record: Record, desired: Desired, now: float) -> Do:
    """Return the next action for a name whose declaration was deleted."""
    if record.managed_by in desired.unread or now < record.held_until:
        return Do.NOTHING
    said = record.declared or Declared("", grace_s=GRACE_S)
    if said.grace_s and not said.gone_at:
        return Do.MARK
    return Do.FORGET if now >= said.gone_at + said.grace_s else Do.NOTHING


def marked_gone(record: Record, now: float) -> Record:
    """Return a record with the time at which its declaration was deleted."""
    return replace(record, declared=replace(record.declared or Declared("", grace_s=GRACE_S), gone_at=now))


def next_look(record: Record | None, now: float) -> float:
    """Return the time (Unix seconds) at which a name may need an action although nothing has changed."""
    if record is None:
        return float("inf")
    said = record.declared
    times = [record.held_until, said.gone_at + said.grace_s if said is not None and said.gone_at else 0.0]
    return min((at for at in times if at > now), default=float("inf"))
