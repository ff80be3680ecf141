"""Copies of an adapter with one thing changed, made from the bytes of its tensors, whatever their type."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import deserialize

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_BYTES = {"F16": 2, "BF16": 2, "F32": 4}
SIGN = 0x80


@dataclass(frozen=True)
class Tensor:
    """A tensor of two dimensions."""

    dtype: str
    shape: tuple[int, int]
    data: bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.shape[1] * _BYTES[self.dtype]


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class Copies:
    """Makes copies of a folder below another one, which the server must see by the same path."""

    def __init__(self, source: Path, below: Path) -> None:
        self._source = source
        self._below = below
        self._made = 0

    def plain(self) -> Path:
        """Return a copy as it is."""
        self._made += 1
        return Path(shutil.copytree(self._source, self._below / str(self._made)))

    def without_config(self) -> Path:
        """Return a copy without its configuration."""
        folder = self.plain()
        (folder / CONFIG).unlink()
        return folder

    def corrupt(self) -> Path:
        """Return a copy whose weights are no safetensors file."""
        folder = self.plain()
        (folder / WEIGHTS).write_bytes(b"\x80" * 64)
        return folder

    def configured(self, **fields: Any) -> Path:
        """Return a copy with other fields in its configuration."""
        folder = self.plain()
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | fields))
        return folder

    def negated(self, folder: Path | None = None) -> Path:
        """Return a copy with the opposite effect; or change a copy that is there."""
        return self._changed(_negated, folder)

    def with_unknown_module(self) -> Path:
        """Return a copy that also changes a projection that no model has."""
        return self._changed(_with_unknown_module)

    def of_rank(self, rank: int) -> Path:
        """Return a copy whose pairs are repeated until they have a rank of at least this."""
        return self._changed(lambda tensors: {name: _repeated(name, each, rank) for name, each in tensors.items()})

    def of_layer(self, layer: int) -> Path:
        """Return a copy with one more layer, a copy of the first."""
        return self._changed(lambda tensors: tensors | _moved(tensors, layer))

    def too_short(self) -> Path:
        """Return a copy whose matrices B have lost half of their rows."""
        return self._changed(lambda tensors: {name: _halved(name, each) for name, each in tensors.items()})

    def _changed(self, change: Change, folder: Path | None = None) -> Path:
        folder = folder or self.plain()
        entries = deserialize((folder / WEIGHTS).read_bytes())
        tensors = {name: Tensor(e["dtype"], tuple(e["shape"]), bytes(e["data"])) for name, e in sorted(entries)}
        (folder / WEIGHTS).write_bytes(_serialized(change(tensors)))
        return folder


def _serialized(tensors: dict[str, Tensor]) -> bytes:
    """Return a safetensors file: the length of its header, the header, the data."""
    header, end = {}, 0
    for name, each in tensors.items():
        offsets = [end, end + len(each.data)]
        header[name] = {"dtype": each.dtype, "shape": each.shape, "data_offsets": offsets}
        end = offsets[1]
    head = json.dumps(header).encode()
    return b"".join([len(head).to_bytes(8, "little"), head, *(each.data for each in tensors.values())])


def _negated(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: _sign_flipped(each) if ".lora_B." in name else each for name, each in tensors.items()}


def _sign_flipped(tensor: Tensor) -> Tensor:
    data, size = bytearray(tensor.data), _BYTES[tensor.dtype]
    for place in range(size - 1, len(data), size):
        data[place] ^= SIGN
    return Tensor(tensor.dtype, tensor.shape, bytes(data))


def _with_unknown_module(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    known = next(name for name in tensors if ".lora_A." in name).rpartition(".lora_A.")[0]
    unknown = f"{known.rpartition('.')[0]}.unknown_proj"
    return tensors | {name.replace(known, unknown): each for name, each in tensors.items() if known in name}


def _repeated(name: str, tensor: Tensor, rank: int) -> Tensor:
    rows, columns = tensor.shape
    if ".lora_A." in name:
        times = -(-rank // rows)
        return Tensor(tensor.dtype, (rows * times, columns), tensor.data * times)
    times, size = -(-rank // columns), tensor.row_bytes
    data = b"".join(tensor.data[start : start + size] * times for start in range(0, len(tensor.data), size))
    return Tensor(tensor.dtype, (rows, columns * times), data)


def _moved(tensors: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    return {name.replace(".0.", f".{layer}.", 1): each for name, each in tensors.items() if ".layers.0." in name}


def _halved(name: str, tensor: Tensor) -> Tensor:
    if ".lora_A." in name:
        return tensor
    rows = max(1, tensor.shape[0] // 2)
    return Tensor(tensor.dtype, (rows, tensor.shape[1]), tensor.data[: rows * tensor.row_bytes])
