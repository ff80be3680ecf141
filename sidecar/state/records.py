"""The record of a name: its versions, the current one, its owner; and the functions that change a record.

A record is immutable; each change returns a new one or raises with the reason. The registry stores records, and the
core is told of each change.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from sidecar.config.openai import LOADS
from sidecar.core.events import AdapterRegistered
from sidecar.core.facts import Adapter, NamedVersion
from sidecar.errors import Invalid, Reason, Refused
from sidecar.model.definition import Definition
from sidecar.model.reference import selected

VERSIONS_MAX = 10
"""The most versions of a name. Beyond it, the oldest one that is neither current, previous nor canary is dropped."""

ENDLESS_S = 10 * 366 * 86400.0
"""A pause that is longer has no end worth telling."""
RETRY_S_MAX = 60.0
"""Requests for a paused name are told to try again after this time at most: it may be resumed before its time."""

UNSEEN = (LOADS,)
"""The allow list of a new name that is not to be seen yet: no client is this tenant."""


@dataclass(frozen=True, slots=True)
class Version(NamedVersion):
    """A version as it was registered, at a Unix time. `labels` are free text of the operator."""

    labels: tuple[tuple[str, str], ...] = ()
    registered_at: float = 0.0


@dataclass(frozen=True)
class Declared:
    """A cluster object's declaration of a name, as it was last applied.

    `said` is a hash of the source and of the other fields that may bring new content, `digest` the content found there.
    `prefetch` lists the backends that must have the version loaded, by id or pattern (empty: all; None: load on
    request). A name keeps answering for `grace_s` seconds after its object was deleted at `gone_at` (Unix seconds, 0
    while it exists).
    """

    said: str
    digest: str = ""
    prefetch: tuple[str, ...] | None = None
    grace_s: float = 0.0
    gone_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Record(Definition):
    """A registered name.

    `previous` is an ordinal; `withdrawn` has the ordinals that a rollback left and nobody has promoted since.
    `managed_by` is the name's owner: "cli", "config", "push", or a cluster object, whose declaration is `declared`.
    Until `held_until` (Unix seconds), a change made by somebody else overrides the owner. Until `paused_until` (Unix
    seconds, infinite until it is resumed), requests for the name are refused.
    """

    versions: tuple[Version, ...] = field(kw_only=True)
    previous: int | None = None
    managed_by: str = "cli"
    held_until: float = 0.0
    declared: Declared | None = None
    paused_until: float = 0.0
    withdrawn: frozenset[int] = frozenset()

    @property
    def is_unseen(self) -> bool:
        """True for a new name that has not been published yet."""
        return self.allow == UNSEEN

    @property
    def version(self) -> Version:
        """The current version."""
        return self.of(self.current)

    @property
    def adapter(self) -> Adapter:
        return self.version.adapter

    @property
    def origin(self) -> str:
        return self.version.origin

    def of(self, ordinal: int) -> Version:
        """Return a version. Raises Refused(UNKNOWN_ADAPTER), which lists the existing versions."""
        for version in self.versions:
            if version.ordinal == ordinal:
                return version
        has = ", ".join(f"v{version.ordinal}" for version in self.versions)
        raise Refused(
            Reason.UNKNOWN_ADAPTER, f'adapter "{self.name}" has no version v{ordinal}; it has {has}', adapter=self.name
        )

    def selected(self, selector: str) -> Version | None:
        """Return the version that "v8" or the start of a digest selects, the newest one with that content, or None."""
        ordinal = selected(selector, ((version.ordinal, version.adapter.digest) for version in self.versions))
        return next((version for version in self.versions if version.ordinal == ordinal), None)

    def with_content(self, digest: str) -> Version | None:
        """Return the newest version with this digest, or None."""
        return next((version for version in reversed(self.versions) if version.adapter.digest == digest), None)

    def event(self) -> AdapterRegistered:
        """Return the event that tells the core of the record."""
        in_order = sorted(self.versions, key=lambda version: version.ordinal != self.current)
        versions = tuple(NamedVersion(v.ordinal, v.adapter, v.origin, v.generation) for v in in_order)
        kept = () if self.previous is None else (self.previous,)
        return AdapterRegistered(**self.defined(), versions=versions, kept=kept)


def paused_for(record: Record, now: float) -> float | None:
    """Return for how many seconds a name is still paused, infinite until it is resumed; None if it is not."""
    left_s = record.paused_until - now
    return left_s if left_s > 0 else None


def check_not_paused(record: Record, now: float) -> None:
    """Raise Refused(PAUSED) if requests for a name are refused at the time `now` (Unix seconds)."""
    left_s = paused_for(record, now)
    if left_s is None:
        return
    until = "until they resume it"
    if left_s < ENDLESS_S:
        until = f"until {datetime.fromtimestamp(record.paused_until, UTC):%Y-%m-%d %H:%M:%S} UTC"
    whom = dict(record.version.labels).get("owner") or "your operator"
    raise Refused(
        Reason.PAUSED,
        f'the operators have paused adapter "{record.name}" {until}; send the request again then, or ask {whom}',
        retry_after_s=min(left_s, RETRY_S_MAX),
        adapter=record.name,
    )


def added(
    record: Record | None,
    name: str,
    adapter: Adapter,
    origin: str,
    *,
    now: float,
    labels: Iterable[tuple[str, str]] = (),
    stage: bool = False,
) -> tuple[Record, bool]:
    """Return the record with a version of this content, and True if nothing changed.

    New content becomes a new version, which becomes current unless `stage` is set. The content of the current version
    changes nothing; the content of another version reuses that version.
    """
    if record is None:
        first = Version(1, adapter, origin, labels=tuple(labels), registered_at=now)
        return Record(name, current=1, versions=(first,)), False
    known = record.with_content(adapter.digest)
    if known is not None:
        relabelled = replace(known, labels=tuple(labels) or known.labels, origin=origin)
        again = _replaced(record, relabelled)
        if known.ordinal != record.current and not stage:
            again = promoted(again, known.ordinal)
        return again, again == record
    ordinal = max(version.ordinal for version in record.versions) + 1
    version = Version(ordinal, adapter, origin, labels=tuple(labels), registered_at=now)
    grown = _trimmed(replace(record, versions=(*record.versions, version)))
    return (grown if stage else promoted(grown, ordinal)), False


def promoted(record: Record, ordinal: int, percent: int = 100) -> Record:
    """Make a version current, or make it the canary with `percent` of the name's requests."""
    record.of(ordinal)
    if not 0 < percent <= 100:
        raise Refused(Reason.INVALID_REQUEST, f"{record.name}: the weight is {percent}; it must be 1 to 100")
    if ordinal == record.current and percent < 100:
        raise Refused(
            Reason.INVALID_REQUEST,
            f"{record.name} stands for v{ordinal} already; a share is for another version, and a full promotion or a "
            "rollback ends it",
        )
    if ordinal == record.current:
        return replace(record, canary=None)
    if percent < 100:
        return replace(record, canary=(ordinal, percent))
    withdrawn = record.withdrawn - {ordinal}
    return replace(record, current=ordinal, previous=record.current, canary=None, withdrawn=withdrawn)


