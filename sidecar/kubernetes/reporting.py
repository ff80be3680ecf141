"""Tells the cluster how declared adapters stand: the status of LoraAdapters, and an event for each transition.

Both are written behind the reconciler's back and may be late; what could not be written is tried again. Status is
compared with what is there, so that a new leader writes only what is not so.
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
from sidecar.kubernetes.standings import Phase, Standing, status_of, turn_of

logger = logging.getLogger(__name__)

COUNTS_EVERY_S = 10.0
"""How often a status is written anew at most if only counts and places have changed."""
EVENTS_MAX = 1000
"""Events that may wait to be written; past that they are dropped, and the log has them."""
CONFLICTS_MAX = 3
WORTH_AN_EVENT = (Phase.READY, Phase.HELD, Phase.FAILED, Phase.REMOVING)
COUNTED = ("desired", "ready", "residentOn", "message")
"""The fields of a status that may change without anything having turned."""

Status = dict[str, Any]
NOTE_LENGTH_MAX = 1000


class Change(Enum):
    """How a status differs from what is there: in nothing, in counts and places, or in something that has turned."""

    NONE = "none"
    COUNTS = "counts"
    TURN = "turn"


@dataclass
class _Written:
    """What is known of one LoraAdapter's status: what it says, and when it was last written."""

    source: Source
    status: Status
    wanted: Standing | None = None
    wrote_s: float = field(default_factory=lambda: -COUNTS_EVERY_S)
    refused: Standing | None = None


class Reporter:
    """Writes for the one that leads. `instance` is this process's name."""

    def __init__(self, api: Api, namespace: str, instance: str) -> None:
        self._api = api
        self._namespace = namespace
        self._instance = instance
        self._turns: dict[str, tuple[str, str, str]] = {}
        self._written: dict[str, _Written] = {}
        self._events: asyncio.Queue[dict[str, Any]] = asyncio.Queue(EVENTS_MAX)
        self._due: dict[str, None] = {}
        """LoraAdapters whose status may have to be written."""
        self._changed = asyncio.Event()

    def forget(self) -> None:
        """Write no status any more that was told of, and forget them: another process may say other things now."""
        self._turns.clear()
        self._written.clear()
        self._due.clear()

    def tell(self, source: Source, name: str, standing: Standing, status: Status) -> None:
        """Take in how a name stands. `status` is what its LoraAdapter says already, as far as is known."""
        self._tell_turn(source, name, standing, status)
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
        """Forget a declaration that is there no more."""
        self._turns.pop(f"{owner} {name}", None)
        self._written = {each: known for each, known in self._written.items() if known.source.owner != owner}

    def say(self, source: Source, name: str, standing: Standing) -> None:
        """Write a log line and an event about a declaration."""
        level = logging.WARNING if standing.phase is Phase.FAILED else logging.INFO
        logger.log(level, "%s %s: %s: %s", source.kind, source.name, standing.reason, note_of(source, name, standing))
        try:
            self._events.put_nowait(event_of(source, note_of(source, name, standing), standing, self._instance))
        except asyncio.QueueFull:
            logger.warning("too many events wait for the API server; this one is not written")

    def _tell_turn(self, source: Source, name: str, standing: Standing, status: Status) -> None:
        """Say it if a standing is another than before: than what the status says, for one who did not see before."""
        key = f"{source.owner} {name}"
        before = self._turns.get(key) or _turn_in(status)
        self._turns[key] = standing.turn
        if standing.phase not in WORTH_AN_EVENT or standing.turn == before:
            return
        if before is None and standing.phase is Phase.READY:  # as it was when this one began to look
            return
        self.say(source, name, standing)

    # Writing.

    async def run(self) -> None:
        """Write what there is to write, for ever."""
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
                    await self._see_to(name)
                pauses.end()
            except ApiError as error:
                if not pauses.failures:
                    logger.warning("a status is not written yet: %s", error.message)
                await asyncio.sleep(pauses.next_s(error.retry_after_s))
                continue
            try:
                async with asyncio.timeout(COUNTS_EVERY_S / 5 if self._due else None):
                    await self._changed.wait()
            except TimeoutError:  # counts that have changed may be due now
                continue

    async def _see_to(self, name: str) -> None:
        """Write a LoraAdapter's status if it is to be, and is due."""
        known = self._written.get(name)
        change = Change.NONE if known is None else _change(known, time())
        if known is not None and change is Change.COUNTS and monotonic() - known.wrote_s < COUNTS_EVERY_S:
            return
        self._due.pop(name, None)  # before it is written: meanwhile another standing may be told of
        await asyncio.sleep(0)
        if known is not None and change is not Change.NONE:
            try:
                await self._write_or_refuse(known)
            except ApiError:
                self._due[name] = None
                raise

    async def _write_or_refuse(self, known: _Written) -> None:
        """Write one status; one that is refused for what it says is left until there is another to write."""
        try:
            await self._write(known)
        except ApiError as error:
            if not is_final(error):
                raise
            logger.warning("a status is not written: %s", error.message)
            known.refused = known.wanted

    async def _write(self, known: _Written) -> None:
        """Write one status, over again if the object has changed meanwhile and declares what it did."""
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
                    return  # it declares something else by now, which the reconciler will hear of
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
    """Return how what a status is to say differs from what it says."""
    if known.wanted is None or known.wanted == known.refused:
        return Change.NONE
    wanted = status_of(known.wanted, known.source.generation, known.status, now)
    before = {key: known.status.get(key) for key in wanted}
    if wanted == before:
        return Change.NONE
    return Change.COUNTS if _without_counts(wanted) == _without_counts(before) else Change.TURN


def _without_counts(status: Status) -> Status:
    conditions = [
        {key: condition.get(key) for key in ("type", "status", "reason", "observedGeneration")}
        for condition in status.get("conditions") or ()
    ]
    return {key: value for key, value in status.items() if key not in COUNTED} | {"conditions": conditions}


def _turn_in(status: Status) -> tuple[str, str, str] | None:
    """Return the turn that a status tells of, None if it tells of none."""
    if not status.get("phase"):
        return None
    reasons = {condition.get("type"): condition.get("reason") for condition in status.get("conditions") or ()}
    return turn_of(status["phase"], str(reasons.get("Ready")), status.get("version", ""), status.get("message", ""))


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
