"""A core that tries what is written down before the real one takes it.

An event that makes a core raise leaves it half changed, and the process ends. For a record that would be so at every
start. So each is first given to a core that serves nobody, before the same engines; one that fails there is left out.
"""

from __future__ import annotations

from collections.abc import Iterable

from sidecar.core import events as ev
from sidecar.core.config import CoreConfig
from sidecar.core.core import Core, Policies
from sidecar.core.facts import EngineFacts


class Trial:
    """Tries events, one after the other; a core that has raised is thrown away."""

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
        """Take an event. Raises what the real core would."""
        core, self._core = self._core or self._fresh(), None
        core.step(event, 0)
        self._core = core
