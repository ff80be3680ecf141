"""Events, effects and the whole state as JSON values and back, by walking the dataclasses themselves.

A dataclass becomes `{"!": name, field: value, …}`; tuples, dicts with keys that are not strings, deques and lines
carry a tag of their own, so that what is read is equal to what was written. Derived fields are left out; a policy
writes its own snapshot. Insertion order is kept everywhere: the same state always gives the same bytes.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any

from policies import views
from policies.lines import Line
from sidecar.core import (
    config,
    effects,
    enums,
    events,
    facts,
    lateness,
    layout,
    outstanding,
    pace,
    prefetch_accounting,
    shadow,
    silence,
    state,
    store,
)
from sidecar.core.core import Core, Policies

MODULES = (
    views, config, effects, enums, events, facts, lateness, layout, outstanding, pace, prefetch_accounting, shadow,
    silence, state, store,
)  # fmt: skip


def _classes() -> dict[str, type]:
    found: dict[str, type] = {}
    for module in MODULES:
        for name, value in vars(module).items():
            if isinstance(value, type) and (is_dataclass(value) or issubclass(value, Enum)):
                assert found.setdefault(name, value) is value, f"two classes of the core are called {name}"
    return found


CLASSES = _classes()


@cache
def _fields(cls: Any) -> tuple[tuple[str, bool], ...]:
    """Return (field name, is a policy) of all that is written."""
    return tuple((f.name, bool(f.metadata.get("policy"))) for f in fields(cls) if not f.metadata.get("derived"))


def encode(value: Any) -> Any:
    """Return JSON values for a value of the core. Raises TypeError for anything else."""
    encoder = _ENCODERS.get(type(value))
    if encoder is not None:
        return encoder(value)
    if isinstance(value, Enum):
        return {"!": type(value).__name__, "=": value.name}
    if is_dataclass(value) and not isinstance(value, type):
        record: dict[str, Any] = {"!": type(value).__name__}
        for name, is_policy in _fields(type(value)):
            held = getattr(value, name)
            record[name] = held.snapshot() if is_policy else encode(held)
        return record
    raise TypeError(f"the core holds a {type(value).__name__}, which has no written form")


def _encode_dict(value: dict[Any, Any]) -> Any:
    return {"!": "dict", "=": [[encode(key), encode(held)] for key, held in value.items()]}


_ENCODERS: dict[type, Callable[[Any], Any]] = {
    **dict.fromkeys((int, float, str, bool, type(None)), lambda value: value),
    list: lambda value: [encode(item) for item in value],
    tuple: lambda value: {"!": "tuple", "=": [encode(item) for item in value]},
    deque: lambda value: {"!": "deque", "=": [encode(item) for item in value], "maxlen": value.maxlen},
    Line: lambda value: {"!": "Line", "=": list(value)},
    dict: _encode_dict,
}


def decode(value: Any) -> Any:
    """Return the value that `encode` was given. Raises KeyError for a class that is not the core's."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    tag = value["!"]
    if tag in _DECODERS:
        return _DECODERS[tag](value)
    cls: Any = CLASSES[tag]
    if issubclass(cls, Enum):
        return cls[value["="]]
    # What an earlier release did not write yet keeps its default: its journals stay readable.
    written = [(name, is_policy) for name, is_policy in _fields(cls) if name in value]
    return cls(**{name: value[name] if is_policy else decode(value[name]) for name, is_policy in written})


_DECODERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "tuple": lambda value: tuple(decode(item) for item in value["="]),
    "deque": lambda value: deque((decode(item) for item in value["="]), maxlen=value["maxlen"]),
    "Line": lambda value: Line(value["="]),
    "dict": lambda value: {decode(key): decode(held) for key, held in value["="]},
}


def dumps(value: Any) -> str:
    """Return the one line of JSON that stands for a value."""
    return json.dumps(encode(value), separators=(",", ":"))


def loads(line: str) -> Any:
    return decode(json.loads(line))


def restore(record: Any, policies: Policies) -> Core:
    """Return a core in the state that `encode(core.state)` was taken of."""
    held = decode(record)
    core = Core(held.config, policies)
    held.store.policy = _restored(policies.eviction(), held.store.policy)
    held.disk.policy = _restored(policies.disk_eviction(), held.disk.policy)
    held.routing = _restored(policies.routing(), held.routing)
    held.prefetch = _restored(policies.prefetch(), held.prefetch)
    for backend in held.backends.values():
        backend.ordering = _restored(policies.ordering(), backend.ordering)
    core.state = held
    return core


def _restored(policy: Any, snapshot: Any) -> Any:
    policy.restore(snapshot)
    return policy
