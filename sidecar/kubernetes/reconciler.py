"""Reconcile the registry with the cluster's declarations while this process leads.

The reconciler is level-triggered: each pass compares all declarations with all records, whatever happened before, and
starts work on each name where they differ. It changes only names that its namespace's declarations own.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from time import monotonic, time

from sidecar.core.state import State
from sidecar.errors import Refused
from sidecar.kubernetes.choosing import Cluster, Desired
from sidecar.kubernetes.deciding import Do, is_held, next_look, to_do, to_do_without
from sidecar.kubernetes.declarations import Declaration, wish_of
from sidecar.kubernetes.placement import NOWHERE, View, placement_of
from sidecar.kubernetes.reporting import Reporter
from sidecar.kubernetes.standings import INVALID_DECLARATION, Phase, Standing, loser, standing_of
from sidecar.kubernetes.work import Steps, Work
from sidecar.shell.catalogue import Catalogue
from sidecar.shell.managing import CLUSTER
from sidecar.state.records import Record

logger = logging.getLogger(__name__)

LOOK_S = 5.0
"""The time between passes without a known change: adapters' residency changes without an event."""
GATHER_S = 0.1
"""How long changes are gathered before a pass, which costs some 50 µs a name."""
LEAD_S = 0.5
NAMES_AT_ONCE = 20
"""Names compared before the event loop runs other tasks."""