def rolled_back(record: Record, to: int | None = None) -> Record:
    """Undo the last promotion: end a canary, or make the previous version current, or the version `to`.

    What is left is withdrawn, and no further rollback returns to it unless `to` names it.
    """
    if record.canary is not None and to in (None, record.current):
        return replace(record, canary=None, withdrawn=record.withdrawn | {record.canary[0]})
    to = record.previous if to is None else to
    if to is None:
        raise Invalid(Reason.NO_PREVIOUS_VERSION, _nothing_before(record), adapter=record.name)
    if to == record.current:
        raise Invalid(
            Reason.NO_PREVIOUS_VERSION,
            f"{record.name} stands for v{to} already; {_others(record)}",
            adapter=record.name,
        )
    left = {record.current, *(record.canary or ())[:1]}
    return replace(
        promoted(record, to), previous=None, withdrawn=frozenset((record.withdrawn | left) - {to})
    )  # without a previous version: it would be the one that was left


def _nothing_before(record: Record) -> str:
    if not record.withdrawn:
        return f"{record.name} has no version before v{record.current} to go back to; {_others(record)}"
    left = ", ".join(f"v{ordinal}" for ordinal in sorted(record.withdrawn))
    return f"{record.name} was rolled back to v{record.current} already, from {left}; {_others(record)}"


