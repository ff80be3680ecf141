"""Ways to write a message wrongly, or rightly in a way that nobody does, drawn from a seeded generator."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import replace

from tests.fuzz.wire.seeds import Tensor, input_of, parameter
from tests.fuzz.wire.trees import Field, Tree, encode, message, number, text
from tests.kit.protobuf_wire import GROUP, LENGTH, VARINT, varint

ODD_NUMBERS = (0, 1, 2, 3, 7, 127, 128, 255, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
ODD_FIELDS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 20, 99, 2047, 19000, 2**29 - 1, 2**29)
ODD_WORDS = (
    b"", b"sql", b"chef", b"chat", b"sql@v1", b"chef@v1", b"sql\0", b"chef\0sql", b"\xff", b"\xed\xa0\x80",
    b"lora_name", b"lora_task_id", b"lora_task_id\0", b"LORA_TASK_ID", b" lora_task_id", b"lora_id", b"lora_path",
    b"lora_weights", b"lora_config", b"shared_memory_region", b"shared_memory_byte_size", b"lora-sidecar-x", b"mine",
    b"tensorrt_llm", b"ensemble", b"tensorrt_llm\0x", b"streaming", b"stop", b"input_ids", b"UINT64", b"INT32",
    b"BYTES",
    b"triton_enable_empty_final_response", b"triton_final_response", b"x" * 5000, b"\x08\x01", b"-1", b"1", b"1.2",
)  # fmt: skip
COUNTS = (2, 3, 40, 300, 3000)
LORA_NAMES = (
    "lora_task_id",
    "lora_task_id",
    "lora_id",
    "lora_task_id\0",
    "lora_task_id\0x",
    "Lora_task_id",
    "lora_path",
)

Mutation = Callable[[random.Random, Tree, int], None]


def mutate(generator: random.Random, good: Tree, other: Tree, chef: int) -> bytes:
    """Return a message that may be wrong in up to four ways. `chef` is an id that its sender may not use."""
    tree = good.copy()
    for _ in range(generator.choice((0, 1, 1, 1, 2, 2, 3, 4))):
        generator.choice(MUTATIONS)(generator, tree, chef)
    raw = encode(tree)
    chance = generator.random()
    if chance < 0.05:
        return raw + encode(other)
    if chance < 0.08:
        return raw[: generator.randrange(len(raw) + 1)]
    if chance < 0.16 and raw:
        damaged = bytearray(raw)
        for _ in range(generator.randint(1, 3)):
            damaged[generator.randrange(len(damaged))] = generator.choice(
                (0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256))
            )
        return bytes(damaged)
    if chance < 0.18:
        at = generator.randrange(len(raw) + 1)
        return raw[:at] + generator.randbytes(generator.randint(1, 9)) + raw[at:]
    return raw


def _somewhere(generator: random.Random, tree: Tree) -> Tree:
    return tree if generator.random() < 0.5 else generator.choice(tree.nodes())


def _place(generator: random.Random, tree: Tree) -> int:
    return generator.randrange(len(tree.fields) + 1)


def _twice(generator: random.Random, tree: Tree, chef: int) -> None:
    node = _somewhere(generator, tree)
    if node.fields:
        node.fields.insert(_place(generator, node), generator.choice(node.fields))


def _left_out(generator: random.Random, tree: Tree, chef: int) -> None:
    node = _somewhere(generator, tree)
    if node.fields:
        del node.fields[generator.randrange(len(node.fields))]


def _shuffled(generator: random.Random, tree: Tree, chef: int) -> None:
    generator.shuffle(_somewhere(generator, tree).fields)


def _unknown(generator: random.Random, tree: Tree, chef: int) -> None:
    node = _somewhere(generator, tree)
    field = Field(generator.choice(ODD_FIELDS), generator.choice((0, 1, 2, 3, 5, 6, 7)), _value(generator, chef))
    node.fields.insert(_place(generator, node), field)


def _changed(generator: random.Random, tree: Tree, chef: int) -> None:
    node = _somewhere(generator, tree)
    if not node.fields:
        return
    place = generator.randrange(len(node.fields))
    field = node.fields[place]
    what = generator.randrange(4)
    if what == 0:
        changed = replace(field, wire_type=generator.choice((0, 1, 2, 3, 4, 5)))
    elif what == 1:
        changed = replace(field, number=generator.choice(ODD_FIELDS))
    elif what == 2:
        changed = replace(field, value=_value(generator, chef))
    else:
        changed = replace(field, longer_by=tuple(generator.choice((0, 0, 1, 3, 9)) for _ in range(3)))
    node.fields[place] = changed


def _value(generator: random.Random, chef: int) -> int | bytes | Tree:
    what = generator.randrange(5)
    if what == 0:
        return generator.choice(ODD_NUMBERS)
    if what == 1:
        return generator.choice((struct.pack("<Q", chef), varint(chef)))
    if what == 2:
        return Tree([Field(generator.choice(ODD_FIELDS), VARINT, chef)])
    return generator.choice(ODD_WORDS)


def _content(generator: random.Random, tree: Tree, chef: int) -> None:
    """One raw content more, somewhere."""
    content = text(7, generator.choice((struct.pack("<Q", chef), struct.pack("<Q", chef), b"", b"\1\0\0\0")))
    tree.fields.insert(generator.choice((len(tree.fields), _place(generator, tree))), content)


def _chosen(generator: random.Random, tree: Tree, chef: int) -> None:
    """A LoRA tensor of the client's own, in some form, with or without its content."""
    typed = generator.random() < 0.3
    shape = generator.choice(((1, 1), (1,), (), (1, 1, 1), (2, 1)))
    tensor = Tensor(
        generator.choice(LORA_NAMES),
        generator.choice(("UINT64", "UINT64", "INT64", "BYTES", "")),
        shape,
        struct.pack("<Q", chef),
        Field(5, VARINT, chef) if generator.random() < 0.5 else text(5, varint(chef)),
    )
    more = [parameter("shared_memory_region", "mine")] if generator.random() < 0.1 else []
    at = _place(generator, tree)
    tree.fields.insert(at, input_of(tensor, typed, *more))
    if generator.random() < 0.8:
        tree.fields.append(text(7, tensor.data))


