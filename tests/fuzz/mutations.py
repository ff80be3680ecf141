"""Ways to damage an adapter's files, drawn from a seeded generator: bytes, header, config, index."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

Files = dict[str, bytes]
Mutation = Callable[[random.Random, Files], None]

CONFIG = "adapter_config.json"
INDEX = "adapter_model.safetensors.index.json"

_ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**40, 0.5, 1e308, -1e-308, "", "x" * 300, "\ud800", "../../etc/passwd",
    "attn\x00", [], [[]], {}, {"a": {"b": []}}, ["q_proj"], "all-linear", "(a+)+$", ".*" * 50, [1, 2, 3], "LORA",
    "pissa", "[[a]--b]",
)  # fmt: skip
_ODD_BYTES = (b"\x00", b"\xff", b"{", b"}", b"[" * 200, b'"', b",", b"9" * 40, b"\\u0000", b"e999", b"NaN", b"-")
_ODD_DTYPES = ("F16", "BF16", "F32", "F64", "I64", "BOOL", "F8_E4M3", "Q4", "", 7)
_ODD_BITS = (0x7FC0, 0x7F80, 0xFF80, 0x7C00, 0x0001, 0x7F7F, 0x0000, 0x8000)


def mutate(generator: random.Random, files: Files) -> Files:
    """Return a copy with one to three kinds of damage."""
    damaged = dict(files)
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        generator.choice(MUTATIONS)(generator, damaged)
    return damaged


def _some_file(generator: random.Random, files: Files) -> str:
    return generator.choice(sorted(files))


def _overwrite(generator: random.Random, files: Files) -> None:
    name = _some_file(generator, files)
    data = bytearray(files[name])
    for _ in range(generator.randint(1, 4)):
        if data:
            data[generator.randrange(min(len(data), 4096))] = generator.randrange(256)
    files[name] = bytes(data)


def _insert(generator: random.Random, files: Files) -> None:
    name = _some_file(generator, files)
    data, written = files[name], generator.choice(_ODD_BYTES)
    at = generator.randrange(len(data) + 1)
    files[name] = data[:at] + written + data[at + generator.choice((0, len(written))) :]


def _cut(generator: random.Random, files: Files) -> None:
    name = _some_file(generator, files)
    files[name] = files[name][: generator.randrange(len(files[name]) + 1)]


def _extend(generator: random.Random, files: Files) -> None:
    name = _some_file(generator, files)
    files[name] += generator.randbytes(generator.randint(1, 64))


def _drop_file(generator: random.Random, files: Files) -> None:
    del files[_some_file(generator, files)]
    files.setdefault(CONFIG, b"{}")


def _swap_files(generator: random.Random, files: Files) -> None:
    one, other = _some_file(generator, files), _some_file(generator, files)
    files[one], files[other] = files[other], files[one]


def _config_field(generator: random.Random, files: Files) -> None:
    fields = _parsed(files.get(CONFIG, b""))
    if fields:
        name = generator.choice([*sorted(fields), "a_field_of_the_future"])
        fields[name] = generator.choice(_ODD_VALUES)
        files[CONFIG] = json.dumps(fields).encode("utf-8", "surrogatepass")


def _config_pattern(generator: random.Random, files: Files) -> None:
    fields = _parsed(files.get(CONFIG, b""))
    if fields:
        letters = [generator.choice("q_proj.*+?()[]|^$\\d{3}") for _ in range(generator.randint(1, 30))]
        field = generator.choice(("rank_pattern", "alpha_pattern"))
        fields[field] = {"".join(letters): generator.choice((1, 8, 0.5, -3))}
        files[CONFIG] = json.dumps(fields).encode()


def _header_length(generator: random.Random, files: Files) -> None:
    if name := _some_tensors(generator, files):
        length = generator.choice((0, 1, 7, 2**16, 2**32, 2**63, 2**64 - 1, generator.randrange(4096)))
        files[name] = struct.pack("<Q", length) + files[name][8:]


def _header_entry(generator: random.Random, files: Files) -> None:
    _with_header(generator, files, _change_entry)


def _change_entry(generator: random.Random, header: dict[str, Any]) -> None:
    entry = header[generator.choice(sorted(header))]
    if not isinstance(entry, dict) or not entry:
        return
    key = generator.choice(sorted(entry))
    if key == "dtype":
        entry[key] = generator.choice(_ODD_DTYPES)
    elif isinstance(entry[key], list) and entry[key] and generator.random() < 0.8:
        place = generator.randrange(len(entry[key]))
        entry[key][place] = generator.choice((0, 1, 2, -1, 2**40, 2**63, True, 1.5, "8", None))
    else:
        entry[key] = generator.choice(_ODD_VALUES)


def _header_name(generator: random.Random, files: Files) -> None:
    _with_header(generator, files, _change_name)


def _change_name(generator: random.Random, header: dict[str, Any]) -> None:
    old = generator.choice(sorted(header))
    words = (
        "q_proj",
        "qkv_proj",
        "gate_up_proj",
        "experts.0.w1",
        "experts.9.w1",
        "lora_A",
        "lora_B",
        "bias",
        "9999",
        "-1",
    )
    part = generator.choice(old.split("."))
    header[old.replace(part, generator.choice(words), 1)] = header.pop(old)


def _data_values(generator: random.Random, files: Files) -> None:
    name = _some_tensors(generator, files)
    if name and len(files[name]) > 80:
        data = bytearray(files[name])
        for _ in range(generator.randint(1, 6)):
            at = generator.randrange(max(8, len(data) - 64), len(data) - 1) & ~1
            data[at : at + 2] = struct.pack("<H", generator.choice(_ODD_BITS))
        files[name] = bytes(data)


def _index_owner(generator: random.Random, files: Files) -> None:
    index = _parsed(files.get(INDEX, b""))
    owners = index.get("weight_map") if index else None
    if isinstance(owners, dict) and owners:
        owners[generator.choice([*sorted(owners), "extra"])] = generator.choice((*_ODD_VALUES, *sorted(files)))
        files[INDEX] = json.dumps(index).encode("utf-8", "surrogatepass")


def _with_header(
    generator: random.Random, files: Files, change: Callable[[random.Random, dict[str, Any]], None]
) -> None:
    name = _some_tensors(generator, files)
    if not name:
        return
    data = files[name]
    (length,) = struct.unpack("<Q", data[:8].ljust(8, b"\x00"))
    header = _parsed(data[8 : 8 + min(length, len(data))])
    if header:
        change(generator, header)
        changed = json.dumps(header).encode("utf-8", "surrogatepass")
        files[name] = struct.pack("<Q", len(changed)) + changed + data[8 + length :]


def _some_tensors(generator: random.Random, files: Files) -> str | None:
    names = [name for name in sorted(files) if name.endswith(".safetensors")]
    return generator.choice(names) if names else None


def _parsed(data: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and value else None


MUTATIONS: tuple[Mutation, ...] = (
    _overwrite, _overwrite, _insert, _cut, _extend, _drop_file, _swap_files, _config_field, _config_field,
    _config_pattern, _header_length, _header_entry, _header_entry, _header_name, _data_values, _index_owner,
)  # fmt: skip
