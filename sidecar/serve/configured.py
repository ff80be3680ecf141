"""The backends that a configuration names by address, added, replaced and taken out while the process runs.

One that is taken out gets nothing new. It serves what waits there and no other backend takes, and is removed once
nothing runs and nothing waits there any more. A backend with other settings, such as another address, is another one:
the former is taken out first, and its successor has the id from the moment on at which that is removed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import monotonic

from sidecar.backends.api import Backend
from sidecar.config.backends import Backend as Entry
from sidecar.core.facts import EngineFacts
from sidecar.serve.discovered import BackendMaker, has_ended
from sidecar.serve.pool import make_backend
from sidecar.tasks import Tasks

logger = logging.getLogger(__name__)

LOOK_S = 0.05


@dataclass(frozen=True)
class Settings:
    """How a backend is configured, and what is declared of its engine."""

    entry: Entry
    declared: EngineFacts


@dataclass(frozen=True)
class Made:
    """A backend that is made, with the known facts of its engine, and not served yet."""

    settings: Settings
    backend: Backend
    facts: EngineFacts


class ConfiguredBackends:
    """The backends of a process that have an address. Those in `present` are served already.

    Runs at one that is taken out may go on for `drain_s` seconds.
    """

    def __init__(self, maker: BackendMaker, present: Mapping[str, Settings], drain_s: float) -> None:
        self._maker = maker
        self._gateway = maker.gateway
        self._drain_s = drain_s
        self._present = dict(present)
        """What is served, those included that are being taken out."""
        self._next: dict[str, Made | None] = {}
        """Of each that is being taken out, its successor."""
        self._gateway.fleet.successors = self._next
        self._removing: set[str] = set()
        self._going: dict[str, asyncio.Task[None]] = {}
        self._tasks = Tasks()

    def make(self, wanted: Mapping[str, Settings]) -> dict[str, Made]:
        """Make what is wanted and not there. Raises Misused; then nothing is left behind."""
        made: dict[str, Made] = {}
        try:
            for identity, settings in wanted.items():
                waiting = self._next.get(identity)
                if self._present.get(identity) == settings and identity not in self._removing:
                    continue
                if waiting is not None and waiting.settings == settings:
                    made[identity] = waiting
                else:
                    new = make_backend(settings.entry, settings.declared, self._maker.wiring)
                    made[identity] = Made(settings, *new)
        except BaseException:
            self.discard(made)
            raise
        return made

    def discard(self, made: Mapping[str, Made]) -> None:
        """Close what was made and is not going to be served."""
        for identity, one in made.items():
            if self._next.get(identity) is not one:
                self._tasks.spawn(one.backend.stop())

    def change(self, wanted: Mapping[str, Settings], made: Mapping[str, Made]) -> None:
        """Serve what is wanted, of which `make` has just made what is not there, and take out all others.

        What is new comes first: what waits for one that goes may wait for it.
        """
        before = [*self._present]
        for identity, new in made.items():
            if identity not in before:
                self._add(identity, new)
        for identity in before:
            if identity not in wanted or identity in made:
                self._take_out(identity, made.get(identity))
            elif identity in self._next:
                self._keep(identity)

    def _add(self, identity: str, new: Made) -> None:
        logger.info("%s is added", identity)
        self._present[identity] = new.settings
        self._gateway.fleet.add(new.backend, new.facts, self._gateway.elsewhere is None, fresh=True)
        self._declare(new)
        self._tasks.spawn(self._gateway.fleet.start(new.backend))

    def _take_out(self, identity: str, successor: Made | None) -> None:
        is_going, former = identity in self._next, self._next.get(identity)
        self._next[identity] = successor
        if former is not None and former is not successor:
            self.discard({identity: former})
        if not is_going:
            then = "is taken out" if successor is None else "is replaced by an engine with other settings"
            logger.info("%s %s once nothing runs there", identity, then)
            self._gateway.fleet.set_leaving(identity, True, serves_queue=True)
            self._going[identity] = self._tasks.spawn(self._see_off(identity))

    def _keep(self, identity: str) -> None:
        """Take one back that was about to go."""
        logger.info("%s stays after all", identity)
        self._going.pop(identity).cancel()
        former = self._next.pop(identity)
        if former is not None:
            self.discard({identity: former})
        self._gateway.fleet.set_leaving(identity, False)

    async def _see_off(self, identity: str) -> None:
        until_s = monotonic() + self._drain_s
        while not has_ended(self._gateway, identity) and monotonic() < until_s:
            await asyncio.sleep(LOOK_S)
        self._removing.add(identity)
        try:
            await self._gateway.remove_backend(identity, "an operator removed it", lambda: self._succeeded(identity))
        finally:
            self._removing.discard(identity)

    def _succeeded(self, identity: str) -> tuple[Backend, EngineFacts] | None:
        """Note that a backend is gone, and return its successor, which is started once it is there."""
        self._maker.restarts.forget(identity)
        made = self._next.pop(identity)
        del self._present[identity]
        loop, replica = asyncio.get_running_loop(), self._maker.replica
        if replica is not None:
            loop.call_soon(replica.gone, identity)  # once the core has forgotten it
        if made is None:
            logger.info("%s is removed", identity)
            return None
        logger.info("%s is replaced", identity)
        self._present[identity] = made.settings
        self._declare(made)
        loop.call_soon(lambda: self._tasks.spawn(self._gateway.fleet.start(made.backend)))
        return made.backend, made.facts

    def _declare(self, made: Made) -> None:
        self._maker.restarts.declare(made.settings.entry)
        if self._maker.replica is not None:
            asyncio.get_running_loop().call_soon(self._maker.replica.found, made.settings.entry.identity)

    async def stop(self) -> None:
        """Take nothing out any more; what is there stays as it is."""
        await self._tasks.stop()
        await asyncio.gather(*(made.backend.stop() for made in self._next.values() if made is not None))


def settings_of(entries: Sequence[Entry], facts: Mapping[str, EngineFacts]) -> dict[str, Settings]:
    """Return the settings of the backends that have an address, by id."""
    return {entry.identity: Settings(entry, facts[entry.identity]) for entry in entries if entry.discover is None}
