"""`python -m tests.golden.make_journals` writes a sample of what a journal holds, beside the format's number."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec

from policies.id_queue import IdQueue
from sidecar.core.causes import Cause
from sidecar.core.config import CoreConfig
from sidecar.core.effects import Effect
from sidecar.core.events import Event
from sidecar.core.state import State
from sidecar.journal import codec
from sidecar.journal.segments import FORMAT
from sidecar.journal.snapshot import PolicySnapshot

SAMPLES = Path(__file__).parent / "journals" / "samples.jsonl"

WORDS = {"dtype": "bfloat16"}
"""Fields that do not take any word."""


def samples() -> Iterator[bytes]:
    """Yield each event and effect, a configuration and a state, with a value in every field, and the enums' values."""
    yield from (codec.named(sample_of(cls, "")) for cls in (*get_args(Event), *get_args(Effect)))
    yield from (codec.dumps({"Cause": sample_of(cls, "")}) for cls in get_args(Cause))
    yield from (codec.dumps({cls.__name__: sample_of(cls, "")}) for cls in (CoreConfig, State))
    enums = [cls for cls in held_in(Event, Effect, CoreConfig, State) if issubclass(cls, Enum)]
    yield from (codec.dumps({cls.__name__: list(cls)}) for cls in sorted(enums, key=lambda cls: cls.__name__))


def held_in(*roots: Any) -> set[type]:
    """Return all dataclasses and enums that values of some types are made of, policies and derived fields aside."""
    found: set[type] = set()
    structs: set[type] = set()
    hints = list(roots)
    while hints:
        hint = hints.pop()
        hints += get_args(hint)
        assert (get_origin(hint) or hint) not in (set, frozenset), "a set has no order, so it has no one written form"
        if not isinstance(hint, type) or hint in found or hint in structs:
            continue
        if issubclass(hint, msgspec.Struct):  # a cause may hold another
            structs.add(hint)
            hints += get_type_hints(hint).values()
        if is_dataclass(hint):
            of = get_type_hints(hint)
            hints += [of[each.name] for each in fields(hint) if not {"policy", "derived"} & {*each.metadata}]
            found.add(hint)
        elif issubclass(hint, Enum):
            found.add(hint)
    return found


def sample_of(hint: Any, name: str) -> Any:
    """Return a value of a type that says little but is never the field's default."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in (int, float, str, bool):
        return {int: 7, float: 0.25, str: WORDS.get(name, name), bool: True}[hint]
    if origin in (Union, types.UnionType):
        return sample_of(arguments[0], name)
    if origin is tuple:
        return tuple(sample_of(each, name) for each in arguments if each is not Ellipsis)
    if origin in (dict, Mapping):
        return {sample_of(arguments[0], name): sample_of(arguments[1], name)}
    if origin in (list, deque):
        return origin([sample_of(arguments[0], name)])
    if hint is None:
        return None
    if hint is IdQueue:
        return IdQueue([1, 2])
    if issubclass(hint, Enum):
        return next(iter(hint))
    if issubclass(hint, msgspec.Struct):
        return hint(*(sample_of(each, name) for name, each in get_type_hints(hint).items()))
    hints = get_type_hints(hint)
    written = [each for each in fields(hint) if not each.metadata.get("derived")]
    return hint(
        **{
            each.name: PolicySnapshot([1]) if each.metadata.get("policy") else sample_of(hints[each.name], each.name)
            for each in written
        }
    )


def written() -> str:
    """Return the file of samples: the format's number, then a line for each."""
    return "".join(f"{line}\n" for line in (f'{{"journal":{FORMAT}}}', *(sample.decode() for sample in samples())))


if __name__ == "__main__":
    SAMPLES.write_text(written())
