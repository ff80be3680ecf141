"""Rewrite an adapter's files for TensorRT-LLM's PyTorch loader, so that it takes all of them and scales them right.

That loader (`loaders.py` and `manager.py` in `tensorrt_llm/_torch/peft/lora`) reads one `adapter_model.safetensors`. It
knows modules by Llama's and Mixtral's names only, and skips all others with a line in its log. It takes a fused
projection as q, k, v one after the other. It scales each B by `lora_alpha` over its own rank (the rank's root with
`use_rslora`): `alpha_pattern` has no effect.

The result is a PEFT adapter again, with the same effect on a model that has those names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sidecar.adapters import peft_config
from sidecar.adapters.balance import Exponents, Floats, exponents_for
from sidecar.adapters.entries import Files
from sidecar.adapters.names import shown
from sidecar.adapters.peft import INDEX_FILE_NAME, WEIGHTS_FILE_NAME, AdapterSource
from sidecar.adapters.peft_config import PeftConfig, parse_config
from sidecar.adapters.refusal import unsupported
from sidecar.adapters.rows import PackedRow, Range, rows_of
from sidecar.adapters.targets import Pair
from sidecar.adapters.tensors import NUMPY_DTYPES, TensorInfo
from sidecar.core.layout import Layout

NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj", "attn_dense": "self_attn.o_proj", "mlp_h_to_4h": "mlp.gate_proj",
    "mlp_4h_to_h": "mlp.down_proj", "mlp_gate": "mlp.up_proj", "mlp_gate_up": "mlp.gate_up_proj",
    "moe_h_to_4h": "mlp.experts.{}.w1", "moe_4h_to_h": "mlp.experts.{}.w2", "moe_gate": "mlp.experts.{}.w3",
    "moe_router": "mlp.gate", "shared_expert_h_to_4h": "mlp.shared_expert.gate_proj",
    "shared_expert_4h_to_h": "mlp.shared_expert.down_proj", "shared_expert_gate": "mlp.shared_expert.up_proj",
}  # fmt: skip
"""The names by which the loader knows modules (`get_default_trtllm_modules_to_hf_modules`), within a layer."""
EXACT = 1e-9
"""A relative difference of two scales that comes from dividing and multiplying by a rank."""
PIECE_ELEMENTS = 256 << 10


@dataclass(frozen=True)
class _Matrix:
    """One tensor to write: the rows `ranges` of a tensor times `factor`, then zeros up to `shape`.

    `powers` are the exponents of two by which the rows of an A, or the columns of a B, are multiplied as well.
    """

    name: str
    tensor: TensorInfo
    ranges: Sequence[Range]
    shape: tuple[int, int]
    factor: float = 1.0
    powers: Exponents | None = None
    is_a: bool = False

    @property
    def dtype(self) -> str:
        return self.tensor.dtype if self.factor == 1 else "F32"

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * NUMPY_DTYPES[self.dtype].itemsize

    @property
    def is_unchanged(self) -> bool:
        whole = ((0, self.tensor.shape[0]),)
        return (
            self.name == self.tensor.name
            and self.shape == self.tensor.shape
            and tuple(self.ranges) == whole
            and self.factor == 1
            and self.powers is None
        )

    def pieces(self, source: AdapterSource) -> Iterator[npt.NDArray[Any]]:
        """Yield the values, row by row, in arrays that take little time each."""
        dtype, (rows, width), own = NUMPY_DTYPES[self.dtype], self.shape, self.tensor.shape[1]
        step = max(1, PIECE_ELEMENTS // width)
        for first, count in self.ranges:
            for row in range(first, first + count, step):
                taken = min(step, first + count - row)
                read = np.empty(taken * own, NUMPY_DTYPES[self.tensor.dtype])
                source.file.read_into(self.tensor, row * own, read)
                values = read.reshape(taken, own)
                if self.factor != 1:
                    values = values.astype(np.float32) * np.float32(self.factor)
                if self.powers is not None:
                    own_powers = self.powers[row : row + taken, None] if self.is_a else self.powers
                    values = np.ldexp(values.astype(np.float32), own_powers.astype(np.int32))
                out = np.zeros((taken, width), dtype)
                out[:, :own] = values
                yield out
        missing = rows - sum(count for _, count in self.ranges)
        if missing:
            yield np.zeros((missing, width), dtype)


def rewrite(source: AdapterSource, layout: Layout, folder: Path, files: Files) -> bool:
    """Write an adapter into an empty folder as an engine takes it; return False if its own files do.

    The layout says which fused projections the engine has whole. With `one_rank` the result has no patterns, and is
    always written: a loader that knows no patterns is particular about other fields, too. Raises Invalid if the parts
    of a fused projection cannot be placed, OSError.
    """
    config = parse_config(source.documents[peft_config.FILE_NAME], source.name)
    one = layout.for_ranks(target.rank for target in source.targets)
    rows = [row for target in source.targets for row in rows_of(target, one, source.name)]
    if layout.one_rank:
        top = rows[0].rank
        config = replace(config, rank=top, alpha=rows[0].target.pairs[0].scale * top, use_rslora=False)
    alpha = config.alpha or 1.0
    for row in rows:
        if row.module not in NAMES:
            raise unsupported(
                source.name,
                f"tensor {shown(row.target.a.name, 160)} adapts {row.module}, for which TensorRT-LLM's PyTorch loader "
                "has no name, so it would be left out; train without it",
            )
    matrices = [
        matrix for row in rows for number, pair in enumerate(row.target.pairs) for matrix in
        _matrices(source, layout, row, number, pair, _factor(pair, row, alpha, config.use_rslora))
    ]  # fmt: skip
    is_whole = INDEX_FILE_NAME not in source.documents and config.alpha and not layout.one_rank
    if is_whole and all(matrix.is_unchanged for matrix in matrices):
        return False
    _write_config(folder, source, config, alpha, rows, files)
    _write_weights(folder / WEIGHTS_FILE_NAME, source, matrices, files)
    return True


def _factor(pair: Pair, row: PackedRow, alpha: float, use_rslora: bool) -> float:
    """Return what is left of a pair's scale to be put into B, the engine's own taken off."""
    rank = row.rank
    left = pair.scale / (alpha / (math.sqrt(rank) if use_rslora else rank))
    return 1.0 if abs(left - 1) < EXACT else left


def _matrices(
    source: AdapterSource, layout: Layout, row: PackedRow, expert: int, pair: Pair, factor: float
) -> tuple[_Matrix, _Matrix]:
    rank = row.rank  # experts of one module are stacked, so all have the largest rank
    path = f"base_model.model.{_path(row, expert)}"
    # The loader swaps the halves of gate_up_proj itself, so they stay in the order of the file.
    ranges = ((0, pair.b.shape[0]),) if row.module == "mlp_gate_up" else row.ranges
    powers = _powers(source, layout, pair, factor)
    a = _Matrix(f"{path}.lora_A.weight", pair.a, ((0, pair.rank),), (rank, pair.a.shape[1]), 1.0, powers, True)
    down = None if powers is None else -powers
    return a, _Matrix(f"{path}.lora_B.weight", pair.b, ranges, (row.out_rows, rank), factor, down)


def _path(row: PackedRow, expert: int) -> str:
    return f"model.layers.{row.target.layer}.{NAMES[row.module].format(expert)}"


def _powers(source: AdapterSource, layout: Layout, pair: Pair, factor: float) -> Exponents | None:
    """Return the powers of two to move between A and B, so that the engine's dtype holds both; None for none.

    The engine casts A and B to its dtype and scales B afterwards. Raises Invalid if no powers suffice.
    """
    is_held = factor == 1 and abs(pair.scale) <= 1 and pair.a.dtype == pair.b.dtype == "F16"
    if layout.dtype != "float16" or is_held:
        return None
    tops_a, tops_b = _tops(source, pair.a, 1), _tops(source, pair.b, 0)
    return exponents_for(pair, tops_a, tops_b * max(abs(factor), abs(pair.scale)), layout.dtype, source.name)


def _tops(source: AdapterSource, tensor: TensorInfo, axis: int) -> Floats:
    """Return the largest magnitude of each row (axis 1) or column (axis 0) of a matrix."""
    rows, width = tensor.shape
    step = max(1, PIECE_ELEMENTS // width)
    found = []
    for row in range(0, rows, step):
        taken = min(step, rows - row)
        values = np.abs(source.file.elements(tensor, row * width, taken * width).reshape(taken, width))
        found.append(values.max(axis=axis).astype(np.float64))
    return np.concatenate(found) if axis == 1 else np.max(found, axis=0)


def _write_config(
    folder: Path, source: AdapterSource, config: PeftConfig, alpha: float, rows: Sequence[PackedRow], files: Files
) -> None:
    ranks = {
        _path(row, number).replace(".", r"\."): row.target.rank
        for row in rows
        for number in range(len(row.target.pairs))
        if row.rank != config.rank
    }
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source.base_model,
        "r": config.rank,
        "lora_alpha": alpha,
        "use_rslora": config.use_rslora,
        "rank_pattern": ranks,
        "target_modules": sorted({NAMES[row.module].rpartition(".")[2] for row in rows}),
        "bias": "none",
        "inference_mode": True,
    }
    files.write_file(folder / peft_config.FILE_NAME, [json.dumps(content, indent=2).encode()])


def _write_weights(path: Path, source: AdapterSource, matrices: Sequence[_Matrix], files: Files) -> None:
    header, offset = {}, 0
    for matrix in matrices:
        end = offset + matrix.size_bytes
        header[matrix.name] = {"dtype": matrix.dtype, "shape": list(matrix.shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # tensors begin at a multiple of eight bytes, as safetensors writes them
    data = (piece.reshape(-1).view(np.uint8).data for matrix in matrices for piece in matrix.pieces(source))
    files.write_file(path, chain([len(head).to_bytes(8, "little"), head], data))
