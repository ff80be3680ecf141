"""What a journal holds of its requests: where each arrived, and all that is needed to let them arrive once more.

Nothing is replayed here. Lines are looked at as bytes first, so a hundred megabytes take a second or two.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from sidecar.core.config import CoreConfig
from sidecar.core.events import (
    AdapterRegistered,
    BackendAdded,
    BackendMeasured,
    BackendRemoved,
    BackendUp,
    OtherVersion,
)
from sidecar.core.facts import EngineFacts
from sidecar.core.state import Name, State
from sidecar.journal import codec
from sidecar.journal.archive import opened
from sidecar.journal.replay import SegmentFile, segments_of

SETTING_EVENTS = ("AdapterRegistered", "BackendAdded", "BackendUp", "BackendMeasured", "BackendRemoved")


class Arrival(NamedTuple):
    """One Received event and what became of it. `request` is unique in one life of the process, `life` counts those.

    `output_tokens` is what the engine answered in the end; None when the journal does not tell: refused, expired, still
    running, or lost.
    """

    life: int
    at_ns: int
    request: int
    adapter: str
    tenant: str
    klass: str
    session: str
    input_tokens: int
    output_tokens_max: int
    output_tokens: int | None
    deadline_ns: int | None


@dataclass
class Setting:
    """What a run began with: the core's configuration, the engines, and what names stood for.

    Facts are those that engines were last measured to have; of each name the last registration, which lists its older
    versions too.
    """

    config: CoreConfig
    backends: dict[str, EngineFacts] = field(default_factory=dict)
    adapters: dict[str, AdapterRegistered] = field(default_factory=dict)


class JournalEntry(NamedTuple):
    """A line of a journal that was picked by the name of its event. `event` is as it is written."""

    segment: Path
    life: int
    at_ns: int
    event: dict[str, Any]


def arrivals_of(path: Path) -> Iterator[Arrival]:
    """Yield every request that a journal holds the arrival of, in the order of arrival.

    `path` is what `sidecar replay` takes: a segment, a journal, a data directory, an incident. Raises Misused for what
    is none of them. Reads twice, because an answer's length stands behind its arrival.
    """
    with opened(path) as place:
        segments = segments_of(place)
        answered: dict[tuple[int, int], int] = {}
        for line in lines_of(segments, ("RunEnded", "RunFailed")):
            tokens = line.event["output_tokens"]
            if tokens or line.event["!"] == "RunEnded":
                answered[line.life, line.event["request"]] = tokens
        for line in lines_of(segments, ("Received",)):
            yield _arrival(line, answered.get((line.life, line.event["request"])))


def _arrival(line: JournalEntry, output_tokens: int | None) -> Arrival:
    event = line.event
    return Arrival(
        life=line.life,
        at_ns=line.at_ns,
        request=event["request"],
        adapter=event["adapter"],
        tenant=event["tenant"],
        klass=event["klass"],
        session=event.get("session", ""),
        input_tokens=event["input_tokens"],
        output_tokens_max=event["output_tokens_max"],
        output_tokens=output_tokens,
        deadline_ns=event["deadline_ns"],
    )


def setting_of(path: Path) -> Setting:
    """Return what a journal's requests met. Raises Misused as `arrivals_of` does."""
    with opened(path) as place:
        segments = segments_of(place)
        state = SegmentFile(segments[0]).core.state
        setting = Setting(state.config)
        setting.backends = {backend.id: backend.facts for backend in state.backends.values()}
        setting.adapters = {name.name: _registration(state, name) for name in state.names.values()}
        for line in lines_of(segments, SETTING_EVENTS):
            _take_in(setting, codec.decode(line.event))
    return setting


def _take_in(setting: Setting, event: Any) -> None:
    if isinstance(event, AdapterRegistered):
        setting.adapters[event.name] = event
    elif isinstance(event, BackendAdded | BackendUp):
        setting.backends[event.backend] = event.facts
    elif isinstance(event, BackendRemoved):
        setting.backends.pop(event.backend, None)
    elif isinstance(event, BackendMeasured) and event.backend in setting.backends:
        facts = setting.backends[event.backend]
        measured = replace(facts, seats=event.seats or facts.seats, kv_tokens=event.kv_tokens or facts.kv_tokens)
        setting.backends[event.backend] = measured


def _registration(state: State, name: Name) -> AdapterRegistered:
    """Return the event after which a name stands as it does."""
    current = state.versions[name.digest]
    others = []
    for ordinal, digest in sorted(name.versions.items()):
        if ordinal != name.ordinal:
            other = state.versions[digest]
            others.append(OtherVersion(ordinal, other.adapter, other.origin, other.generation, digest in name.kept))
    return AdapterRegistered(
        name=name.name,
        adapter=current.adapter,
        origin=current.origin,
        ordinal=name.ordinal,
        generation=current.generation,
        allow=name.allow,
        pinned=name.pinned,
        others=tuple(others),
        canary=name.canary,
    )


def lines_of(segments: list[Path], events: tuple[str, ...]) -> Iterator[JournalEntry]:
    """Yield the steps whose event is one of these, over several lives of the process, oldest first.

    A line that was cut off or is no JSON is passed over: whether a journal is sound is the replay's question.
    """
    marks = [f'"event":{{"!":"{name}"'.encode() for name in events]
    life, steps = 0, 0
    for segment in segments:
        first_step = first_step_of(segment)
        life += first_step <= steps
        steps = first_step - 1
        with segment.open("rb") as file:
            for text in file:
                steps += text.startswith(b'{"at":')
                if any(mark in text for mark in marks) and text.endswith(b"\n"):
                    record = _record(text)
                    if record is not None:
                        yield JournalEntry(segment, life, record["at"], record["event"])


def _record(text: bytes) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(text)
    except ValueError:
        return None
    return record if isinstance(record.get("event"), dict) and "at" in record else None


def header_of(segment: Path) -> dict[str, Any]:
    """Return what a segment's first line says; empty when it is no segment."""
    with segment.open("rb") as file:
        return header_in(file.readline())


def header_in(line: bytes) -> dict[str, Any]:
    """Return what a segment's first line says; empty when it is none."""
    try:
        header = json.loads(line)
    except ValueError:
        return {}
    return header if isinstance(header, dict) else {}


def first_step_of(segment: Path) -> int:
    return int(header_of(segment).get("first_step", 1))
