"""Models' statistics over all backends: one pool looks to its clients like one server that did all the work."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tritonclient.grpc import service_pb2

LATEST = "last_inference"
KEYS = {"batch_stats": ("batch_size",), "memory_usage": ("type", "id")}
"""By what the entries of repeated fields are the same."""


def summed(replies: Iterable[Any]) -> Any:
    """Return one ModelStatisticsResponse with each model and version once: counts and times added, the latest time."""
    models: dict[tuple[str, str], Any] = {}
    for reply in replies:
        for statistics in reply.model_stats:
            found = models.get((statistics.name, statistics.version))
            if found is None:
                models[statistics.name, statistics.version] = _copied(statistics)
            else:
                _add(found, statistics)
    return service_pb2.ModelStatisticsResponse(model_stats=models.values())


def _copied(message: Any) -> Any:
    copied = type(message)()
    copied.CopyFrom(message)
    return copied


def _add(into: Any, message: Any) -> None:
    """Add a message's numbers to another of its kind, field by field; names stay."""
    for field, value in message.ListFields():
        name = field.name
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            for key, entry in value.items():
                _add(getattr(into, name)[key], entry)
        elif name in KEYS:
            _add_entries(getattr(into, name), value, KEYS[name])
        elif field.message_type is not None:
            _add(getattr(into, name), value)
        elif isinstance(value, int):
            present = getattr(into, name)
            setattr(into, name, max(present, value) if name == LATEST else present + value)


def _add_entries(into: Any, entries: Any, keys: tuple[str, ...]) -> None:
    present = {tuple(getattr(entry, key) for key in keys): entry for entry in into}
    for entry in entries:
        found = present.get(tuple(getattr(entry, key) for key in keys))
        if found is None:
            into.add().CopyFrom(entry)
            continue
        keyed = {key: getattr(found, key) for key in keys}
        _add(found, entry)
        for key, value in keyed.items():
            setattr(found, key, value)
