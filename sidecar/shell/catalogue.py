"""What operators do with names: register, stage, promote, roll back, refresh, pin, unregister.

The registry stores each change and announces it, and the core takes it in one step, whichever replica made it. So a
name switches atomically: requests received before keep their version, those that come after the call has returned get
the new one.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from time import time
from typing import NamedTuple, TypeVar

from sidecar.adapters.base_model import BaseModel
from sidecar.adapters.names import check_name, is_base_name, shown
from sidecar.adapters.origins.allowing import AllowList
from sidecar.core import events as ev
from sidecar.core.admission import unknown_adapter
from sidecar.core.misfits import Placed
from sidecar.core.operators import gone_from, holders_of
from sidecar.core.state import State, Version
from sidecar.errors import Invalid, Reason, Refused
from sidecar.shell.fit import check_fit
from sidecar.shell.managing import BY_HAND, CONFIG, CONFIRM, check_pin, check_unregister, taken_over
from sidecar.shell.managing import Wanted as Wanted
from sidecar.shell.sources import Arrival, Sources
from sidecar.state import records
from sidecar.state.records import Record
from sidecar.state.registry import Change, Registry
from sidecar.telling.endings import unknown

DRAIN_POLL_S = 0.02
ATTEMPTS_MAX = 8
"""How often a change is computed anew because another writer changed the same name first."""

_ORDINAL = re.compile(r"v[0-9]{1,9}\Z")

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Entered(NamedTuple):
    """The result of a registration: the name's record, its content's ordinal, and whether nothing changed.

    With `returns` a rollback had left that version, and it is current again.
    """

    record: Record
    ordinal: int
    unchanged: bool
    returns: bool = False


class Catalogue:
    """The names of one sidecar. `step` gives the core an event at once."""

    def __init__(
        self,
        registry: Registry,
        state: Callable[[], State],
        step: Callable[[ev.Event], object],
        sources: Sources,
        bases: Mapping[str, BaseModel],
    ) -> None:
        self.registry = registry
        self.sources = sources
        self._state = state
        self._step = step
        self.bases = bases
        self.reconciled = ""
        """Prefix of the owners whose declarations are being followed (`managing.CLUSTER`); "" if none are."""
        self.is_configured: Callable[[str], bool] = lambda name: True
        """Says whether the configuration in force has a name that the configuration brought."""
        self._forgotten_until: dict[str, float] = {}
        self._harmful: dict[str, Record] = {}
        """Records that the core is not given, because it would fail on them."""

    def announce(self, tried: Callable[[ev.Event], None] = lambda event: None) -> None:
        """Tell the core of every stored name, and from then on of every change.

        A record that cannot be read, or on whose event `tried` raises, is left out and logged: one bad row must not
        keep all other adapters from being served at every start.
        """
        for name, why in sorted(self.registry.set_aside.items()):
            self._log_set_aside(name, why)
        for record in self.registry.all():
            try:
                event = record.event()
                tried(event)
            except Exception as error:  # any kind: it would come again at each start
                logger.exception("a core fails on the stored record of %s", shown(record.name))
                self._harmful[record.name] = record
                self._log_set_aside(record.name, f"{type(error).__name__}: {error}")
            else:
                self._step(event)
        self.registry.subscribe(self._take)

    @property
    def set_aside(self) -> list[str]:
        """Names that are stored and not served, because their records cannot be read or make a core fail."""
        return sorted({*self.registry.set_aside, *self._harmful})

    def _log_set_aside(self, name: str, why: str) -> None:
        logger.error(
            "%s is set aside and not served: what is written down of it cannot be used (%s); register it again, which "
            "replaces it, or run the release that wrote it",
            shown(name),
            why,
        )

    def _take(self, change: Change) -> None:
        """Take a change made here or by another replica, and doubt the sources that its name no longer needs."""
        self._harmful.pop(change.name, None)
        known = self._state().names.get(change.name)
        before = (
            [self._state().versions[version].adapter.digest for version in known.versions.values()] if known else []
        )
        record = change.record
        if record is None and known is None:
            return  # the core never heard of it
        self._step(ev.AdapterUnregistered(change.name) if record is None else record.event())
        kept = {version.adapter.digest for version in record.versions} if record is not None else set()
        for digest in before:
            if digest not in kept:
                self.sources.doubt(digest)

    def known(self, name: str) -> Record:
        """Return a name's record. Raises Refused(UNKNOWN_ADAPTER) naming similar names."""
        record = self.registry.get(name)
        if record is None or name in self._harmful:
            raise unknown(unknown_adapter(self._state(), name))
        return record

    async def register(self, name: str, path: str, wanted: Wanted, allow: AllowList | None = None) -> Entered:
        """Check an adapter and register it under a name.

        `path` is a local folder, by `allow` one of the caller's own, or a URL. Raises Invalid for a bad name, path or
        file, Refused for a failure that may pass. Nothing is left behind then.
        """
        check_name(name)
        wanted.check(name)
        try:
            async with self.sources.arrival(name, path, allow) as arrival:
                return await self._enter(name, arrival, wanted)
        finally:
            self.forget_unneeded()

    async def push(self, name: str, folder: Path, wanted: Wanted) -> Entered:
        """Register what a client has put into an incoming folder of the spool; otherwise as `register`."""
        check_name(name)
        wanted.check(name)
        try:
            async with self.sources.pushed(name, folder) as arrival:
                entered = await self._enter(name, arrival, wanted)
                if self.sources.others is not None:
                    await self.sources.others.spread(arrival.registration.adapter.digest)
                return entered
        finally:
            self.forget_unneeded()

    async def _enter(self, name: str, arrival: Arrival, wanted: Wanted) -> Entered:
        """Store an arrived adapter under a name."""
        adapter = arrival.registration.adapter
        adapter = replace(adapter, base_model=_base_name(name, wanted.base or adapter.base_model))
        _check_content(name, adapter.digest, wanted.digest)
        check_fit(name, adapter, self._state(), self.bases)

        withdrawn: frozenset[int] = frozenset()

        def grown(before: Record | None) -> Record:
            nonlocal withdrawn
            withdrawn = frozenset() if before is None else before.withdrawn
            mine = None if before is None else self._taken_over(before, wanted)
            record, _ = records.added(
                mine, name, adapter, arrival.origin, now=time(), labels=wanted.labels, stage=wanted.stage
            )
            if wanted.declared is not None:
                declared = replace(wanted.declared, digest=adapter.digest)
                return records.as_declared(record, declared, wanted.managed_by, wanted.allow, wanted.pin)
            return replace(
                record,
                allow=wanted.allow or (records.UNSEEN if mine is None and wanted.unseen else record.allow),
                pinned=wanted.pin or record.pinned,
                managed_by=wanted.managed_by if mine is None else record.managed_by,
            )

        record, unchanged = await self._write(name, grown)
        version = record.with_content(adapter.digest)
        assert version is not None
        return Entered(record, version.ordinal, unchanged, version.ordinal in withdrawn - record.withdrawn)

    def forget_unneeded(self) -> None:
        """Drop downloaded sources that no version, registered or in use, needs any more."""
        for digest in list(self.sources.doubted):
            versions = self._versions_of(digest)
            if not versions:
                self.sources.forget(digest)
            elif any(version.names for version in versions):
                self.sources.trust(digest)

    def _versions_of(self, digest: str) -> list[Version]:
        """Return the core's versions of a content, in all generations; most have generation 0 only."""
        versions = self._state().versions
        first = versions.get(digest)
        if first is not None and first.names:
            return [first]
        return [version for version in versions.values() if version.adapter.digest == digest]

    async def promote(self, name: str, selector: str, percent: int, hold_s: float = 0.0) -> Record:
        """Point a name at one of its versions ("v8", or the start of a digest), or give that a share in percent."""

        def promoted(record: Record) -> Record:
            mine = self._taken_over(record, Wanted(hold_s=hold_s))
            return records.promoted(mine, self._ordinal(mine, selector), percent)

        return await self._change(name, promoted)

    async def roll_back(self, name: str, selector: str = "", hold_s: float = 0.0) -> Record:
        """Undo the last promotion, or go back to the selected version.

        Tried once only: after another writer's change it would undo a different one.
        """

        def rolled_back(record: Record) -> Record:
            mine = self._taken_over(record, Wanted(hold_s=hold_s))
            return records.rolled_back(mine, self._ordinal(mine, selector) if selector else None)

        return await self._change(name, rolled_back, attempts_max=1)

    async def change_declared(self, name: str, owner: str, changed: Callable[[Record], Record]) -> Record:
        """Change a name on behalf of its owner or one in the same namespace. Raises Invalid while it is held."""
        return await self._change(name, lambda record: changed(self._taken_over(record, Wanted(managed_by=owner))))

    async def refresh(self, name: str, selector: str = "") -> Record:
        """Make every engine take a fresh copy of a version, by default the current one."""
        return await self._change(
            name,
            lambda record: records.refreshed(record, self._ordinal(record, selector) if selector else record.current),
        )

    async def set_pin(self, name: str, pinned: bool) -> Record:
        def pinned_or_not(record: Record) -> Record:
            check_pin(record)
            return replace(record, pinned=pinned)

        return await self._change(name, pinned_or_not)

    async def set_pause(self, name: str, until: float) -> Record:
        """Refuse requests for a name until a time (Unix seconds, infinite until it is resumed); 0 resumes it.

        An operator may do so whoever manages the name.
        """
        return await self._change(name, lambda record: replace(record, paused_until=until))

    async def unregister(self, name: str, hold_s: float = 0.0, managed_by: str = "cli") -> tuple[Placed, ...]:
        """Remove a name, and wait until the requests for it that are here have ended. Return what went where."""
        known = self._state().names.get(name)
        before = holders_of(self._state(), () if known is None else [*dict.fromkeys(known.versions.values())])
        await self.remove(name, Wanted(hold_s=hold_s, managed_by=managed_by))
        here = [request.id for request in self._state().requests.values() if request.view.name == name]
        while any(request in self._state().requests for request in here):
            await asyncio.sleep(DRAIN_POLL_S)
        self.forget_unneeded()
        return tuple(gone_from(self._state(), before))

    async def remove(self, name: str, wanted: Wanted) -> None:
        """Remove a name. Requests for it that are here are still served. Raises Invalid if it is another owner's."""

        async def forget() -> Record:
            record = self.known(name)
            CONFIRM.get()()
            check_unregister(record, wanted, self.reconciled)
            held = self._taken_over(record, wanted)
            await self.registry.delete(name, record)
            return held

        self._forgotten_until[name] = (await tried(forget, ATTEMPTS_MAX)).held_until

    async def hold_ended(self, name: str) -> bool:
        """Return True once when an override of a declared name has run out, so that its owner decides again."""
        record = self.registry.get(name)
        if record is None:
            until = self._forgotten_until.get(name, 0.0)
        else:
            until = record.held_until if record.managed_by == "config" else 0.0
        if not 0 < until <= time():
            return False
        if record is not None:
            await self.registry.put(replace(record, held_until=0.0), record)
        self._forgotten_until.pop(name, None)
        return True

    def release(self, name: str) -> None:
        """Lift the quarantine of a name's versions, and forget engines' refusals. Raises Refused if there is none."""
        self.known(name)
        state = self._state()
        versions = [state.versions[digest] for digest in state.names[name].versions.values()]
        if not any(version.quarantined or version.refused_by for version in versions):
            raise Refused(
                Reason.INVALID_REQUEST,
                f"{name} is not quarantined, and no backend refuses it: there is nothing to release",
                adapter=name,
            )
        self._step(ev.ReleaseAsked(name))

    def _taken_over(self, record: Record, wanted: Wanted) -> Record:
        """As `taken_over`; a name that is no longer configured is as one registered by hand: nothing sets it back."""
        if record.managed_by == CONFIG and not self.is_configured(record.name):
            record = replace(record, managed_by=BY_HAND[0])
        return taken_over(record, wanted, time())

    async def _change(self, name: str, changed: Callable[[Record], Record], attempts_max: int = ATTEMPTS_MAX) -> Record:
        """Change an existing name. Raises Refused(UNKNOWN_ADAPTER)."""
        record, _ = await self._write(name, lambda before: changed(self.known(name)), attempts_max)
        return record

    async def _write(
        self, name: str, changed: Callable[[Record | None], Record], attempts_max: int = ATTEMPTS_MAX
    ) -> tuple[Record, bool]:
        """Store what `changed` makes of a name's record. Return that, and whether it was stored already.

        If another writer comes first, the change is computed anew from that writer's record. When this returns every
        live replica knows of it, even if it was stored before by a call that did not see its own end.
        """

        async def write() -> tuple[Record, bool]:
            before = self.registry.get(name)
            CONFIRM.get()()
            record = changed(None if name in self._harmful else before)
            if record == before:
                await self.registry.acknowledged(self.registry.last_change)
                return record, True
            await self.registry.put(record, before)
            return record, False

        return await tried(write, attempts_max)

    def _ordinal(self, record: Record, selector: str) -> int:
        """Return the ordinal that "v8" or the start of a digest selects. Raises Invalid(INVALID_NAME)."""
        if _ORDINAL.match(selector):
            return record.of(int(selector[1:])).ordinal
        for version in reversed(record.versions):
            if len(selector) >= 8 and version.adapter.digest.startswith(selector):
                return version.ordinal
        has = ", ".join(f"v{version.ordinal} ({version.adapter.digest[:12]})" for version in record.versions)
        raise Invalid(
            Reason.INVALID_NAME, f"{record.name} has no version {shown(selector)}; it has {has}", adapter=record.name
        )


