"""Drain and restart engines that keep as many adapter versions as they may; log those that are not to be restarted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from time import monotonic

from sidecar.backends.api import Backend as Endpoint
from sidecar.config.backends import Backend as Entry
from sidecar.config.restart import Restart
from sidecar.core import eligibility
from sidecar.core.effects import Effect
from sidecar.core.enums import Phase
from sidecar.core.events import BackendTaken, DrainSet, Event
from sidecar.core.state import Backend, State
from sidecar.replicas.replica import Replica
from sidecar.serve.restart_rounds import Act, Do, Engine, Rounds
from sidecar.serve.restarters import Restarter, restarter_of
from sidecar.shell.gateway import Gateway
from sidecar.tasks import Tasks

logger = logging.getLogger(__name__)

LOOK_S = 0.5
SETTLE_S = 3.0
"""Time in which every replica has heard what every other one restarts."""


@dataclass(frozen=True)
class _Declared:
    restart: Restart
    restarter: Restarter


class Restarts:
    """Looks at all engines, and carries out what `Rounds` decides.

    `drain_timeout_s` limits the drain of one engine. The gateway's backends are declared one by one, as they are made.
    """

    def __init__(self, gateway: Gateway, drain_timeout_s: float) -> None:
        self._gateway = gateway
        self._drain_timeout_s = drain_timeout_s
        self._replica: Replica | None = None
        self._rounds = Rounds(drain_timeout_s)
        self._declared: dict[str, _Declared] = {}
        self._tasks = Tasks()
        self._sets = False
        """True while this sets a drain: every other one is an operator's."""
        gateway.observe(self)

    def declare(self, entry: Entry, pod: str = "", namespace: str | None = None) -> None:
        """Note how to restart a backend. `pod` is its name if it was found in `namespace`."""
        restart = entry.restart_when_out
        if restart is not None:
            self._declared[entry.identity] = _Declared(restart, restarter_of(entry, restart, pod, namespace))

    def forget(self, backend: str) -> None:
        """Forget a backend that has been removed."""
        self._declared.pop(backend, None)

    def start(self, replica: Replica | None) -> None:
        if replica is not None:
            self._replica = replica
            self._rounds = Rounds(self._drain_timeout_s, SETTLE_S)
        self._tasks.spawn(self._watch())

    async def stop(self) -> None:
        """Begin nothing more. A command that runs is left to its end: half of it could leave an engine stopped."""
        await self._tasks.stop()

    @property
    def at(self) -> str | None:
        """The engine that is being drained and restarted; None if none is."""
        return None if self._rounds.round is None else self._rounds.round.backend

    def observed(self, event: Event, effects: Sequence[Effect], now_ns: int) -> None:
        """Hear of operators' drains, and of engines that come from other replicas (`shell.driver.Observer`)."""
        if isinstance(event, DrainSet) and not self._sets:
            self._rounds.operator_set(event.backend, event.draining)
        elif isinstance(event, BackendTaken) and self._replica is not None:
            self._gateway.backends[event.backend].keeps_at_least(self._replica.board.versions_kept(event.backend))

    async def _watch(self) -> None:
        while self._gateway.crash.raised is None:
            try:
                self._look()
            except Exception:
                logger.exception("looking for engines to restart failed; it is tried again")
            await asyncio.sleep(LOOK_S)

    def _look(self) -> None:
        engines = {backend: self._engine(known) for backend, known in self._gateway.state.backends.items()}
        for act in self._rounds.step(monotonic(), engines, self._elsewhere()):
            self._carry_out(act)
        if self._replica is not None:
            self._replica.tell_restarting(self.at or "")

    def _elsewhere(self) -> Collection[str]:
        return () if self._replica is None else self._replica.restarted_elsewhere()

    def _engine(self, known: Backend) -> Engine:
        backend = self._gateway.backends[known.id]
        wear, declared = backend.wear, self._declared.get(known.id)
        is_asked = declared is not None and (self.at == known.id or (wear is not None and wear.is_out))
        return Engine(
            instance=backend,
            pool=known.pool,
            wear=wear,
            is_declared=declared is not None,
            is_owned=known.owned,
            is_up=known.phase is Phase.UP and (wear is not None or declared is None),
            is_draining=known.draining,
            in_flight=known.in_flight,
            others_serve=is_asked and others_serve(self._gateway.state, known, self._takes),
            in_place=declared is None or not declared.restart.delete_pod,
            ready_s=Engine.ready_s if declared is None else declared.restart.ready_s,
        )

    def _takes(self, backend: Backend) -> bool:
        """Return True if an engine takes requests, by this replica or by its owner's word."""
        if backend.owned or self._replica is None:
            return backend.takes_requests
        return backend.phase is Phase.UP and self._replica.board.serves(backend.id)

    def _carry_out(self, act: Act) -> None:
        logger.log(logging.WARNING if act.warns else logging.INFO, "%s: %s", act.backend, act.text)
        if act.do is Do.RESTART:
            declared = self._declared[act.backend]
            self._tasks.spawn(self._restart(self._gateway.backends[act.backend], declared))
        elif act.do in (Do.DRAIN, Do.UNDRAIN):
            self._sets = True
            try:
                self._gateway.set_drain(act.backend, act.do is Do.DRAIN)
            finally:
                self._sets = False

    async def _restart(self, backend: Endpoint, declared: _Declared) -> None:
        try:
            error = await declared.restarter()
        except Exception as broken:
            logger.exception("the restart of %s broke", backend.id)
            error = f"the sidecar failed: {broken}"
        if not error and not declared.restart.delete_pod:
            backend.restarted()
        self._rounds.restarted(error)


def others_serve(state: State, backend: Backend, takes: Callable[[Backend], bool]) -> bool:
    """Return True if other engines that take requests serve the base model and every version that a backend serves."""
    others = [other for other in state.backends.values() if other is not backend and takes(other)]
    names = set(backend.facts.base_models)
    served = [
        digest
        for digest, version in state.versions.items()
        if not version.quarantined and eligibility.unfit_for(state, backend, digest) is None
    ]
    return any(not names or names & set(other.facts.base_models) for other in others) and all(
        any(eligibility.unfit_for(state, other, digest) is None for other in others) for digest in served
    )
