"""A small protobuf encoder that can also write what no library would: repeated fields, unknown ones, odd varints.

It knows the wire format and KServe's field numbers, and is independent of the sidecar.
"""

from __future__ import annotations

import struct

VARINT, FIXED64, LENGTH, GROUP, GROUP_END, FIXED32 = range(6)

MODEL, VERSION, ID, PARAMETERS, INPUTS, OUTPUTS, RAW = range(1, 8)
"""The fields of a ModelInferRequest."""
NAME, DATATYPE, SHAPE, TENSOR_PARAMETERS, CONTENTS = range(1, 6)
"""The fields of an input."""
BOOL, INT64, STRING, DOUBLE, UINT64 = range(1, 6)
"""The choices of an InferParameter."""
INT_CONTENTS, UINT64_CONTENTS, BYTES_CONTENTS = 2, 5, 8


def varint(value: int, longer_by: int = 0) -> bytes:
    """Encode a number, with `longer_by` more bytes than needed."""
    value &= (1 << 64) - 1
    out = bytearray()
    while True:
        value, low = value >> 7, value & 0x7F
        if not value and not longer_by:
            return bytes([*out, low])
        out.append(low | 0x80)
        if not value:
            return bytes([*out, *b"\x80" * (longer_by - 1), 0])


def tag(number: int, wire_type: int) -> bytes:
    return varint(number << 3 | wire_type)


def field(number: int, data: bytes | str) -> bytes:
    """A field with a length."""
    raw = data.encode() if isinstance(data, str) else data
    return tag(number, LENGTH) + varint(len(raw)) + raw


def number_field(number: int, value: int) -> bytes:
    return tag(number, VARINT) + varint(value)


def entry(number: int, key: str | bytes, value: bytes) -> bytes:
    """An entry of a map from strings to messages."""
    return field(number, field(1, key) + field(2, value))


def parameter(name: str | bytes, value: str | int, number: int = PARAMETERS) -> bytes:
    """A request's parameter, or with `number` that of a tensor; both are field 4."""
    return entry(number, name, field(STRING, value) if isinstance(value, str) else number_field(INT64, value))


def tensor(name: str | bytes, datatype: str, *shape: int, more: bytes = b"") -> bytes:
    """An input; `more` are fields that follow in it."""
    dims = field(SHAPE, b"".join(map(varint, shape)))
    return field(INPUTS, field(NAME, name) + field(DATATYPE, datatype) + dims + more)


def int32(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


def uint64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str) -> bytes:
    """One element of a BYTES tensor."""
    raw = value.encode()
    return struct.pack("<I", len(raw)) + raw
