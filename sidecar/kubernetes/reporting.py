"""Report the standing of declared adapters to the cluster: the status of LoraAdapters, and an event per transition.

Both are written in the background and may be late; a failed write is retried. A status is compared with the object's
current one, so that a new leader writes only differences.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from time import monotonic, time
from typing import Any

from sidecar.kubernetes.api import FIELD_MANAGER, Api, Collection
from sidecar.kubernetes.declarations import GROUP, KIND, VERSION, Source, loras_in
from sidecar.kubernetes.failures import CONFLICT, FORBIDDEN, NOT_FOUND, ApiError, is_final
from sidecar.kubernetes.pauses import Pauses
from sidecar.kubernetes.standings import Phase, Standing, status_of, transition_of

logger = logging.getLogger(__name__)

COUNTS_EVERY_S = 10.0
"""The least time between two writes of a status if only counts and backends have changed."""
EVENTS_MAX = 1000
"""The most events that wait to be written; further ones are dropped, and only logged."""
CONFLICTS_MAX = 3
WORTH_AN_EVENT = (Phase.READY, Phase.HELD, Phase.FAILED, Phase.REMOVING)
COUNTED = ("desired", "ready", "residentOn", "message")
"""The fields of a status whose change is not a transition."""

Status = dict[str, Any]
NOTE_BYTES_MAX, INSTANCE_BYTES_MAX = 1024, 128
"""What the API server takes of an event; longer texts are cut."""


class Change(Enum):
    """How a status differs from the object's: not at all, in counts and backends only, or by a transition."""

    NONE = "none"
    COUNTS = "counts"
    TRANSITION = "transition"


@dataclass
class _Written:
    """The known status of one LoraAdapter, the wanted standing, and the time of the last write."""

    source: Source
    status: Status
    wanted: Standing | None = None
    wrote_s: float = field(default_factory=lambda: -COUNTS_EVERY_S)
    refused: Standing | None = None


class Reporter:
    """Writes statuses and events while this process leads. `instance` is this process's name."""

    def __init__(self, api: Api, namespace: str, instance: str) -> None:
        self._api = api
        self._namespace = namespace
        self._instance = instance
        self._transitions: dict[str, tuple[str, str, str]] = {}
        self._written: dict[str, _Written] = {}
        self._events: asyncio.Queue[dict[str, Any]] = asyncio.Queue(EVENTS_MAX)
        self._due: dict[str, None] = {}
        """The names of LoraAdapters whose status may have to be written."""
        self._changed = asyncio.Event()

    def forget(self) -> None:
        """Drop all pending statuses: another process leads and reports its own."""
        self._transitions.clear()
        self._written.clear()
        self._due.clear()

    def tell(self, source: Source, name: str, standing: Standing, status: Status) -> None:
        """Report a name's standing. `status` is its LoraAdapter's last known status."""
        self._announce_transition(source, name, standing, status)
        if source.kind != KIND or source.leaving:
            return
        known = self._written.get(source.name)
        if known is None or known.source.resource_version != source.resource_version:
            wrote_s = -COUNTS_EVERY_S if known is None else known.wrote_s
            known = self._written[source.name] = _Written(source, status, wrote_s=wrote_s)
        if known.wanted != standing:
            known.wanted = standing
            self._due[source.name] = None
            self._changed.set()

    def gone(self, owner: str, name: str) -> None:
        """Forget a deleted declaration."""
        self._transitions.pop(f"{owner} {name}", None)
        self._written = {each: known for each, known in self._written.items() if known.source.owner != owner}

    def say(self, source: Source, name: str, standing: Standing) -> None:
        """Log a declaration's standing and queue an event."""
        level = logging.WARNING if standing.phase is Phase.FAILED else logging.INFO
        logger.log(level, "%s %s: %s: %s", source.kind, source.name, standing.reason, note_of(source, name, standing))
        try:
            self._events.put_nowait(event_of(source, note_of(source, name, standing), standing, self._instance))
        except asyncio.QueueFull:
            logger.warning("too many events wait for the API server; this one is not written")

    def _announce_transition(self, source: Source, name: str, standing: Standing, status: Status) -> None:
        """Log and queue an event if a standing is a transition from the last one, or, at first, from the status."""
        key = f"{source.owner} {name}"
        before = self._transitions.get(key) or _transition_in(status)
        self._transitions[key] = standing.transition
        if standing.phase not in WORTH_AN_EVENT or standing.transition == before:
            return
        if before is None and standing.phase is Phase.READY:  # unchanged since this process began to lead
            return
        self.say(source, name, standing)

    # Writing.

    async def run(self) -> None:
        """Write pending events and statuses, for ever."""
        await asyncio.gather(self._write_events(), self._write_statuses())

    async def _write_events(self) -> None:
        pauses = Pauses()
        events = Collection("events.k8s.io", "v1", "events", self._namespace)
        while True:
            event = await self._events.get()
            while True:
                try:
                    await self._api.create(events, event)
                    pauses.end()
                    break
                except ApiError as error:
                    if not pauses.failures:
                        logger.warning("an event is not written: %s", error.message)
                    if is_final(error) or error.code == FORBIDDEN:
                        pauses.next_s()
                        break
                    await asyncio.sleep(pauses.next_s(error.retry_after_s))

    async def _write_statuses(self) -> None:
        pauses = Pauses()
        while True:
            self._changed.clear()
            try:
                for name in list(self._due):
                    await self._write_if_due(name)
                pauses.end()
            except ApiError as error:
                if not pauses.failures:
                    logger.warning("a status is not written yet: %s", error.message)
                await asyncio.sleep(pauses.next_s(error.retry_after_s))
                continue
            try:
                async with asyncio.timeout(COUNTS_EVERY_S / 5 if self._due else None):
                    await self._changed.wait()
            except TimeoutError:  # changed counts may be due now
                continue

    async def _write_if_due(self, name: str) -> None:
        """Write a LoraAdapter's status if it has changed and is due."""
        known = self._written.get(name)
        change = Change.NONE if known is None else _change(known, time())
        if known is not None and change is Change.COUNTS and monotonic() - known.wrote_s < COUNTS_EVERY_S:
            return
        self._due.pop(name, None)  # before the write, during which another standing may be reported
        await asyncio.sleep(0)
        if known is not None and change is not Change.NONE:
            try:
                await self._write_or_refuse(known)
            except ApiError:
                self._due[name] = None
                raise

    async def _write_or_refuse(self, known: _Written) -> None:
        """Write one status. One that the server refuses for its content is not retried until it changes."""
        try:
            await self._write(known)
        except ApiError as error:
            if not is_final(error):
                raise
            logger.warning("a status is not written: %s", error.message)
            known.refused = known.wanted

    async def _write(self, known: _Written) -> None:
        """Write one status; retry if the object has changed meanwhile with the same declaration."""
        source, collection = known.source, loras_in(self._namespace)
        version, before = source.resource_version, known.status
        for _ in range(CONFLICTS_MAX):
            assert known.wanted is not None
            status = status_of(known.wanted, source.generation, before, time())
            patch = {"metadata": {"resourceVersion": version}, "status": status}
            try:
                await self._api.patch_status(collection, source.name, patch)
            except ApiError as error:
                if error.code == NOT_FOUND:
                    self._written.pop(source.name, None)
                    return
                if error.code != CONFLICT:
                    raise
                found = await self._found(collection, source.name)
                metadata = found.get("metadata", {})
                if metadata.get("uid") != source.uid or metadata.get("generation") != source.generation:
                    return  # its declaration has changed, which the reconciler will see
                version, before = metadata["resourceVersion"], found.get("status") or {}
            else:
                known.status, known.wrote_s = status, monotonic()
                return

    async def _found(self, collection: Collection, name: str) -> dict[str, Any]:
        try:
            return await self._api.get(f"{collection.path}/{name}")
        except ApiError as error:
            if error.code == NOT_FOUND:
                return {}
            raise


