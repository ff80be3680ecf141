"""Reading, checking and packing damaged adapters: every outcome is an adapter or a typed refusal."""

from __future__ import annotations

import random
import shutil
import tracemalloc
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import numpy as np

from sidecar.adapters.base_model import read_base_model
from sidecar.adapters.layout import numpy_dtype
from sidecar.adapters.packed import pack, plan
from sidecar.adapters.peft import read_adapter
from sidecar.adapters.values import check_values
from sidecar.core.layout import Heads, Layout
from sidecar.errors import Family, Reason, SidecarError
from tests.fuzz.mutations import Files, mutate
from tests.kit.peft_files import write_adapter

GOLDEN = Path(__file__).parents[1] / "golden" / "peft" / "adapters"
GOLDEN_SEEDS = ("llama-layers", "llama-sharded", "phi3-fused", "mixtral-experts", "gpt2-conv1d")
LAYOUTS = (
    Layout("float16", 8, 2, ("attn_qkv", "mlp_gate_up"), Heads(4, 2, 4)),
    Layout("bfloat16", 1, 1, (), Heads(4, 2, 4)),
    Layout("float16"),
)
MESSAGE_LENGTH_MAX = 900
MEMORY_BASE_BYTES = 1 << 18
"""What reading and packing takes for itself, whatever the files hold: buffers, the config's objects."""


@dataclass
class Found:
    """What came out: how often each reason, the slowest case and the largest memory beyond twice the files."""

    outcomes: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    slowest_case: int = -1
    memory_excess_bytes: int = -(1 << 40)


def seeds(scratch: Path) -> list[Files]:
    """Return good adapters to damage: a tiny plain one many times, and golden ones of other shapes."""
    plain = write_adapter(scratch / "plain", rank=1, layers=[0])
    golden = [_files(GOLDEN / name) for name in GOLDEN_SEEDS]
    return [_files(plain)] * 10 + golden


def _files(folder: Path) -> Files:
    return {
        path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file() and path.suffix != ".npz"
    }


def damaged(case: int, seed: int, good: list[Files]) -> Files:
    """Return the files of one case: the same for the same seed and case, whichever process asks."""
    generator = random.Random(f"{seed}:{case}")
    return mutate(generator, generator.choice(good))


def run(cases: range, seed: int, scratch: Path, memory_every: int = 0) -> Found:
    """Try the cases; raises what is not a typed refusal, and AssertionError for a refusal that is not fit for people.

    Every `memory_every`-th case is tried with its memory traced.
    """
    good, found = seeds(scratch), Found()
    for case in cases:
        files, folder = damaged(case, seed, good), scratch / "case"
        write_files(folder, files)
        began = perf_counter()
        if memory_every and case % memory_every == 0:
            outcome, peak_bytes = _traced(folder, case)
            held = sum(map(len, files.values()))
            found.memory_excess_bytes = max(found.memory_excess_bytes, peak_bytes - 2 * held - MEMORY_BASE_BYTES)
        else:
            outcome = attempt(folder, case)
        took_s = perf_counter() - began
        found.outcomes[outcome] += 1
        if took_s > found.slowest_s:
            found.slowest_s, found.slowest_case = took_s, case
    return found


def write_files(folder: Path, files: Files) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _traced(folder: Path, case: int) -> tuple[str, int]:
    tracemalloc.start()
    try:
        outcome = attempt(folder, case)
        return outcome, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def attempt(folder: Path, case: int) -> str:
    """Read, check and pack a folder; return the reason of its refusal, or "packed"."""
    layout = LAYOUTS[case % len(LAYOUTS)]
    _attempt_base(folder)
    try:
        with read_adapter(folder) as source:
            check_values(source)
            packing = plan(source, layout)
            out = np.empty(packing.shape, numpy_dtype(layout))
            report = pack(source, packing, out)
            assert np.isfinite(out.astype(np.float32)).all(), "Inf or NaN was packed"
            assert 0 <= report.flushed_share <= 1
    except SidecarError as error:
        return fit_for_people(error)
    return "packed"


def fit_for_people(error: SidecarError) -> str:
    assert error.reason.row.family is Family.INVALID, error
    assert 20 < len(error.message) < MESSAGE_LENGTH_MAX, error.message
    assert error.message.isprintable(), repr(error.message)
    return error.reason.value


def _attempt_base(folder: Path) -> None:
    """Read the folder's config as if it were a base model's: that too is a model or a typed refusal."""
    try:
        read_base_model(folder / "adapter_config.json")
    except SidecarError as error:
        assert error.reason is Reason.CONFIG_INVALID  # noqa: PT017 - any other exception passes through
