"""What is known of a name: its versions, which of them it stands for, who looks after it. And how that may change.

A record is immutable; each change gives a new one or raises with the reason. The registry writes records down, the core
is told what a name is from then on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from sidecar.core.events import AdapterRegistered, OtherVersion
from sidecar.core.facts import Adapter
from sidecar.errors import Invalid, Reason, Refused

VERSIONS_MAX = 10
"""Versions that a name keeps; past that the oldest that is neither current, previous nor tried out is forgotten."""


@dataclass(frozen=True)
class Version:
    """One version of a name. `labels` are the operator's own words about it; `generation` is raised by refresh."""

    ordinal: int
    adapter: Adapter
    origin: str
    generation: int = 0
    labels: tuple[tuple[str, str], ...] = ()
    registered_at: float = 0.0


@dataclass(frozen=True)
class Declared:
    """What an object of a cluster said of a name when that was last done.

    `said` is a hash of the source and of what else may bring new content, `digest` the content that it brought.
    `prefetch` are the backends that are to have it loaded, by id or pattern, all if empty; None: when it is asked for.
    A name answers for `grace_s` after its object has gone, which was at `gone_at` (Unix seconds), 0 while it is there.
    """

    said: str
    digest: str = ""
    prefetch: tuple[str, ...] | None = None
    grace_s: float = 0.0
    gone_at: float = 0.0


@dataclass(frozen=True)
class Record:
    """A registered name.

    `current` and `previous` are ordinals; `canary` is (ordinal, percent). `managed_by` says who declares it: "cli",
    "config", "push", or an object of a cluster, of which `declared` says more; until `held_until` (Unix seconds) what
    another one changed stands all the same.
    """

    name: str
    versions: tuple[Version, ...]
    current: int
    previous: int | None = None
    canary: tuple[int, int] | None = None
    allow: tuple[str, ...] | None = None
    pinned: bool = False
    managed_by: str = "cli"
    held_until: float = 0.0
    declared: Declared | None = None

    @property
    def version(self) -> Version:
        """The version that the name stands for."""
        return self.of(self.current)

    @property
    def adapter(self) -> Adapter:
        return self.version.adapter

    @property
    def origin(self) -> str:
        return self.version.origin

    def of(self, ordinal: int) -> Version:
        """Return a version. Raises Refused(UNKNOWN_ADAPTER) with those there are."""
        for version in self.versions:
            if version.ordinal == ordinal:
                return version
        has = ", ".join(f"v{version.ordinal}" for version in self.versions)
        raise Refused(
            Reason.UNKNOWN_ADAPTER, f'adapter "{self.name}" has no version v{ordinal}; it has {has}', adapter=self.name
        )

    def with_content(self, digest: str) -> Version | None:
        """Return the newest version of this content."""
        return next((version for version in reversed(self.versions) if version.adapter.digest == digest), None)

    def event(self) -> AdapterRegistered:
        """Return what the core is told."""
        current = self.version
        return AdapterRegistered(
            name=self.name,
            adapter=current.adapter,
            origin=current.origin,
            ordinal=current.ordinal,
            generation=current.generation,
            allow=self.allow,
            pinned=self.pinned,
            others=tuple(
                OtherVersion(v.ordinal, v.adapter, v.origin, v.generation, v.ordinal == self.previous)
                for v in self.versions
                if v.ordinal != self.current
            ),
            canary=self.canary,
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
    """Return the record with a version of this content, and whether nothing changed.

    New content is a new version, and the name moves to it unless `stage`. Content that the name stands for already is
    unchanged; content of another of its versions is that version again, not a new one.
    """
    if record is None:
        first = Version(1, adapter, origin, labels=tuple(labels), registered_at=now)
        return Record(name, (first,), current=1), False
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
    """Let the name stand for a version, or give a share of its requests to it."""
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
    return replace(record, current=ordinal, previous=record.current, canary=None)


def rolled_back(record: Record) -> Record:
    """Undo the last promotion: end a share that is being tried out, or go back to the version before."""
    if record.canary is not None:
        return replace(record, canary=None)
    if record.previous is None:
        raise Invalid(
            Reason.NO_PREVIOUS_VERSION,
            f"{record.name} has no version before v{record.current} to go back to",
            adapter=record.name,
        )
    return replace(record, current=record.previous, previous=record.current)


def as_declared(record: Record, declared: Declared, owner: str, allow: tuple[str, ...], pinned: bool) -> Record:
    """Return a name as an owner's declaration says, which has brought a version of it; no override stands any more.

    Raises Refused(UNKNOWN_ADAPTER) if that version is forgotten.
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


def refreshed(record: Record, ordinal: int) -> Record:
    """Raise a version's generation: every engine takes a fresh copy under a new task id."""
    version = record.of(ordinal)
    return _replaced(record, replace(version, generation=version.generation + 1))


def _replaced(record: Record, version: Version) -> Record:
    versions = tuple(version if held.ordinal == version.ordinal else held for held in record.versions)
    return replace(record, versions=versions)


def _trimmed(record: Record) -> Record:
    """Forget the oldest versions that nothing stands for, past `VERSIONS_MAX`."""
    tried = record.canary[0] if record.canary else None
    newest = record.versions[-1].ordinal
    in_use = (record.current, record.previous, tried, newest)
    excess = len(record.versions) - VERSIONS_MAX
    kept = []
    for version in record.versions:
        if excess > 0 and version.ordinal not in in_use:
            excess -= 1
        else:
            kept.append(version)
    return replace(record, versions=tuple(kept))
