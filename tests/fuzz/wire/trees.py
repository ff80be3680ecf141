"""Protobuf messages as trees of fields that can be taken apart, put together wrongly, and written down."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from tests.kit.protobuf_wire import FIXED32, FIXED64, GROUP, GROUP_END, LENGTH, VARINT, tag, varint

DEPTH_MAX = 12


@dataclass
class Field:
    """One field. `value` is a number, bytes, or a message; what the wire type does not allow is written as it is.

    `longer_by` makes its tag, its length or its number longer than they need be, in this order.
    """

    number: int
    wire_type: int
    value: int | bytes | Tree
    longer_by: tuple[int, int, int] = (0, 0, 0)


@dataclass
class Tree:
    """A message."""

    fields: list[Field] = field(default_factory=list)

    def copy(self) -> Tree:
        return Tree(
            [replace(one, value=one.value.copy() if isinstance(one.value, Tree) else one.value) for one in self.fields]
        )

    def nodes(self) -> list[Tree]:
        """Return this message and all in it."""
        found = [self]
        for one in self.fields:
            if isinstance(one.value, Tree):
                found += one.value.nodes()
        return found


def message(number: int, *fields: Field) -> Field:
    return Field(number, LENGTH, Tree(list(fields)))


def text(number: int, value: str | bytes) -> Field:
    return Field(number, LENGTH, value.encode() if isinstance(value, str) else value)


def number(place: int, value: int) -> Field:
    return Field(place, VARINT, value)


def encode(tree: Tree, depth: int = 0) -> bytes:
    """Write a message down."""
    return b"".join(_encode_field(one, depth) for one in tree.fields) if depth < DEPTH_MAX else b""


def _encode_field(one: Field, depth: int) -> bytes:
    in_tag, in_length, in_number = one.longer_by
    head = varint(one.number << 3 | one.wire_type, in_tag)
    value = one.value
    raw = encode(value, depth + 1) if isinstance(value, Tree) else value
    if one.wire_type == GROUP:
        return head + (raw if isinstance(raw, bytes) else varint(raw)) + tag(one.number, GROUP_END)
    if one.wire_type == LENGTH:
        data = varint(raw) if isinstance(raw, int) else raw
        return head + varint(len(data), in_length) + data
    if one.wire_type == VARINT:
        return head + varint(raw if isinstance(raw, int) else len(raw), in_number)
    width = {FIXED64: 8, FIXED32: 4}.get(one.wire_type, 0)
    data = (raw & (1 << 64) - 1).to_bytes(8, "little") if isinstance(raw, int) else raw
    return head + data[:width].ljust(width, b"\0")
