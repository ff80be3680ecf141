"""Check that a stalled engine gets no new requests after the allowed silence and one probe.

The check is independent of the core's own state, except for the definition of a sign of life.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sidecar.core import effects as do
from sidecar.core import events as ev
from sidecar.core import promising
from sidecar.core.core import Core
from sidecar.core.state import Backend, State
from sidecar.lab.sim.product import PROGRESS_NS
from sidecar.lab.sim.setup import SECOND_NS
from tests.worlds.violation import hold

SILENT_NS, SILENT_STEPS = 2 * SECOND_NS, 5
DOUBLINGS_MAX = 4
"""After so many answered probes without a sign of its own, an engine is no longer probed."""


@dataclass
class Stalls:
    """The stalls of engines with their times, and since when each engine has had a run that somebody waits for."""

    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    seen: int = 0
    """Stalls under which the core came to suspect the engine."""
    _busy_ns: dict[str, int] = field(default_factory=dict)
    _excused: dict[str, int] = field(default_factory=dict)
    """The number of probes that each engine has answered since its last tokens, or later."""

    def begin(self, backend: str, now_ns: int, for_ns: int) -> bool:
        """Note that an engine stalls. Return False if it does already."""
        if self.stands_still(backend, now_ns):
            return False
        self.spans[backend] = now_ns, now_ns + for_ns
        return True

    def end(self, backend: str) -> None:
        self.spans.pop(backend, None)

    def stands_still(self, backend: str, now_ns: int) -> bool:
        return self.spans.get(backend, (0, 0))[1] > now_ns

    def stepped(self, core: Core, event: ev.Event, effects: list[do.Effect], now_ns: int) -> None:
        """Check one step of the core."""
        if isinstance(event, ev.Progress | ev.BackendUp):
            self._excused.pop(event.backend, None)
        elif isinstance(event, ev.BackendProbed) and event.alive:
            self._excused[event.backend] = self._excused.get(event.backend, 0) + 1
        elif isinstance(event, ev.BackendProbed):
            self.seen += 1
        sent = {effect.backend for effect in effects if isinstance(effect, do.Dispatch | do.Load)}
        for name in self.spans:
            backend = core.state.backends[name]
            if self.stands_still(name, now_ns) and (backend.takes_requests or name in sent):
                self._check(core.state, backend, now_ns)
        for backend in core.state.backends.values():
            if any(not core.state.requests[request].settled for request in backend.running):
                self._busy_ns.setdefault(backend.id, now_ns)
            else:
                self._busy_ns.pop(backend.id, None)

    def _check(self, state: State, backend: Backend, now_ns: int) -> None:
        busy_ns = self._busy_ns.get(backend.id, now_ns)
        silent_ns = now_ns - max(self.spans[backend.id][0], busy_ns)
        excused = self._excused.get(backend.id, 0)
        if excused > DOUBLINGS_MAX:
            return
        unread = [state.requests[request] for request in backend.running if not state.requests[request].first_token]
        prompts_ns = promising.pace_of(backend).prompt_token_ns * sum(each.view.input_tokens for each in unread)
        steps_ns = max(SILENT_NS, 2 * SILENT_STEPS * promising.step_ns(state, backend))
        limit_ns = PROGRESS_NS + prompts_ns + steps_ns * 2 * (1 << excused)  # and as much for the probe
        what = f"{backend.id} is sent something, or would be, after {silent_ns / SECOND_NS:.3f} s without a step"
        hold(silent_ns <= limit_ns, f"{what}, and {limit_ns / SECOND_NS:.3f} s were allowed")
