"""Which adapter a request names to Triton, read from its bytes as a C++ server reads them, and by nobody else's code.

Protobuf: repeated fields join, a later scalar wins, a message that comes twice is merged, of a map's entries with one
key the last counts, unknown fields are skipped, numbers may be longer than they need be. Triton: raw contents go in
order to inputs without typed contents or region, and its C interface ends a name at a NUL.
"""

from __future__ import annotations

from collections.abc import Iterator

INPUTS, RAW = 5, 7
NAME, PARAMETERS, CONTENTS = 1, 4, 5
UINT64_CONTENTS = 5
IDS = (b"lora_task_id", b"lora_id")


def ids_named(raw: bytes) -> set[int | None]:
    """Return the ids of adapters that a server could take from a request; an id that cannot be seen is None."""
    fields = [(number, value) for number, value in _fields(raw) if isinstance(value, bytes)]
    inputs = [_input(value) for number, value in fields if number == INPUTS]
    contents = iter([value for number, value in fields if number == RAW])
    ids: set[int | None] = set()
    for name, typed, in_region in inputs:
        content = None if typed is not None or in_region else next(contents, None)
        if name.split(b"\0")[0] in IDS:
            if typed is not None:
                ids |= {value for number, value in _fields(typed) for value in _numbers(number, value)}
            else:
                ids.add(None if content is None or len(content) != 8 else int.from_bytes(content, "little"))
    return ids


def _input(raw: bytes) -> tuple[bytes, bytes | None, bool]:
    """Return an input's name, its typed contents, and whether it lies in a region."""
    name, typed, in_region = b"", None, False
    for number, value in _fields(raw):
        if isinstance(value, int):
            continue  # a field of another wire type is an unknown one
        if number == NAME:
            name = value
        elif number == CONTENTS:
            typed = (typed or b"") + value
        elif number == PARAMETERS:
            keys = [key for place, key in _fields(value) if place == 1]
            in_region = in_region or keys[-1:] == [b"shared_memory_region"]
    return name, typed, in_region


def _numbers(number: int, value: bytes | int) -> Iterator[int]:
    if number != UINT64_CONTENTS:
        return
    if isinstance(value, int):
        yield value
        return
    at = 0
    while at < len(value):
        one, at = _varint(value, at)
        yield one


def _fields(raw: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Yield the fields with a length, and the numbers; skip all else. Ends where a field is cut off."""
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            value, at = _varint(raw, at)
            yield number, value
        elif wire_type == 2:
            size, at = _varint(raw, at)
            yield number, raw[at : at + size]
            at += size
        elif wire_type in (1, 5):
            at += 8 if wire_type == 1 else 4
        # A group's own tags are skipped, and what is in it is read as if it were not: nothing that is sent on has one.


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value & (1 << 64) - 1, at