def _others(record: Record) -> str:
    """Return the versions that there are, and the command that goes to the newest that no rollback has left.

    If rollbacks have left them all, it goes further back.
    """
    others = [version.ordinal for version in record.versions if version.ordinal != record.current]
    if not others:
        return "it has no other version"
    roles = dict.fromkeys(record.withdrawn, " (withdrawn)") | {record.current: " (current)"}
    there = ", ".join(f"v{version.ordinal}{roles.get(version.ordinal, '')}" for version in record.versions)
    to = max(others, key=lambda each: (each not in record.withdrawn, each < (record.current or 0), each))
    return f"its versions are {there}; to go to another: sidecar adapters rollback {record.name} --to v{to}"


def as_declared(record: Record, declared: Declared, owner: str, allow: tuple[str, ...], pinned: bool) -> Record:
    """Return the record as its owner's declaration wants it, which ends any override.

    Raises Refused(UNKNOWN_ADAPTER) if the declaration's version was dropped.
    """
    version = record.with_content(declared.digest)
    if version is None:
        raise Refused(
            Reason.UNKNOWN_ADAPTER, f"{record.name} has no version {declared.digest[:12]} any more", adapter=record.name
        )
    return replace(
        promoted(record, version.ordinal),
        allow=allow or None,
        pinned=pinned,
        managed_by=owner,
        held_until=0.0,
        declared=declared,
    )


def published(record: Record, ordinal: int, versions_max: int) -> Record:
    """Make a version current, show a new name to everybody, and drop the oldest versions beyond `versions_max`.

    Raises Refused(UNKNOWN_ADAPTER) if the version was dropped.
    """
    now = promoted(record, ordinal)
    if record.is_unseen:  # what was current has never been published
        now = replace(now, previous=None, allow=None)
    return _trimmed(now, versions_max)


def without(record: Record, ordinal: int) -> Record | None:
    """Drop a version that was never published, or return None: the name has not been seen, and has no other version.

    A version that requests without a version may get, or that a rollback would bring back, stays.
    """
    if record.is_unseen and len(record.versions) == 1:
        return None
    if ordinal in (record.current, record.previous, *(record.canary or ())[:1]):
        return record
    return replace(record, versions=tuple(version for version in record.versions if version.ordinal != ordinal))


def refreshed(record: Record, ordinal: int) -> Record:
    """Raise a version's generation, so that every engine loads a fresh copy under a new task id."""
    version = record.of(ordinal)
    return _replaced(record, replace(version, generation=version.generation + 1))


def _replaced(record: Record, version: Version) -> Record:
    versions = tuple(version if held.ordinal == version.ordinal else held for held in record.versions)
    return replace(record, versions=versions)


def _trimmed(record: Record, versions_max: int = VERSIONS_MAX) -> Record:
    """Drop the oldest versions beyond `versions_max` that are neither current, previous nor canary."""
    tried = record.canary[0] if record.canary else None
    newest = record.versions[-1].ordinal
    in_use = (record.current, record.previous, tried, newest)
    excess = len(record.versions) - versions_max
    kept = []
    for version in record.versions:
        if excess > 0 and version.ordinal not in in_use:
            excess -= 1
        else:
            kept.append(version)
    return replace(record, versions=tuple(kept))
