"""What there is to do about a name, from what is declared and what the registry has. Time is an argument."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum

from sidecar.errors import Invalid, Refused
from sidecar.kubernetes.choosing import Desired
from sidecar.kubernetes.declarations import GRACE_S, Declaration
from sidecar.shell.managing import Wanted, taken_over
from sidecar.state.records import Declared, Record, as_declared


class Do(Enum):
    """What is done about one name."""

    NOTHING = "nothing"
    BRING = "bring"
    """Read the source, and let the name stand for what it holds."""
    SET = "set"
    """Let the name be as declared, from the versions that it has."""
    MARK = "mark"
    """Write down that its declaration has gone."""
    FORGET = "forget"


def is_held(record: Record | None, now: float) -> bool:
    """Whether an operator has overridden a declaration, for now."""
    return record is not None and record.declared is not None and now < record.held_until


def belongs_elsewhere(declaration: Declaration, record: Record | None, now: float) -> str:
    """Say who else has a declared name, and how the declaration can get it; "" if it may have it."""
    if record is None or is_held(record, now):
        return ""
    try:
        taken_over(record, Wanted(managed_by=declaration.source.owner, take_over=declaration.take_over), now)
    except Invalid as invalid:
        return invalid.message
    return ""


def to_do(declaration: Declaration, record: Record | None, now: float) -> Do:
    """Return what there is to do about a name that is declared."""
    if declaration.problem or is_held(record, now) or belongs_elsewhere(declaration, record, now):
        return Do.NOTHING
    if record is None or record.declared is None or record.declared.said != declaration.declared.said:
        return Do.BRING
    try:
        return Do.NOTHING if set_back(declaration, record) == record else Do.SET
    except Refused:  # the version was forgotten, behind others that an operator has tried
        return Do.BRING


def set_back(declaration: Declaration, record: Record) -> Record:
    """Return a record as its declaration says. Raises Refused(UNKNOWN_ADAPTER) if that needs the source."""
    digest = record.declared.digest if record.declared is not None else ""
    declared = replace(declaration.declared, digest=digest)
    return as_declared(record, declared, declaration.source.owner, declaration.tenants, declaration.pinned)


def to_do_without(record: Record, desired: Desired, now: float) -> Do:
    """Return what there is to do about a name that was declared and is not any more."""
    if record.managed_by in desired.unread or now < record.held_until:
        return Do.NOTHING
    said = record.declared or Declared("", grace_s=GRACE_S)
    if said.grace_s and not said.gone_at:
        return Do.MARK
    return Do.FORGET if now >= said.gone_at + said.grace_s else Do.NOTHING


def marked_gone(record: Record, now: float) -> Record:
    """Return a record whose declaration has gone."""
    return replace(record, declared=replace(record.declared or Declared("", grace_s=GRACE_S), gone_at=now))


def next_look(record: Record | None, now: float) -> float:
    """Return when (Unix seconds) there may be something to do about a name although nothing has changed."""
    if record is None:
        return float("inf")
    said = record.declared
    times = [record.held_until, said.gone_at + said.grace_s if said is not None and said.gone_at else 0.0]
    return min((at for at in times if at > now), default=float("inf"))