def _change(known: _Written, now: float) -> Change:
    """Return how the wanted status differs from the object's."""
    if known.wanted is None or known.wanted == known.refused:
        return Change.NONE
    wanted = status_of(known.wanted, known.source.generation, known.status, now)
    before = {key: known.status.get(key) for key in wanted}
    if wanted == before:
        return Change.NONE
    return Change.COUNTS if _without_counts(wanted) == _without_counts(before) else Change.TRANSITION


def _without_counts(status: Status) -> Status:
    conditions = [
        {key: condition.get(key) for key in ("type", "status", "reason", "observedGeneration")}
        for condition in status.get("conditions") or ()
    ]
    return {key: value for key, value in status.items() if key not in COUNTED} | {"conditions": conditions}


def _transition_in(status: Status) -> tuple[str, str, str] | None:
    """Return the transition that a status records, or None."""
    if not status.get("phase"):
        return None
    reasons = {condition.get("type"): condition.get("reason") for condition in status.get("conditions") or ()}
    return transition_of(
        status["phase"], str(reasons.get("Ready")), status.get("version", ""), status.get("message", "")
    )


def note_of(source: Source, name: str, standing: Standing) -> str:
    """Return a standing's message, with the adapter's name if the object is a ConfigMap, which declares several."""
    is_named = not name or source.name == name or standing.message.startswith(name)
    return standing.message if is_named else f"{name}: {standing.message}"


def event_of(source: Source, note: str, standing: Standing, instance: str) -> dict[str, Any]:
    is_lora = source.kind == KIND
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"generateName": f"{source.name[:200]}-", "namespace": source.namespace},
        "eventTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "reportingController": f"{GROUP}/{FIELD_MANAGER}",
        "reportingInstance": _cut(instance, INSTANCE_BYTES_MAX),
        "action": standing.phase.value,
        "reason": standing.reason,
        "type": "Warning" if standing.phase is Phase.FAILED else "Normal",
        "note": _cut(note, NOTE_BYTES_MAX),
        "regarding": {
            "apiVersion": f"{GROUP}/{VERSION}" if is_lora else "v1",
            "kind": source.kind,
            "namespace": source.namespace,
            "name": source.name,
            "uid": source.uid,
        },
    }


def _cut(text: str, bytes_max: int) -> str:
    return text.encode()[:bytes_max].decode(errors="ignore")
