"""What operators do with names: register, stage, promote, roll back, refresh, pin, unregister.

The registry writes it down first; then the core is told, in one step, so a name switches atomically: what was received
before keeps its version, what comes after the call has returned gets the new one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import time
from typing import NamedTuple

from sidecar.adapters.base_model import BaseModel, unlike
from sidecar.adapters.names import check_name
from sidecar.core import events as ev
from sidecar.core.admission import unknown_adapter
from sidecar.core.facts import Adapter, misfit
from sidecar.core.layout import packed_size_bytes
from sidecar.core.state import State, Version
from sidecar.errors import Invalid, Reason
from sidecar.shell.sources import Arrival, Sources
from sidecar.state import records
from sidecar.state.records import Record
from sidecar.state.registry import Registry

DRAIN_POLL_S = 0.02


@dataclass(frozen=True)
class Wanted:
    """What a registration asks for beside the content. `hold_s` lets a change of a name that another manages stand."""

    allow: tuple[str, ...] = ()
    pin: bool = False
    labels: tuple[tuple[str, str], ...] = ()
    stage: bool = False
    managed_by: str = "cli"
    hold_s: float = 0.0
    base: str = ""
    """The base model's name, where the one that the adapter was trained under is not the engine's."""


class Entered(NamedTuple):
    """What a registration came to: the name's record, the ordinal that its content has, whether nothing changed."""

    record: Record
    ordinal: int
    unchanged: bool


