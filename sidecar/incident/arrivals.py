"""Read the arrivals of a journal's requests, and the state of the pool that they met, to repeat them in a simulation.

Nothing is replayed here. Lines are filtered as bytes first, so a hundred megabytes take a second or two.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator
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
    ConfigChanged,
    Event,
    Received,
    RunEnded,
)
from sidecar.core.facts import EngineFacts, NamedVersion
from sidecar.core.state import Name, State
from sidecar.errors import Misused, Reason
from sidecar.journal import checked
from sidecar.journal.archive import opened
from sidecar.journal.replay import SegmentFile, segments_of

SETTING_EVENTS = (
    "AdapterRegistered", "BackendAdded", "BackendUp", "BackendMeasured", "BackendRemoved", "ConfigChanged",
)  # fmt: skip


class Arrival(NamedTuple):
    """A request that came, and its outcome; the request's number is unique within one `life` of the process.

    `output_tokens` is the length of the engine's answer, or None if the journal does not have it: the request was
    refused, expired, still running, or lost.
    """

    life: int
    at_ns: int
    received: Received
    output_tokens: int | None


@dataclass
class Setting:
    """What a run began with: the core's configuration, the engines, and the registered names.

    The configuration is the last one, with the classes that earlier ones had too. Engines' facts are the last measured
    ones. Each name has its last registration, which lists its older versions too.
    """

    config: CoreConfig
    backends: dict[str, EngineFacts] = field(default_factory=dict)
    adapters: dict[str, AdapterRegistered] = field(default_factory=dict)


class JournalEntry(NamedTuple):
    """A line of a journal, selected by the name of its event."""

    segment: Path
    life: int
    at_ns: int
    event: Any
    """The event, of one of the classes that were asked for."""


def arrivals_of(path: Path) -> Iterator[Arrival]:
    """Yield every request whose arrival a journal holds, in the order of arrival.

    `path` is what `sidecar replay` takes: a segment, a journal, a data directory, an incident. Raises Misused for
    anything else. Reads the journal twice, because an answer's length comes after its arrival.
    """
    with opened(path) as place:
        segments = segments_of(place)
        answered: dict[tuple[int, int], int] = {}
        for line in lines_of(segments, ("RunEnded", "RunFailed")):
            if line.event.output_tokens or isinstance(line.event, RunEnded):
                answered[line.life, line.event.request] = line.event.output_tokens
        for line in lines_of(segments, ("Received",)):
            yield Arrival(line.life, line.at_ns, line.event, answered.get((line.life, line.event.request)))


def setting_of(path: Path, allowed: Container[str] = ()) -> Setting:
    """Return the setting that a journal's requests met. Raises Misused as `arrivals_of` does.

    `allowed` is what SegmentFile takes.
    """
    with opened(path) as place:
        segments = segments_of(place)
        state = SegmentFile(segments[0], allowed).core.state
        setting = Setting(state.config)
        setting.backends = {backend.id: backend.facts for backend in state.backends.values()}
        setting.adapters = {name.name: _registration(state, name) for name in state.names.values()}
        for line in lines_of(segments, SETTING_EVENTS):
            _take_in(setting, line.event)
    return setting


def _take_in(setting: Setting, event: Any) -> None:
    if isinstance(event, AdapterRegistered):
        setting.adapters[event.name] = event
    elif isinstance(event, BackendAdded | BackendUp):
        setting.backends[event.backend] = event.facts
    elif isinstance(event, BackendRemoved):
        setting.backends.pop(event.backend, None)
        if event.successor is not None:
            setting.backends[event.backend] = event.successor.facts
    elif isinstance(event, ConfigChanged):
        setting.config = replace(event.config, classes={**setting.config.classes, **event.config.classes})
    elif isinstance(event, BackendMeasured) and event.backend in setting.backends:
        facts = setting.backends[event.backend]
        measured = replace(facts, seats=event.seats or facts.seats, kv_tokens=event.kv_tokens or facts.kv_tokens)
        setting.backends[event.backend] = measured


def _registration(state: State, name: Name) -> AdapterRegistered:
    """Return the event that registers a name as the state has it."""
    versions = []
    for ordinal in sorted(name.versions, key=lambda each: (each != name.current, each)):
        version = state.versions[name.versions[ordinal]]
        versions.append(NamedVersion(ordinal, version.adapter, version.origin, version.generation))
    return AdapterRegistered(**name.defined(), versions=tuple(versions), kept=name.kept)


def lines_of(segments: list[Path], events: tuple[str, ...]) -> Iterator[JournalEntry]:
    """Yield the steps with one of these events, over several lives of the process, oldest first.

    A line that is cut off or damaged is skipped: checking the journal is the replay's task.
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
                    read = _read(text)
                    if read is not None:
                        yield JournalEntry(segment, life, *read)


def _read(text: bytes) -> tuple[int, Event] | None:
    """Return a line's time in ns and its event; None if it is damaged."""
    try:
        record = json.loads(text)
        event = checked.event_of(record.get("event"))
    except (ValueError, RecursionError):
        return None
    return (record["at"], event) if checked.is_time(record.get("at")) else None


def first_ns_of(segment: Path) -> int:
    """Return the time of a segment's first step that is whole, or 0 if it has none."""
    with segment.open("rb") as file:
        read = (_read(text) for text in file if text.startswith(b'{"at":'))
        return next((found[0] for found in read if found is not None), 0)


def header_of(segment: Path) -> dict[str, Any]:
    """Return the header in a segment's first line, or {} if the file is no segment."""
    with segment.open("rb") as file:
        return header_in(file.readline())


def header_in(line: bytes) -> dict[str, Any]:
    """Return the header in a segment's first line, or {} if it is none."""
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return header if isinstance(header, dict) else {}


def first_step_of(segment: Path) -> int:
    """Return the number of a segment's first step. Raises Misused if it has none."""
    first = header_of(segment).get("first_step", 1)
    if not isinstance(first, int):
        raise Misused(Reason.NOT_A_JOURNAL, f"{segment} cannot be read: its first_step is no number")
    return first
