"""The standing of a declared adapter, as its status, events, log and metrics show it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any

from sidecar.errors import SidecarError
from sidecar.kubernetes.deciding import Do, belongs_elsewhere, is_held, to_do
from sidecar.kubernetes.declarations import Declaration
from sidecar.kubernetes.placement import NOWHERE, Placement
from sidecar.state.records import Record

MESSAGE_LENGTH_MAX = 1000
RESIDENT_SHOWN_MAX = 64
INVALID_DECLARATION = "InvalidDeclaration"


class Phase(Enum):
    """The phase of a declaration; `Removing` is the phase of a name whose declaration was deleted."""

    PENDING = "Pending"
    LOADING = "Loading"
    READY = "Ready"
    HELD = "Held"
    FAILED = "Failed"
    REMOVING = "Removing"


def transition_of(phase: str, reason: str, version: str, message: str) -> tuple[str, str, str]:
    """Return the part of a standing whose change is a transition. Faults of a declaration differ by message only."""
    return phase, reason, message if reason == INVALID_DECLARATION else version


@dataclass(frozen=True)
class Standing:
    """The standing of one declaration. `reason` is machine-readable, in CamelCase."""

    phase: Phase
    reason: str
    message: str
    version: str = ""
    digest: str = ""
    places: Placement = NOWHERE
    accepted: bool = True

    @property
    def transition(self) -> tuple[str, str, str]:
        """The part of the standing whose change is a transition."""
        return transition_of(self.phase.value, self.reason, self.version, self.message)


@dataclass(frozen=True)
class Attempt:
    """The state of the work on a name: whether a step is running, and the error of the last one."""

    running: bool = False
    error: SidecarError | None = None


def standing_of(
    declaration: Declaration,
    record: Record | None,
    attempt: Attempt,
    places: Placement,
    now: float,
    loaded: str = "",
) -> Standing:
    """Return the standing of the chosen declaration of a name.

    `loaded` is the digest that was Ready before: once prefetched, a version may be evicted and still counts as Ready.
    """
    if declaration.problem:
        return Standing(Phase.FAILED, INVALID_DECLARATION, declaration.problem, accepted=False)
    elsewhere = belongs_elsewhere(declaration, record, now)
    if elsewhere:
        return Standing(Phase.FAILED, "NameTaken", elsewhere, accepted=False)
    if record is None or record.declared is None:
        return _first(attempt)
    version, digest = f"v{record.current}", record.adapter.digest
    if is_held(record, now):
        return Standing(Phase.HELD, "Held", _held(record), version, digest, places)
    if attempt.error is not None:
        message = f"{attempt.error.message}; {record.name} still answers with {version}"
        return Standing(Phase.FAILED, in_camel_case(attempt.error.reason.value), message, version, digest, places)
    if to_do(declaration, record, now) is not Do.NOTHING:
        message = f"{record.name} answers with {version} until the declared version is there"
        return Standing(Phase.LOADING, "Fetching", message, version, digest, places)
    message = f"{record.name} stands for {version}"
    if record.declared.prefetch is not None:
        if not places.wanted:
            message += "; none of the backends to prefetch it on can serve it"
        elif loaded != digest and len(places.ready) < len(places.wanted):
            message += " and is being prefetched"
            return Standing(Phase.LOADING, "Prefetching", message, version, digest, places)
    return Standing(Phase.READY, "Registered", message, version, digest, places)


def loser(declaration: Declaration, winner: Declaration) -> Standing:
    """Return the standing of a declaration whose name another one has."""
    source = winner.source
    return Standing(
        Phase.FAILED,
        "DeclaredTwice",
        f"{declaration.name} is declared by the {source.kind} {source.name} too, which is older and has it; give this "
        "one another name, or delete one of both",
        accepted=False,
    )


def _first(attempt: Attempt) -> Standing:
    if attempt.error is not None:
        return Standing(Phase.FAILED, in_camel_case(attempt.error.reason.value), attempt.error.message)
    if attempt.running:
        return Standing(Phase.LOADING, "Fetching", "its source is being read and checked")
    return Standing(Phase.PENDING, "Waiting", "its source will be read in a moment")


def _held(record: Record) -> str:
    until = datetime.fromtimestamp(record.held_until, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"an operator holds {record.name} at v{record.current} until {until}; then the declaration applies again"


def in_camel_case(reason: str) -> str:
    return "".join(word.capitalize() for word in reason.split("_"))


def status_of(standing: Standing, generation: int, before: dict[str, Any], now: float) -> dict[str, Any]:
    """Return the status of a LoraAdapter. `before` is its last status; times stay without a transition."""
    places = standing.places
    is_ready = standing.phase is Phase.READY
    is_held = standing.phase is Phase.HELD
    accepted = ("Accepted", "") if standing.accepted else (standing.reason, standing.message)
    conditions = [
        ("Accepted", standing.accepted, *accepted),
        ("Ready", is_ready, standing.reason, standing.message),
        ("Held", is_held, *(("Held", standing.message) if is_held else ("NotHeld", ""))),
    ]
    known = {condition.get("type"): condition for condition in before.get("conditions") or ()}
    return {
        "observedGeneration": generation,
        "phase": standing.phase.value,
        "version": standing.version,
        "digest": standing.digest,
        "desired": len(places.wanted),
        "ready": len(places.ready),
        "residentOn": list(places.resident[:RESIDENT_SHOWN_MAX]),
        "message": standing.message[:MESSAGE_LENGTH_MAX],
        "conditions": [
            _condition(kind, holds, reason, message, generation, known.get(kind) or {}, now)
            for kind, holds, reason, message in conditions
        ],
    }


def _condition(
    kind: str, holds: bool, reason: str, message: str, generation: int, before: dict[str, Any], now: float
) -> dict[str, Any]:
    status = "True" if holds else "False"
    turned = before.get("lastTransitionTime") if before.get("status") == status else None
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message[:MESSAGE_LENGTH_MAX],
        "observedGeneration": generation,
        "lastTransitionTime": turned or datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
