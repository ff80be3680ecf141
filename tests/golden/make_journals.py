"""`python -m tests.golden.make_journals` writes a sample of each class of a journal, beside the format's number."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from policies.id_queue import IdQueue
from sidecar.journal import codec
from sidecar.journal.segments import FORMAT
from sidecar.journal.snapshot import PolicySnapshot
from sidecar.journal.written_names import WRITTEN

SAMPLES = Path(__file__).parent / "journals" / "samples.jsonl"

# Samples: one of each class, with a value in every field, and one of each member of an enum.


WORDS = {"dtype": "bfloat16"}
"""Fields that do not take any word."""


def samples() -> Iterator[Any]:
    for cls in WRITTEN:
        yield from cls if issubclass(cls, Enum) else [sample_of(cls, "")]


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
    hints = get_type_hints(hint)
    written = [each for each in fields(hint) if not each.metadata.get("derived")]
    return hint(
        **{
            each.name: PolicySnapshot([1]) if each.metadata.get("policy") else sample_of(hints[each.name], each.name)
            for each in written
        }
    )


def written() -> str:
    """Return the file of samples: the format's number, then a line for each class and each member of an enum."""
    return "".join(f"{line}\n" for line in (f'{{"journal":{FORMAT}}}', *map(codec.dumps, samples())))


if __name__ == "__main__":
    SAMPLES.write_text(written())
