"""Try stored records on a core of their own before the real core gets them.

An event on which the core raises leaves it half changed, and the process ends. A bad record would cause that at every
start. So each record is first given to a core that serves nobody, with the same engines; one that fails is left out.
"""

from __future__ import annotations

from collections.abc import Iterable

from sidecar.core import events as ev
from sidecar.core.config import CoreConfig
from sidecar.core.core import Core, Policies
from sidecar.core.facts import EngineFacts


class Trial:
    """Tries events one after the other. A core that has raised is thrown away."""

    def __init__(self, config: CoreConfig, policies: Policies, engines: Iterable[tuple[str, EngineFacts]]) -> None:
        self._config = config
        self._policies = policies
        self._engines = tuple(engines)
        self._core: Core | None = None

    def _fresh(self) -> Core:
        core = Core(self._config, self._policies)
        for backend, facts in self._engines:
            core.step(ev.BackendAdded(backend, facts, True), 0)
        return core

    def __call__(self, event: ev.Event) -> None:
        """Take an event. Raises what the real core would raise."""
        core, self._core = self._core or self._fresh(), None
        core.step(event, 0)
        self._core = core
