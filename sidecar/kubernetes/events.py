"""The event that a transition of a declared adapter makes in the cluster."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sidecar.kubernetes.api import FIELD_MANAGER
from sidecar.kubernetes.declarations import GROUP, KIND, VERSION, Source
from sidecar.kubernetes.standings import Phase, Standing

NOTE_LENGTH_MAX = 1000


def note_of(source: Source, name: str, standing: Standing) -> str:
    """Return a message that says which adapter is meant: a ConfigMap declares several."""
    is_named = not name or source.name == name or standing.message.startswith(name)
    return standing.message if is_named else f"{name}: {standing.message}"


def event_of(source: Source, note: str, standing: Standing, instance: str) -> dict[str, Any]:
    is_lora = source.kind == KIND
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"generateName": f"{source.name[:200]}.", "namespace": source.namespace},
        "eventTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "reportingController": f"{GROUP}/{FIELD_MANAGER}",
        "reportingInstance": instance[:128],
        "action": standing.phase.value,
        "reason": standing.reason,
        "type": "Warning" if standing.phase is Phase.FAILED else "Normal",
        "note": note[:NOTE_LENGTH_MAX],
        "regarding": {
            "apiVersion": f"{GROUP}/{VERSION}" if is_lora else "v1",
            "kind": source.kind,
            "namespace": source.namespace,
            "name": source.name,
            "uid": source.uid,
        },
    }
