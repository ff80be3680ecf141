"""Check a message's fields before it is parsed: their number, and that all are known.

A parser makes an object of each field, and blocks the event loop meanwhile. The check reads a message at the speed of
its large fields, and refuses one with many small fields after a bounded number of them.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NoReturn

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError

from sidecar.errors import Reason, Refused

FIELDS_MAX = 50_000
"""Fields of one message at all depths; the packed elements of one field count once."""
PARSED_BYTES_MAX = 8 << 20
"""Size of a message that is parsed as a whole: turning its texts and numbers into Python's blocks the event loop."""
UNCOUNTED_BYTES = 16_384
"""A message of at most this size has too few fields to block the event loop; they are not counted."""
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
_FIXED = {FIXED64: 8, FIXED32: 4}
_VARINT_BYTES_MAX = 10


def parsed(raw: bytes, kind: Any) -> Any:
    """Return the message of a protobuf class. Raises Refused(INVALID_REQUEST) naming its fault."""
    if len(raw) > PARSED_BYTES_MAX:
        what = f"a {kind.DESCRIPTOR.name} has {len(raw)} bytes; at most {PARSED_BYTES_MAX} are taken"
        raise Refused(Reason.INVALID_REQUEST, what)
    if len(raw) > UNCOUNTED_BYTES:
        check_fields(raw, kind.DESCRIPTOR)
    message = decoded(raw, kind)
    check_known(message, raw)
    return message


def decoded(raw: bytes, kind: Any) -> Any:
    """Return the message, its fields unchecked. Raises Refused(INVALID_REQUEST) if `raw` is not one."""
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise malformed(kind.DESCRIPTOR, f"malformed protobuf ({len(raw)} bytes)") from error


def check_known(message: Any, raw: bytes) -> bytes:
    """Discard the message's unknown fields and return it serialized.

    Raises Refused(INVALID_REQUEST) naming the field if there was one.
    """
    before: bytes = message.SerializeToString()
    message.DiscardUnknownFields()
    after: bytes = message.SerializeToString()
    if len(before) != len(after):
        check_fields(raw, message.DESCRIPTOR)
        raise malformed(message.DESCRIPTOR, "it has a field that is not in the definition")
    return after


def check_fields(raw: bytes, descriptor: Descriptor, fields_max: int = FIELDS_MAX) -> None:
    """Raise Refused(INVALID_REQUEST) if there are more than `fields_max` fields, or one that `descriptor` lacks."""
    left = fields_max
    inner: list[tuple[int, int, Descriptor]] = [(0, len(raw), descriptor)]
    try:
        while inner:
            at, end, here = inner.pop()
            known = _fields(here)
            while at < end:
                left -= 1
                if left < 0:
                    raise malformed(descriptor, f"it has more than {fields_max} fields; no engine takes so many")
                tag, at = _varint(raw, at)
                if tag not in known:
                    _unknown(descriptor, here, tag)
                kind = tag & 7
                if kind == LENGTH:
                    size, at = _varint(raw, at)
                    if (message := known[tag]) is not None:
                        inner.append((at, min(at + size, end), message))
                    at += size
                elif kind == VARINT:
                    _, at = _varint(raw, at)
                else:
                    at += _FIXED[kind]
            if at > end:
                raise IndexError
    except IndexError:
        raise malformed(descriptor, f"malformed protobuf ({len(raw)} bytes): a field is cut off") from None


def malformed(descriptor: Descriptor, what: str) -> Refused:
    place = "KServe v2's inference.proto" if descriptor.full_name.startswith("inference.") else descriptor.file.name
    return Refused(
        Reason.INVALID_REQUEST,
        f"the request is not a {descriptor.name}: {what}; build it with the messages of {place}",
    )


def _unknown(outer: Descriptor, here: Descriptor, tag: int) -> NoReturn:
    raise malformed(outer, f"it has a field {tag >> 3} of wire type {tag & 7}, which {here.name} does not have")


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """Return the number at `at` and the index after it. Raises IndexError if it is cut off."""
    value = raw[at]
    at += 1
    if value < 0x80:
        return value, at
    value &= 0x7F
    for shift in range(7, 7 * _VARINT_BYTES_MAX, 7):
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError


_OF_TYPE = {
    FieldDescriptor.TYPE_DOUBLE: FIXED64,
    FieldDescriptor.TYPE_FIXED64: FIXED64,
    FieldDescriptor.TYPE_SFIXED64: FIXED64,
    FieldDescriptor.TYPE_FLOAT: FIXED32,
    FieldDescriptor.TYPE_FIXED32: FIXED32,
    FieldDescriptor.TYPE_SFIXED32: FIXED32,
    FieldDescriptor.TYPE_STRING: LENGTH,
    FieldDescriptor.TYPE_BYTES: LENGTH,
    FieldDescriptor.TYPE_MESSAGE: LENGTH,
}


@cache
def _fields(descriptor: Descriptor) -> dict[int, Descriptor | None]:
    """Return the fields by tag, with the type of those that are messages. Repeated numbers may also come packed."""
    fields: dict[int, Descriptor | None] = {}
    for field in descriptor.fields:
        wire_type = _OF_TYPE.get(field.type, VARINT)
        fields[field.number << 3 | wire_type] = field.message_type
        if field.is_repeated and wire_type != LENGTH:
            fields[field.number << 3 | LENGTH] = None
    return fields
