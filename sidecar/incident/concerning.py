"""Which steps can have changed why a request waits: those of its own backend, and those that reach all of them.

A run that begins, goes on or ends at another backend changes nothing here unless it moved the store or a timer. What
is not known for certain to be elsewhere is looked at.
"""

from __future__ import annotations

from sidecar.core import effects as do
from sidecar.core import events as ev
from sidecar.core.state import State
from sidecar.journal.replay import Replayed

_OF_A_REQUEST = (ev.Received, ev.FirstToken, ev.RunEnded, ev.RunFailed)
_OF_A_BACKEND = (ev.Progress, ev.BackendMeasured)
_LOCAL = (do.Dispatch, do.CancelRun, do.Settle)


def may_concern(step: Replayed, state: State, backend: str) -> bool:
    """Whether a step may have changed what holds at a backend. `state` is the one after it."""
    if _place_of(step, state) in ("", backend):
        return True
    # A fetch, a drop, a load, a heal, a timer: any of them may reach this backend.
    return not all(isinstance(effect, _LOCAL) and effect.backend not in ("", backend) for effect in step.effects)


def _place_of(step: Replayed, state: State) -> str:
    """Return the one backend that a step's event belongs to; "" when it is not known or there is none."""
    event = step.event
    if isinstance(event, _OF_A_BACKEND):
        return event.backend
    if not isinstance(event, _OF_A_REQUEST):
        return ""
    request = state.requests.get(event.request)
    if request is not None:
        return request.backend or ""
    return next((effect.backend for effect in step.effects if isinstance(effect, do.Settle)), "")
