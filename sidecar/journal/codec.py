"""Encode events, effects and the whole state as JSON values and decode them, by walking the dataclasses.

A dataclass becomes `{"!": name, field: value, …}`. Tuples, dicts, deques and id queues carry a tag of their own, so
that decoding returns an equal value. Derived fields are left out; a policy writes its own snapshot. Insertion order is
kept everywhere, so the same state always gives the same bytes. The names of classes and fields come from
`written_names`, not from Python.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from dataclasses import fields
from enum import Enum
from typing import Any

from policies.id_queue import IdQueue
from sidecar.core.core import Core, Policies
from sidecar.journal.written_names import WRITTEN, Form, problems

Convert = Callable[[Any], Any]


def encode(value: Any) -> Any:
    """Return JSON values for a value of the core. Raises TypeError for anything else."""
    try:
        encoder = _ENCODERS[type(value)]
    except KeyError:
        raise TypeError(f"the core holds a {type(value).__name__}, which has no written form") from None
    return encoder(value)


def decode(value: Any) -> Any:
    """Return the value that `encode` was given. Raises KeyError for a class that is not one of the core's."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    return _DECODERS[value["!"]](value)


def encoder_of(cls: Any, form: Form) -> Convert:
    """Return the encoder of a class's instances or of an enum's members. Raises TypeError if the form does not fit."""
    if found := problems(cls, form):
        raise TypeError("; ".join(found))
    tag = form.name
    if issubclass(cls, Enum):
        members = form.names
        return lambda member: {"!": tag, "=": members[member.name]}
    policies = _policies_of(cls)
    names = [(name, written, name in policies) for name, written in form.names.items()]

    def encode_fields(value: Any) -> Any:
        record = {"!": tag}
        for name, written, is_policy in names:
            held = getattr(value, name)
            record[written] = held.snapshot() if is_policy else encode(held)
        return record

    return encode_fields


def decoder_of(cls: Any, form: Form) -> Convert:
    """Return the decoder for what `encoder_of` encodes. It raises KeyError for a record that lacks a field."""
    if issubclass(cls, Enum):
        members = {written: cls[name] for name, written in form.names.items()}
        return lambda record: members[record["="]]
    policies = _policies_of(cls)
    names = [(name, written, name in policies) for name, written in form.names.items()]
    return lambda record: cls(
        **{name: record[written] if is_policy else decode(record[written]) for name, written, is_policy in names}
    )


def _policies_of(cls: Any) -> set[str]:
    return {each.name for each in fields(cls) if each.metadata.get("policy")}


_ENCODERS: dict[type, Convert] = {
    **dict.fromkeys((int, float, str, bool, type(None)), lambda value: value),
    list: lambda value: [encode(item) for item in value],
    tuple: lambda value: {"!": "tuple", "=": [encode(item) for item in value]},
    deque: lambda value: {"!": "deque", "=": [encode(item) for item in value], "maxlen": value.maxlen},
    IdQueue: lambda value: {"!": "Line", "=": list(value)},
    dict: lambda value: {"!": "dict", "=": [[encode(key), encode(held)] for key, held in value.items()]},
    **{cls: encoder_of(cls, form) for cls, form in WRITTEN.items()},
}
_DECODERS: dict[str, Convert] = {
    "tuple": lambda record: tuple(decode(item) for item in record["="]),
    "deque": lambda record: deque((decode(item) for item in record["="]), maxlen=record["maxlen"]),
    "Line": lambda record: IdQueue(record["="]),
    "dict": lambda record: {decode(key): decode(held) for key, held in record["="]},
    **{form.name: decoder_of(cls, form) for cls, form in WRITTEN.items()},
}
assert len(_DECODERS) == 4 + len(WRITTEN), "two classes have one written name"


def dumps(value: Any) -> str:
    """Return a value as one line of JSON."""
    return json.dumps(encode(value), separators=(",", ":"))


def loads(line: str) -> Any:
    return decode(json.loads(line))


def restore(record: Any, policies: Policies) -> Core:
    """Return a core in the state that `encode(core.state)` recorded."""
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
