"""Brings the registry to what the cluster declares, for as long as this process leads.

Level-triggered: each pass compares all that is declared with all that is registered, whatever has happened before, and
begins a step for each name where they differ. It touches no name that its namespace's declarations do not own.
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
from sidecar.kubernetes.placement import NOWHERE, View, places_of
from sidecar.kubernetes.reporting import Reporter
from sidecar.kubernetes.standings import INVALID_DECLARATION, Phase, Standing, loser, standing_of
from sidecar.kubernetes.work import Steps, Work
from sidecar.shell.catalogue import Catalogue
from sidecar.shell.managing import CLUSTER
from sidecar.state.records import Record

logger = logging.getLogger(__name__)

LOOK_S = 5.0
"""How often all is looked at although nothing is known to have changed: where adapters are does not tell of itself."""
GATHER_S = 0.1
"""How long changes are gathered before a pass, which costs some 50 µs a name."""
LEAD_S = 0.5
NAMES_A_TURN = 20
"""Names looked at before the event loop gets to do something else."""


class Reconciler:
    """One process's. `leads` says whether it is the one; `view` what is known of the backends."""

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
        """Set once there was nothing to do, or nothing that did not have to wait."""
        self._wake = asyncio.Event()
        self.phases: Counter[str] = Counter()
        """How many declarations are in each phase; none while another process leads."""

    @property
    def has_names(self) -> bool:
        """Whether names are registered that the namespace declares, or has declared."""
        return any(self._is_owned(record) for record in self._catalogue.registry.all())

    def take(self, cluster: Cluster) -> None:
        """Take in what is declared now."""
        self._cluster = cluster
        self._wake.set()

    async def run(self) -> None:
        """Reconcile, for ever."""
        unsubscribe = self._catalogue.registry.subscribe(lambda change: self._wake.set())
        try:
            while True:
                while not self._may_look():
                    await asyncio.sleep(LEAD_S)
                await self._let_all_know()
                while self._may_look():
                    self._wake.clear()
                    await self._until(await self._pass())
                await self._rest()
        finally:
            unsubscribe()
            await self._rest()

    def _may_look(self) -> bool:
        return self._cluster.desired is not None and self._leads()

    async def _let_all_know(self) -> None:
        """Wait until every replica has what the one that led before wrote down: it may not have come to that itself."""
        while self._may_look():
            try:
                await self._catalogue.registry.acknowledged(self._catalogue.registry.last_change)
                return
            except Refused as refused:
                logger.info("what is declared is not looked at yet: %s", refused.message)
                await asyncio.sleep(LEAD_S)

    async def _rest(self) -> None:
        """Another leads: leave what is under way."""
        self._reporter.forget()
        self.phases.clear()
        works = list(self._works.values())
        self._works.clear()
        self._loaded.clear()
        await asyncio.gather(*(work.stop() for work in works))

    async def _until(self, seconds: float) -> None:
        """Wait for a change, or for so long; look now and then whether this process leads still."""
        until = monotonic() + seconds
        while not self._wake.is_set() and self._leads() and (left := until - monotonic()) > 0:
            try:
                async with asyncio.timeout(min(left, LEAD_S)):
                    await self._wake.wait()
            except TimeoutError:
                continue
        await asyncio.sleep(GATHER_S)

    async def _pass(self) -> float:
        """Look at every name; return in how many seconds to do so again."""
        desired, phases = self._cluster.desired, Counter[str]()
        assert desired is not None
        next_s = LOOK_S
        names = self._names(desired)
        for number, name in enumerate(names, 1):
            standing, again_s = self._look(name, desired)
            next_s = min(next_s, again_s)
            phases[standing.phase.value] += 1
            if number % NAMES_A_TURN == 0:
                await asyncio.sleep(0)
        for declaration, winner in desired.losers:
            standing = loser(declaration, winner)
            self._report(declaration, standing)
            phases[standing.phase.value] += 1
        for said in desired.unread.values():
            standing = Standing(Phase.FAILED, INVALID_DECLARATION, f"{said.problem}; what it declared before stays")
            self._reporter.tell(said.source, "", standing, {})
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
        """Return all names that are declared, or were."""
        managed = (record.name for record in self._catalogue.registry.all() if self._is_owned(record))
        return sorted({*desired.chosen, *managed})

    def _is_owned(self, record: Record) -> bool:
        return record.managed_by.startswith(self._owned)

    def _look(self, name: str, desired: Desired) -> tuple[Standing, float]:
        """Begin what there is to do about a name; return how it stands, and in how many seconds to look again."""
        record, now = self._catalogue.registry.get(name), time()
        declaration = desired.chosen.get(name)
        work = self._works.setdefault(name, Work(name, self._wake.set))
        work.about(wish_of(declaration))
        if declaration is None:
            standing = self._look_without(name, record, work, desired, now)
        else:
            do = to_do(declaration, record, now)
            if do is Do.NOTHING and work.is_unknown_to_others and not is_held(record, now):
                do = Do.SET
            if do is Do.NOTHING:
                work.rest()
            else:
                work.begin(lambda: self._steps.towards(do, declaration))
            here = NOWHERE if record is None else places_of(self._state(), self._view(), record)
            standing = standing_of(declaration, record, work.attempt, here, now, self._loaded_of(declaration))
            if standing.phase is Phase.READY:
                self._loaded[name] = standing.digest
            self._report(declaration, standing)
        retry_s = work.due_s - monotonic() if work.due_s and not work.is_running else LOOK_S
        return standing, max(0.0, min(next_look(record, now) - now, retry_s))

    def _may_change(self, name: str, declaration: Declaration | None) -> bool:
        """Whether this process leads still, and a name is declared so, or not at all: a step may take a while."""
        desired = self._cluster.desired
        return self._leads() and desired is not None and wish_of(desired.chosen.get(name)) == wish_of(declaration)

    def _loaded_of(self, declaration: Declaration) -> str:
        """Return the content that was Ready last, by this process or by the one that led before."""
        said = self._cluster.said.get(declaration.source.owner)
        if declaration.name in self._loaded or said is None or said.status.get("phase") != Phase.READY.value:
            return self._loaded.get(declaration.name, "")
        return str(said.status.get("digest", ""))

    def _look_without(self, name: str, record: Record | None, work: Work, desired: Desired, now: float) -> Standing:
        """Look at a name whose declaration has gone."""
        if record is None:
            return Standing(Phase.REMOVING, "Removed", f"{name} is forgotten")
        if record.managed_by in desired.unread:
            problem = desired.unread[record.managed_by].problem
            return Standing(Phase.FAILED, INVALID_DECLARATION, f"{name} stays as it is: {problem}")
        do = to_do_without(record, desired, now)
        if do is not Do.NOTHING:
            work.begin(lambda: self._steps.away(do, record))
        return Standing(Phase.REMOVING, "Removing", f"{name} is declared no more")

    def _report(self, declaration: Declaration, standing: Standing) -> None:
        said = self._cluster.said.get(declaration.source.owner)
        self._reporter.tell(declaration.source, declaration.name, standing, {} if said is None else said.status)
