"""Write packed rows as the two files that TensorRT-LLM's `hf_lora_convert.py` writes.

`model.lora_weights.npy` [1, N, W] and `model.lora_config.npy` int32 [1, N, 3]. NumPy has no bfloat16, so
NVIDIA's tool stores it as a 2-byte void; its readers recognise exactly that dtype (`|V2`) as bfloat16. We
write the same: with uint16 they would take the bits for integers.

Both files are written under temporary names and renamed when complete, the config last: a reader that waits
for the config never sees half an adapter.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sidecar.adapters.base_model import BaseModel
from sidecar.adapters.layout import numpy_dtype
from sidecar.adapters.names import shown
from sidecar.adapters.packed import Layout, PackPlan, PackReport, lora_config, pack, plan
from sidecar.adapters.peft import AdapterSource, read_adapter
from sidecar.errors import Misused, Reason

WEIGHTS_FILE_NAME = "model.lora_weights.npy"
CONFIG_FILE_NAME = "model.lora_config.npy"

_STORED_AS = {"float16": "<f2", "bfloat16": "|V2"}


@dataclass(frozen=True)
class ConvertReport:
    """The paths and shape of the files, and the rounding loss."""

    weights: Path
    config: Path
    shape: tuple[int, int, int]
    size_bytes: int
    packing: PackReport


def convert(
    src: Path,
    out_dir: Path,
    dtype: str = "float16",
    *,
    rank_multiple: int = 1,
    layout: Layout | None = None,
    base: BaseModel | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ConvertReport:
    """Write an adapter in the engine's file form; make `out_dir` if it is missing and replace older files there.

    `layout` replaces `dtype` and `rank_multiple` where the engine's heads must be known, as for fused projections.
    Every tensor is checked against `base`.

    Raises Invalid for a faulty adapter and Misused(CONFIG_INVALID) if the folder cannot be written; neither leaves
    or replaces a file.
    """
    layout = layout or Layout(dtype, rank_multiple)
    with read_adapter(src, base=base) as source:
        packing = plan(source, layout)
        try:
            report = _write(source, packing, out_dir, progress)
        except OSError as error:
            raise Misused(
                Reason.CONFIG_INVALID,
                f"cannot write {packing.size_bytes} bytes to {shown(str(out_dir), 200)} "
                f"({error.strerror}); free space there or give another --out",
            ) from error
    weights, config = out_dir / WEIGHTS_FILE_NAME, out_dir / CONFIG_FILE_NAME
    return ConvertReport(weights, config, (1, *packing.shape), packing.size_bytes, report)


def _write(
    source: AdapterSource, packing: PackPlan, out_dir: Path, progress: Callable[[int, int], None] | None
) -> PackReport:
    out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=out_dir) as scratch:
        weights, config = Path(scratch) / WEIGHTS_FILE_NAME, Path(scratch) / CONFIG_FILE_NAME
        report = _write_weights(weights, source, packing, progress)
        with config.open("wb") as file:
            np.save(file, lora_config(packing)[np.newaxis])
            os.fsync(file.fileno())
        weights.replace(out_dir / WEIGHTS_FILE_NAME)
        config.replace(out_dir / CONFIG_FILE_NAME)
    return report


def _write_weights(
    path: Path, source: AdapterSource, packing: PackPlan, progress: Callable[[int, int], None] | None
) -> PackReport:
    with path.open("w+b") as file:
        np.lib.format.write_array_header_1_0(
            file,
            {
                "descr": _STORED_AS[packing.layout.dtype],
                "fortran_order": False,
                "shape": (1, *packing.shape),
            },
        )
        start = file.tell()
        file.flush()
        # Writing to a mapped file on a full disk kills the process (SIGBUS); reserving the space first raises an error.
        os.ftruncate(file.fileno(), start + packing.size_bytes)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), start, packing.size_bytes)
        out = np.memmap(file, dtype=np.uint16, mode="r+", offset=start, shape=packing.shape)
        packed_into: np.ndarray[tuple[int, ...], np.dtype[np.uint16]] = out.view(np.ndarray)
        report = pack(source, packing, packed_into.view(numpy_dtype(packing.layout)), progress)
        source.file.check_unchanged()
        out.flush()
        os.fsync(file.fileno())
    return report
