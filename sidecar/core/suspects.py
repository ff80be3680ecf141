"""Quarantine: one bad adapter must not take down a whole pool.

A version whose first load was in flight when an engine failed is a suspect. From then on it is loaded alone, and no
request that has lost a backend is sent to where it is being loaded. When a second backend is lost, it is quarantined.
"""

from __future__ import annotations

from sidecar.core import queueing
from sidecar.core.causes import Quarantined
from sidecar.core.effects import Quarantine
from sidecar.core.facts import Suspicion
from sidecar.core.state import Backend, State, Version
from sidecar.core.step import Step
from sidecar.errors import Reason


def suspect(step: Step, digest: str, version: Version, backend: Backend, text: str) -> None:
    """Suspect a version after a failure during its first loads; quarantine it after the second."""
    if version.answered:
        return
    version.suspect = True
    step.state.suspects[digest] = None
    version.lost_backends.append(backend.id)
    if len(version.lost_backends) < 2 or version.quarantined:
        return
    quarantine(step, digest, version, Suspicion(tuple(version.lost_backends), text))


def quarantine(step: Step, digest: str, version: Version, suspicion: Suspicion) -> None:
    """Refuse a version everywhere until an operator releases it."""
    if version.quarantined is not None:
        return
    version.quarantined = suspicion
    step.emit(Quarantine(digest, suspicion))
    for request in list(step.state.requests.values()):
        if request.version == digest and not request.running and not request.settled:
            queueing.drop(step, request, Reason.QUARANTINED, Quarantined(suspicion))


def clear(state: State, digest: str) -> None:
    """Clear a version of suspicion: it has answered, or an operator releases it."""
    version = state.versions[digest]
    version.suspect = False
    version.lost_backends.clear()
    state.suspects.pop(digest, None)