def _base_name(name: str, base_model: str) -> str:
    """Return the base model's name. Raises Invalid(ADAPTER_MISMATCH) if it is missing or malformed.

    Without it nothing says for which engines the adapter is, and engines with an unknown base model would serve it.
    """
    if is_base_name(base_model):
        return base_model
    wrong = (
        f"{shown(base_model)} is no base model's name"
        if base_model
        else "its adapter_config.json names no base model (PEFT saves it so for a model that was made in memory)"
    )
    raise Invalid(
        Reason.ADAPTER_MISMATCH,
        f"{name}: {wrong}; register it with --base and the name of the base model that it was trained on, or put that "
        "into base_model_name_or_path",
        adapter=name,
    )


def _check_content(name: str, digest: str, wanted: str) -> None:
    """Raise Invalid(ADAPTER_MISMATCH) if an adapter's content is not the digest that its declaration names."""
    if wanted and digest != wanted:
        raise Invalid(
            Reason.ADAPTER_MISMATCH,
            f"{name}: the source holds the content {digest} and {wanted} is declared; name what it holds, or a source "
            "that holds what is declared",
            adapter=name,
        )


async def tried(attempt: Callable[[], Awaitable[T]], attempts_max: int) -> T:
    """Return the result of an attempt, repeated while another writer comes first; raise the last error."""
    for _ in range(attempts_max - 1):
        try:
            return await attempt()
        except Refused as refused:
            if refused.reason is not Reason.CHANGED_MEANWHILE:
                raise
    return await attempt()