class Reconciler:
    """Reconciles in one process. `leads` returns True while this process leads; `view` returns the known backends."""

    def __init__(
        self,
        catalogue: Catalogue,
        state: Callable[[], State],
        view: View,
        namespace: str,
        leads: Callable[[], bool],
        reporter: Reporter,
    ) -> None:
        self._catalogue = catalogue
        self._state = state
        self._view = view
        self._owned = f"{CLUSTER}{namespace}/"
        self._leads = leads
        self._reporter = reporter
        self._cluster = Cluster()
        self._works: dict[str, Work] = {}
        self._loaded: dict[str, str] = {}
        self._steps = Steps(catalogue, self._may_change, reporter)
        self.settled = asyncio.Event()
        """Set after the first pass that left no work running."""
        self._wake = asyncio.Event()
        self.phases: Counter[str] = Counter()
        """The number of declarations in each phase; empty while another process leads."""

    @property
    def has_names(self) -> bool:
        """True if names are registered that the namespace declares, or once declared."""
        return any(self._is_owned(record) for record in self._catalogue.registry.all())

    def take(self, cluster: Cluster) -> None:
        """Replace the declarations."""
        self._cluster = cluster
        self._wake.set()

    async def run(self) -> None:
        """Reconcile, for ever."""
        unsubscribe = self._catalogue.registry.subscribe(lambda change: self._wake.set())
        try:
            while True:
                while not self._may_reconcile():
                    await asyncio.sleep(LEAD_S)
                await self._wait_for_replicas()
                while self._may_reconcile():
                    self._wake.clear()
                    await self._wait(await self._pass())
                await self._stand_down()
        finally:
            unsubscribe()
            await self._stand_down()

    def _may_reconcile(self) -> bool:
        return self._cluster.desired is not None and self._leads()

    async def _wait_for_replicas(self) -> None:
        """Wait until every replica has the former leader's writes, which it may not have waited for itself."""
        while self._may_reconcile():
            try:
                await self._catalogue.registry.acknowledged(self._catalogue.registry.last_change)
                return
            except Refused as refused:
                logger.info("declarations are not reconciled yet: %s", refused.message)
                await asyncio.sleep(LEAD_S)

    async def _stand_down(self) -> None:
        """Stop all work: another process leads."""
        self._reporter.forget()
        self.phases.clear()
        works = list(self._works.values())
        self._works.clear()
        self._loaded.clear()
        await asyncio.gather(*(work.stop() for work in works))

    async def _wait(self, seconds: float) -> None:
        """Wait for a change, a timeout, or the loss of the lead."""
        until = monotonic() + seconds
        while not self._wake.is_set() and self._leads() and (left := until - monotonic()) > 0:
            try:
                async with asyncio.timeout(min(left, LEAD_S)):
                    await self._wake.wait()
            except TimeoutError:
                continue
        await asyncio.sleep(GATHER_S)

    async def _pass(self) -> float:
        """Reconcile every name; return the seconds until the next pass."""
        desired, phases = self._cluster.desired, Counter[str]()
        assert desired is not None
        next_s = LOOK_S
        names = self._names(desired)
        for number, name in enumerate(names, 1):
            standing, again_s = self._reconcile(name, desired)
            next_s = min(next_s, again_s)
            phases[standing.phase.value] += 1
            if number % NAMES_AT_ONCE == 0:
                await asyncio.sleep(0)
        for declaration, winner in desired.losers:
            standing = loser(declaration, winner)
            self._report(declaration, standing)
            phases[standing.phase.value] += 1
        for declaring in desired.unread.values():
            standing = Standing(
                Phase.FAILED, INVALID_DECLARATION, f"{declaring.problem}; its earlier declarations stay"
            )
            self._reporter.tell(declaring.source, "", standing, {})
            phases[standing.phase.value] += 1
        for name in [name for name in self._works if name not in names]:
            if not self._works[name].is_running:
                del self._works[name]
                self._loaded.pop(name, None)
        self.phases = phases
        if not any(work.is_running for work in self._works.values()):
            self.settled.set()
        return next_s

    def _names(self, desired: Desired) -> list[str]:
        """Return all names that are declared, or once were."""
        managed = (record.name for record in self._catalogue.registry.all() if self._is_owned(record))
        return sorted({*desired.chosen, *managed})

    def _is_owned(self, record: Record) -> bool:
        return record.managed_by.startswith(self._owned)

    def _reconcile(self, name: str, desired: Desired) -> tuple[Standing, float]:
        """Start the work on a name that is needed; return its standing, and the seconds until the next check."""
        record, now = self._catalogue.registry.get(name), time()
        declaration = desired.chosen.get(name)
        work = self._works.setdefault(name, Work(name, self._wake.set))
        work.about(wish_of(declaration))
        if declaration is None:
            standing = self._reconcile_removed(name, record, work, desired, now)
        else:
            do = to_do(declaration, record, now)
            if do is Do.NOTHING and work.is_unknown_to_others and not is_held(record, now):
                do = Do.SET
            if do is Do.NOTHING:
                work.rest()
            else:
                work.begin(lambda: self._steps.towards(do, declaration), lambda: self._steps.seen_of(declaration))
            here = NOWHERE if record is None else placement_of(self._state(), self._view(), record)
            standing = standing_of(declaration, record, work.attempt, here, now, self._loaded_of(declaration))
            if standing.phase is Phase.READY:
                self._loaded[name] = standing.digest
            self._report(declaration, standing)
        retry_s = work.due_s - monotonic() if work.due_s and not work.is_running else LOOK_S
        return standing, max(0.0, min(next_look(record, now) - now, retry_s))

    def _may_change(self, name: str, declaration: Declaration | None) -> bool:
        """Return True if this process still leads and the name's declaration is unchanged since a step began."""
        desired = self._cluster.desired
        return self._leads() and desired is not None and wish_of(desired.chosen.get(name)) == wish_of(declaration)

    def _loaded_of(self, declaration: Declaration) -> str:
        """Return the digest that was last Ready, according to this process or the former leader."""
        declaring = self._cluster.said.get(declaration.source.owner)
        if declaration.name in self._loaded or declaring is None or declaring.status.get("phase") != Phase.READY.value:
            return self._loaded.get(declaration.name, "")
        return str(declaring.status.get("digest", ""))

    def _reconcile_removed(
        self, name: str, record: Record | None, work: Work, desired: Desired, now: float
    ) -> Standing:
        """Start the work on a name whose declaration was deleted; return its standing."""
        if record is None:
            return Standing(Phase.REMOVING, "Removed", f"{name} is forgotten")
        if record.managed_by in desired.unread:
            problem = desired.unread[record.managed_by].problem
            return Standing(Phase.FAILED, INVALID_DECLARATION, f"{name} stays as it is: {problem}")
        do = to_do_without(record, desired, now)
        if do is not Do.NOTHING:
            work.begin(lambda: self._steps.away(do, record))
        return Standing(Phase.REMOVING, "Removing", f"{name} is no longer declared")

    def _report(self, declaration: Declaration, standing: Standing) -> None:
        declaring = self._cluster.said.get(declaration.source.owner)
        self._reporter.tell(
            declaration.source, declaration.name, standing, {} if declaring is None else declaring.status
        )
