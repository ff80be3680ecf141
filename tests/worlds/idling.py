"""Check that no engine idles while a request waits that it could serve.

The facts (waiting requests, engines' contents and limits) come from the core's state; the conclusions are drawn here,
independently of the core.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from policies.views import BASE
from sidecar.core import stealing
from sidecar.core.core import Core
from sidecar.core.enums import Phase
from sidecar.core.state import Backend, Request, State
from sidecar.lab.sim.setup import SECOND_NS
from tests.worlds.violation import hold

IDLE_NS_MAX = 2 * SECOND_NS


@dataclass
class Idling:
    """Tracks for how long each idle engine could have served each waiting request."""

    since_ns: dict[tuple[str, int], int] = field(default_factory=dict)
    longest_ns: int = 0

    def stepped(self, core: Core, now_ns: int) -> None:
        """Check one step of the core."""
        state, before = core.state, self.since_ns
        self.since_ns = {}
        if not state.queued:
            return
        for backend in state.backends.values():
            if not _idles(state, backend, now_ns):
                continue
            for request in state.requests.values():
                if _could_serve(state, backend, request, now_ns):
                    pair = (backend.id, request.id)
                    since_ns = self.since_ns[pair] = before.get(pair, now_ns)
                    self._check(backend, request, now_ns - since_ns)

    def _check(self, backend: Backend, request: Request, idle_ns: int) -> None:
        self.longest_ns = max(self.longest_ns, idle_ns)
        what = f"{backend.id} idles for {idle_ns / SECOND_NS:.3f} s beside request {request.id} for {request.version}"
        hold(idle_ns <= IDLE_NS_MAX, f"{what}, which waits at {request.backend} and which it could serve")


def _idles(state: State, backend: Backend, now_ns: int) -> bool:
    """Whether an engine that may be sent to has nothing to do. One that joins is spared on purpose.

    So is one whose own oldest request is not ready, where the order is strictly that of arrival: it lets nobody pass.
    """
    if backend.queued and state.config.ordering == "fifo":
        return False
    away = not backend.takes_requests or backend.id in state.joining
    busy = backend.running or backend.loads
    return backend.phase is Phase.UP and not away and not busy and now_ns >= backend.quiet_until_ns


def _could_serve(state: State, backend: Backend, request: Request, now_ns: int) -> bool:
    """Return True if a request waiting elsewhere could run here: its adapter or its weights are available."""
    if request.running or request.settled or request.backend == backend.id or backend.id in request.losses:
        return False
    if request.backend is not None:
        line = state.backends[request.backend].queued_by_version[request.version]
        if request.id not in line.first_few(int(stealing.HEADS_LOOKED_AT)):
            return False  # it is seen once it is among the first
    if request.only and backend.id not in request.only and (backend.pool or backend.id) not in request.only:
        return False
    if request.version == BASE or request.version in backend.shadow.host.held:
        return True
    version = state.versions[request.version]
    if len(version.loads) > 1 or any(not state.backends[place].silence.found for place in version.loads):
        return False  # it comes already
    if version.suspect or backend.id in version.refused_by or now_ns < backend.full_until_ns:
        return False
    entry = state.store.entries.get(state.packed_for(request.version, backend).key)
    return entry is not None and entry.ready
