"""Group an adapter's tensors into targets: for each module of each layer its A, its B and its scale.

Nothing is ever dropped: an unknown tensor, an A without B, or a rank or layer that contradicts the config makes the
adapter invalid.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sidecar.adapters import peft_config
from sidecar.adapters.modules import Order, TensorPosition, locate
from sidecar.adapters.names import shown
from sidecar.adapters.peft_config import PeftConfig
from sidecar.adapters.refusal import malformed, unsupported
from sidecar.adapters.tensors import NUMPY_DTYPES, TensorInfo
from sidecar.core.layout import FUSED


@dataclass(frozen=True)
class Pair:
    """One A [rank, in] and B [out, rank] of the files, and the factor of B·A."""

    a: TensorInfo
    b: TensorInfo
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class Target:
    """One module of one layer: y += scale · B·A·x. A mixture of experts has a pair for each expert, others have one.

    `order` is the order of the parts of a fused module. Dimensions are TensorRT-LLM's: over all experts.
    """

    module: str
    module_id: int
    layer: int
    pairs: tuple[Pair, ...]
    order: Order = Order.WHOLE

    @property
    def a(self) -> TensorInfo:
        return self.pairs[0].a

    @property
    def b(self) -> TensorInfo:
        return self.pairs[0].b

    @property
    def scale(self) -> float:
        return self.pairs[0].scale

    @property
    def rank(self) -> int:
        return max(pair.rank for pair in self.pairs)

    @property
    def in_dim(self) -> int:
        return self.a.shape[1] * len(self.pairs)

    @property
    def out_dim(self) -> int:
        return self.b.shape[0] * len(self.pairs)

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return tuple(tensor for pair in self.pairs for tensor in (pair.a, pair.b))

    @property
    def dtype(self) -> str:
        """The safetensors dtype of all A and B; if they differ, F32, which holds every one."""
        return self.a.dtype if all(tensor.dtype == self.a.dtype for tensor in self.tensors) else "F32"


Side = tuple[TensorPosition, TensorInfo]
Experts = dict[int, dict[str, Side]]
"""Keyed by the expert's number (0 without a mixture), then by "A" or "B"."""


def targets_of(tensors: Mapping[str, TensorInfo], config: PeftConfig, adapter: str) -> tuple[Target, ...]:
    """Return the targets in layer-major order, by module id inside a layer. Raises Invalid for misfits."""
    found: dict[tuple[int, int], Experts] = {}
    for tensor in tensors.values():
        location = locate(tensor.name, adapter)
        sides = found.setdefault((location.layer, location.projection.module_id), {}).setdefault(
            location.expert or 0, {}
        )
        if location.side in sides:
            twice = f"{shown(sides[location.side][1].name, 160)} and {shown(tensor.name, 160)}"
            raise malformed(adapter, f"{twice} are the same tensor; keep one of them")
        sides[location.side] = location, tensor
    if not found:
        raise malformed(adapter, "the folder holds no LoRA tensor; save the adapter again")
    targets = tuple(_target(found[key], config, adapter) for key in sorted(found))
    _check_same_dims(targets, adapter)
    _check_fused_once(targets, adapter)
    return targets


def _target(experts: Experts, config: PeftConfig, adapter: str) -> Target:
    for number, expected in zip(sorted(experts), range(len(experts)), strict=True):
        if number != expected:
            (location, tensor) = next(iter(experts[number].values()))
            raise unsupported(
                adapter,
                f"tensor {shown(tensor.name, 160)} adapts expert {number} of {location.projection.module} but expert "
                f"{expected} has none; rows hold all experts or none, so train on all of them",
            )
    pairs = tuple(_pair(experts[number], config, adapter) for number in sorted(experts))
    location, first = next(iter(experts[0].values()))
    for pair in pairs:
        if (pair.a.shape[1], pair.b.shape[0]) != (pairs[0].a.shape[1], pairs[0].b.shape[0]):
            raise malformed(
                adapter,
                f"tensors {shown(pair.a.name, 160)} and {shown(first.name, 160)} are of experts of two sizes; save the "
                "adapter again",
            )
    projection = location.projection
    return Target(projection.module, projection.module_id, location.layer, pairs, projection.order)


def _pair(sides: Mapping[str, Side], config: PeftConfig, adapter: str) -> Pair:
    if len(sides) != 2:
        (present,) = sides.values()
        missing = "lora_B" if present[0].side == "A" else "lora_A"
        raise malformed(
            adapter,
            f"tensor {shown(present[1].name, 160)} has no {missing} beside it; save the adapter again",
        )
    (location, a), (_, b) = sides["A"], sides["B"]
    _check_matrices((a, b), adapter)
    config.check_targeted(location.path, location.layer, location.expert is not None, adapter)
    rank = _checked_rank(location.path, a, b, config, adapter)
    return Pair(a, b, config.scale_of(location.path, rank))


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
        if target.module == "mlp_gate_up" and target.out_dim % 2:
            raise malformed(adapter, f"tensor {shown(target.b.name, 160)} has gate and up of {target.out_dim} rows")


def _check_fused_once(targets: tuple[Target, ...], adapter: str) -> None:
    present = {(target.layer, target.module_id): target for target in targets}
    for target in targets:
        for name, number in FUSED.get(target.module, ()):
            if twin := present.get((target.layer, number)):
                raise unsupported(
                    adapter,
                    f"tensors {shown(target.a.name, 160)} and {shown(twin.a.name, 160)} both adapt {name}; no model "
                    "has both, so keep one of them",
                )