class Catalogue:
    """The names of one sidecar. `step` gives the core an event at once."""

    def __init__(
        self,
        registry: Registry,
        state: Callable[[], State],
        step: Callable[[ev.Event], None],
        sources: Sources,
        bases: Mapping[str, BaseModel],
    ) -> None:
        self.registry = registry
        self.sources = sources
        self._state = state
        self._step = step
        self._bases = bases
        self._forgotten_until: dict[str, float] = {}

    def announce(self) -> None:
        """Tell the core of every name that is written down."""
        for record in self.registry.all():
            self._step(record.event())

    def known(self, name: str) -> Record:
        """Return a name's record. Raises Refused(UNKNOWN_ADAPTER) with the nearest names."""
        record = self.registry.get(name)
        if record is None:
            raise unknown_adapter(self._state(), name)
        return record

    async def register(self, name: str, path: str, wanted: Wanted) -> Entered:
        """Check an adapter and let a name stand for it.

        `path` is a folder of this machine or the URL of one elsewhere. Raises Invalid with what is wrong with the name,
        the path or the files, Refused for what may be right later; nothing is left behind then.
        """
        check_name(name)
        try:
            async with self.sources.arrival(name, path) as arrival:
                return self._enter(name, arrival, wanted)
        finally:
            self.forget_unneeded()

    async def push(self, name: str, folder: Path, wanted: Wanted) -> Entered:
        """Let a name stand for what a client put into an incoming folder of the spool; as `register` otherwise."""
        check_name(name)
        try:
            async with self.sources.pushed(name, folder) as arrival:
                return self._enter(name, arrival, wanted)
        finally:
            self.forget_unneeded()

    def _enter(self, name: str, arrival: Arrival, wanted: Wanted) -> Entered:
        """Write an arrived adapter down under a name and tell the core."""
        adapter = arrival.registration.adapter
        if wanted.base:
            adapter = replace(adapter, base_model=wanted.base)
        self._fits_its_base(name, adapter)
        self._fits_the_store(name, adapter)
        self._fits_a_backend(name, adapter)
        before = self.registry.get(name)
        if before is not None:
            before = self._taken_over(before, wanted)
        record, _ = records.added(
            before,
            name,
            adapter,
            arrival.origin,
            now=time(),
            labels=wanted.labels,
            stage=wanted.stage,
        )
        record = replace(
            record,
            allow=wanted.allow or record.allow,
            pinned=wanted.pin or record.pinned,
            managed_by=wanted.managed_by if before is None else record.managed_by,
        )
        version = record.with_content(adapter.digest)
        assert version is not None
        unchanged = record == self.registry.get(name)
        self._put(record)
        return Entered(record, version.ordinal, unchanged)

    def forget_unneeded(self) -> None:
        """Drop brought sources that no version, registered or still in use, needs any more."""
        for digest in list(self.sources.doubted):
            versions = self._versions_of(digest)
            if not versions:
                self.sources.forget(digest)
            elif any(version.names for version in versions):
                self.sources.trust(digest)

    def _versions_of(self, digest: str) -> list[Version]:
        """Return what the core has of a content, whatever its generation; most have one of generation 0 only."""
        versions = self._state().versions
        first = versions.get(digest)
        if first is not None and first.names:
            return [first]
        return [version for version in versions.values() if version.adapter.digest == digest]

    def promote(self, name: str, selector: str, percent: int, hold_s: float = 0.0) -> Record:
        """Let a name stand for one of its versions ("v8", or the start of a digest), or give it a share."""
        record = self._taken_over(self.known(name), Wanted(hold_s=hold_s))
        return self._put(records.promoted(record, self._ordinal(record, selector), percent))

    def roll_back(self, name: str, hold_s: float = 0.0) -> Record:
        """Undo the last promotion."""
        return self._put(records.rolled_back(self._taken_over(self.known(name), Wanted(hold_s=hold_s))))

    def refresh(self, name: str, selector: str = "") -> Record:
        """Have every engine take a fresh copy of a version, the current one by default."""
        record = self.known(name)
        ordinal = self._ordinal(record, selector) if selector else record.current
        return self._put(records.refreshed(record, ordinal))

    def set_pin(self, name: str, pinned: bool) -> Record:
        return self._put(replace(self.known(name), pinned=pinned))

    async def unregister(self, name: str, hold_s: float = 0.0) -> None:
        """Take nothing new for a name, wait until what is here for it has ended, then forget it."""
        record = self._taken_over(self.known(name), Wanted(hold_s=hold_s))
        self._forgotten_until[name] = record.held_until
        self._step(ev.AdapterUnregistered(name))
        while any(request.view.name == name for request in self._state().requests.values()):
            await asyncio.sleep(DRAIN_POLL_S)
        if name not in self._state().names:  # somebody may have registered it anew in the meantime
            self._doubt(self.registry.get(name), None)
            self.registry.delete(name)
        self.forget_unneeded()

    def hold_ended(self, name: str) -> bool:
        """Whether an override of a declared name has run out, so that its owner's word counts again. Asked once."""
        record = self.registry.get(name)
        if record is None:
            until = self._forgotten_until.get(name, 0.0)
        else:
            until = record.held_until if record.managed_by == "config" else 0.0
        if not 0 < until <= time():
            return False
        self._forgotten_until.pop(name, None)
        if record is not None:
            self.registry.put(replace(record, held_until=0.0))
        return True

    def release(self, name: str) -> None:
        """Lift the quarantine of a name's version."""
        self.known(name)
        self._step(ev.ReleaseAsked(name))

    def _put(self, record: Record) -> Record:
        before = self.registry.get(record.name)
        if record != before:
            self.registry.put(record)
            self._step(record.event())
            self._doubt(before, record)
        return record

    def _doubt(self, before: Record | None, now: Record | None) -> None:
        """Have the sources looked at that a name needed before and needs no more."""
        kept = {version.adapter.digest for version in now.versions} if now else set()
        for version in before.versions if before else ():
            if version.adapter.digest not in kept:
                self.sources.doubt(version.adapter.digest)

    def _ordinal(self, record: Record, selector: str) -> int:
        """Return the ordinal that "v8" or the start of a digest selects."""
        if selector.startswith("v") and selector[1:].isdigit():
            return record.of(int(selector[1:])).ordinal
        for version in reversed(record.versions):
            if len(selector) >= 8 and version.adapter.digest.startswith(selector):
                return version.ordinal
        has = ", ".join(f"v{version.ordinal} ({version.adapter.digest[:12]})" for version in record.versions)
        raise Invalid(
            Reason.INVALID_NAME, f'{record.name} has no version "{selector[:80]}"; it has {has}', adapter=record.name
        )

    def _taken_over(self, record: Record, wanted: Wanted) -> Record:
        """Return the record as the asker may change it: who declares a name has the say, unless it is held."""
        if wanted.managed_by == record.managed_by:
            if wanted.managed_by == "config" and time() < record.held_until:
                raise Invalid(
                    Reason.MANAGED_ELSEWHERE,
                    f"{record.name} is held by an operator and stays as it is for another "
                    f"{record.held_until - time():.0f} s",
                    adapter=record.name,
                )
            return record
        if wanted.hold_s > 0:
            return replace(record, held_until=time() + wanted.hold_s)
        if record.managed_by in ("cli", "push"):
            return replace(record, managed_by=wanted.managed_by)
        raise Invalid(
            Reason.MANAGED_ELSEWHERE,
            f"{record.name} is managed by {record.managed_by} and would be set back; change it there, or override it "
            "for a while with --hold DURATION",
            adapter=record.name,
        )

    def _fits_its_base(self, name: str, adapter: Adapter) -> None:
        base = self._bases.get(adapter.base_model)
        wrong = None if base is None else unlike(adapter, base)
        if wrong is not None:
            raise Invalid(Reason.ADAPTER_MISMATCH, f"{name}: {wrong}", adapter=name)

    def _fits_the_store(self, name: str, adapter: Adapter) -> None:
        budget = self._state().config.store_bytes
        layouts = [backend.facts.layout for backend in self._state().backends.values()]
        sizes = [packed_size_bytes(adapter.rows, layout) for layout in layouts]
        if sizes and min(sizes) > budget:
            raise Invalid(
                Reason.ADAPTER_TOO_LARGE,
                f"{name}: packed it takes {min(sizes)} bytes and the host store holds {budget}; raise "
                "store.memory_bytes",
                adapter=name,
            )

    def _fits_a_backend(self, name: str, adapter: Adapter) -> None:
        """Refuse what no configured backend can serve, as far as is known, before a GPU sees it."""
        backends = self._state().backends
        unfit = [misfit(adapter, backend.facts) for backend in backends.values()]
        if unfit and all(unfit):
            first, backend = unfit[0], next(iter(backends))
            assert first is not None
            raise Invalid(
                Reason.ADAPTER_MISMATCH, f"{name}: no backend can serve it. {backend}: {first.sentence}", adapter=name
            )
