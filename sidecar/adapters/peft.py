"""A PEFT directory, read: which rows it gives which layer, at what scale, and what it is called.

Reading checks everything except the values themselves (`values.check_values`): files, header, config, names,
pairs, ranks and shapes. Nothing is ever dropped: a tensor or a setting that has no place in packed rows
refuses the adapter, with its name and the way out.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from sidecar.adapters import peft_config
from sidecar.adapters.identity import digest_of
from sidecar.adapters.modules import TensorPlace, place_of
from sidecar.adapters.names import shown
from sidecar.adapters.peft_config import PeftConfig, parse_config
from sidecar.adapters.refusal import malformed, unreadable, unsupported
from sidecar.adapters.tensors import NUMPY_DTYPES, TensorFile, TensorInfo

WEIGHTS_FILE_NAME = "adapter_model.safetensors"


@dataclass(frozen=True)
class Target:
    """One projection of one layer: y += scale · B·A·x with A [rank, in_dim] and B [out_dim, rank]."""

    module: str
    module_id: int
    layer: int
    rank: int
    scale: float
    a: TensorInfo
    b: TensorInfo

    @property
    def in_dim(self) -> int:
        return self.a.shape[1]

    @property
    def out_dim(self) -> int:
        return self.b.shape[0]

    @property
    def dtype(self) -> str:
        """The safetensors dtype of A and B; if they differ, F32, which holds both."""
        return self.a.dtype if self.a.dtype == self.b.dtype else "F32"


@dataclass(frozen=True)
class AdapterSource:
    """A checked PEFT directory. Its file stays open until `close`; use it as a context.

    `targets` are in layer-major order, by module id inside a layer. Rows packed in this order fill an
    engine's cache pages best: a layer's rows lie together, and every layer repeats the same sequence of
    sizes.
    """

    name: str
    base_model: str
    targets: tuple[Target, ...]
    digest: str
    file: TensorFile

    @property
    def size_bytes(self) -> int:
        return sum(target.a.size_bytes + target.b.size_bytes for target in self.targets)

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_adapter(
    path: Path, *, name: str | None = None, progress: Callable[[int, int], None] | None = None
) -> AdapterSource:
    """Read and check a PEFT directory (adapter_config.json and adapter_model.safetensors), digest included.

    `name` is what errors call it (default: the folder's name); `progress(done_bytes, total_bytes)` follows
    the hashing. Reads every byte once, so it belongs in a thread. Raises Invalid.
    """
    adapter = name if name is not None else path.name
    directory = _directory(path, adapter)
    config = parse_config(_read_config(directory, adapter), adapter)
    file = TensorFile(_weights_path(directory, adapter), adapter)
    try:
        targets = _targets(file, config, adapter)
        digest = digest_of(file, config.base_model, config.identity(), progress)
        file.check_unchanged()
    except BaseException:
        file.close()
        raise
    return AdapterSource(adapter, config.base_model, targets, digest, file)


def _directory(path: Path, adapter: str) -> Path:
    try:
        directory = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise unreadable(adapter, f"the folder {shown(str(path), 200)} cannot be read; check the path") from error
    if not directory.is_dir():
        raise unreadable(adapter, f"{shown(str(path), 200)} is not a folder; give the folder of the adapter")
    return directory


def _read_config(directory: Path, adapter: str) -> bytes:
    path = _file_inside(directory, peft_config.FILE_NAME, adapter)
    if path is None:
        raise malformed(adapter, f"{peft_config.FILE_NAME} is missing; the folder is not a PEFT adapter")
    try:
        with path.open("rb") as file:
            data = file.read(peft_config.CONFIG_BYTES_MAX + 1)
    except OSError as error:
        raise unreadable(adapter, f"{path.name} cannot be read: {error.strerror}") from error
    if len(data) > peft_config.CONFIG_BYTES_MAX:
        raise malformed(adapter, f"{path.name} is larger than {peft_config.CONFIG_BYTES_MAX} bytes")
    return data


def _weights_path(directory: Path, adapter: str) -> Path:
    path = _file_inside(directory, WEIGHTS_FILE_NAME, adapter)
    if path is not None:
        return path
    if (directory / "adapter_model.bin").exists():
        raise unsupported(
            adapter,
            "it has adapter_model.bin only, a pickle, which is never opened because it can run code; "
            "save it with safe_serialization=True",
        )
    raise malformed(adapter, f"{WEIGHTS_FILE_NAME} is missing; the folder is not a complete PEFT adapter")


def _file_inside(directory: Path, file_name: str, adapter: str) -> Path | None:
    """Return the file's resolved path, None if there is none; links out of the folder and odd files are
    refused.
    """
    try:
        path = (directory / file_name).resolve(strict=True)
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError) as error:
        raise unreadable(adapter, f"{file_name} cannot be read; check its permissions and links") from error
    if not path.is_relative_to(directory):
        raise unreadable(
            adapter, f"{file_name} is a link that leads out of the folder; copy the file itself there (cp -L)"
        )
    if not stat.S_ISREG(mode):
        raise unreadable(adapter, f"{file_name} is not a regular file; put the file itself there")
    return path


def _targets(file: TensorFile, config: PeftConfig, adapter: str) -> tuple[Target, ...]:
    pairs: dict[tuple[int, int], dict[str, tuple[TensorPlace, TensorInfo]]] = {}
    for tensor in file.tensors.values():
        place = place_of(tensor.name, adapter)
        sides = pairs.setdefault((place.layer, place.projection.module_id), {})
        if place.side in sides:
            twice = f"{shown(sides[place.side][1].name, 160)} and {shown(tensor.name, 160)}"
            raise malformed(adapter, f"{twice} are the same tensor; keep one of them")
        sides[place.side] = place, tensor
    if not pairs:
        raise malformed(adapter, f"{WEIGHTS_FILE_NAME} holds no LoRA tensor; save the adapter again")
    targets = tuple(_target(pairs[key], config, adapter) for key in sorted(pairs))
    _check_same_dims(targets, adapter)
    return targets


def _target(sides: Mapping[str, tuple[TensorPlace, TensorInfo]], config: PeftConfig, adapter: str) -> Target:
    if len(sides) != 2:
        (present,) = sides.values()
        missing = "lora_B" if present[0].side == "A" else "lora_A"
        raise malformed(
            adapter,
            f"tensor {shown(present[1].name, 160)} has no {missing} beside it; save the adapter again",
        )
    (place, a), (_, b) = sides["A"], sides["B"]
    _check_matrices((a, b), adapter)
    rank = _checked_rank(place.path, a, b, config, adapter)
    projection = place.projection
    scale = config.scale_of(place.path, rank)
    return Target(projection.module, projection.module_id, place.layer, rank, scale, a, b)


def _check_matrices(tensors: Iterable[TensorInfo], adapter: str) -> None:
    for tensor in tensors:
        named = f"tensor {shown(tensor.name, 160)}"
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            raise malformed(adapter, f"{named} has the shape {list(tensor.shape)}; a LoRA weight is a matrix")
        if tensor.dtype not in NUMPY_DTYPES:
            allowed = ", ".join(NUMPY_DTYPES)
            raise unsupported(adapter, f"{named} is {tensor.dtype}, not one of {allowed}; save it as bfloat16")


def _checked_rank(path: str, a: TensorInfo, b: TensorInfo, config: PeftConfig, adapter: str) -> int:
    rank, expected = a.shape[0], config.rank_of(path)
    if b.shape[1] != rank:
        raise malformed(
            adapter,
            f"tensor {shown(b.name, 160)} has rank {b.shape[1]} but its lora_A has {rank}; save the adapter again",
        )
    if rank != expected:
        raise malformed(
            adapter,
            f"{peft_config.FILE_NAME} gives {shown(path)} the rank {expected} (r, rank_pattern) but its "
            f"tensors have {rank}; config and weights are of different trainings",
        )
    return rank


def _check_same_dims(targets: tuple[Target, ...], adapter: str) -> None:
    first: dict[int, Target] = {}
    for target in targets:
        known = first.setdefault(target.module_id, target)
        if (known.in_dim, known.out_dim) != (target.in_dim, target.out_dim):
            raise unsupported(
                adapter,
                f"{target.module} is {target.in_dim} → {target.out_dim} in layer {target.layer} but "
                f"{known.in_dim} → {known.out_dim} in layer {known.layer}; engines have one size for all "
                "layers",
            )