def _said(generator: random.Random, tree: Tree, chef: int) -> None:
    """A parameter of the request or of a tensor, of any type and with what may follow in its entry."""
    name = generator.choice(ODD_WORDS)
    choice = generator.choice(
        (text(3, generator.choice(ODD_WORDS)), number(2, generator.choice(ODD_NUMBERS)), number(1, 1), number(5, chef))
    )
    entry = [text(1, name), message(2, choice)]
    chance = generator.random()
    if chance < 0.15:
        entry.append(number(generator.choice(ODD_FIELDS), 1))
    elif chance < 0.25:
        entry.append(message(2, text(3, generator.choice(ODD_WORDS))))
    elif chance < 0.3:
        entry.reverse()
    node = _somewhere(generator, tree)
    node.fields.insert(_place(generator, node), message(4, *entry))


def _many(generator: random.Random, tree: Tree, chef: int) -> None:
    node = _somewhere(generator, tree)
    if node.fields:
        count = generator.choices(COUNTS, (40, 40, 17, 2.5, 0.5))[0]
        node.fields += [generator.choice(node.fields)] * count


def _grouped(generator: random.Random, tree: Tree, chef: int) -> None:
    node = _somewhere(generator, tree)
    node.fields = [Field(generator.choice(ODD_FIELDS), generator.choice((GROUP, LENGTH)), Tree(node.fields))]


MUTATIONS: tuple[Mutation, ...] = (
    _twice, _left_out, _shuffled, _unknown, _changed, _changed, _content, _content, _chosen, _chosen, _said, _said,
    _many, _grouped,
)  # fmt: skip
