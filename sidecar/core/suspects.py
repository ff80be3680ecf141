"""Quarantine: one bad adapter must not walk through a pool.

A version that was being loaded for the first time when an engine failed is a suspect. From then on it is loaded alone,
and nobody who was lost beside it is sent where it is being loaded. When a second backend dies of it, it is refused.
"""

from __future__ import annotations

from sidecar.core import queueing
from sidecar.core.effects import Quarantine
from sidecar.core.state import Backend, State, Version
from sidecar.core.step import Step
from sidecar.errors import Reason


def suspect(step: Step, digest: str, version: Version, backend: Backend, text: str) -> None:
    """Hold a version answerable for a failure during its first loads; two make it quarantined."""
    if version.answered:
        return
    version.suspect = True
    step.state.suspects[digest] = None
    version.lost_backends.append(backend.id)
    if len(version.lost_backends) < 2 or version.quarantined:
        return
    places = " and ".join(version.lost_backends)
    version.quarantined = f"its first loads coincided with the loss of {places} (last: {text})"
    step.emit(Quarantine(digest, version.quarantined))
    for request in list(step.state.requests.values()):
        if request.version == digest and not request.running and not request.settled:
            queueing.drop(step, request, Reason.QUARANTINED, quarantine_message(request.view.name, version))


def clear(state: State, digest: str) -> None:
    """Hold nothing against a version any more: it has answered, or a person says so."""
    version = state.versions[digest]
    version.suspect = False
    version.lost_backends.clear()
    state.suspects.pop(digest, None)


def quarantine_message(name: str, version: Version) -> str:
    return (
        f"{name} is quarantined: {version.quarantined}; find out why the engine dies of it, then lift it with "
        f'"sidecar adapters release {name}"'
    )
