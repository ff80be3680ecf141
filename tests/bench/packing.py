"""Packing: cast, scale and range check beside a memcpy of the same bytes, what threads add, and the memory it takes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter_ns

import numpy as np
import numpy.typing as npt

from sidecar.adapters.cast import cast_for
from sidecar.adapters.packed import Layout, pack, plan
from sidecar.adapters.peft import AdapterSource, read_adapter
from sidecar.adapters.writing import CHUNK_ELEMENTS
from tests.bench.figures import Figure
from tests.kit.peft_files import ALL_LINEAR, BFLOAT16, Dims, write_adapter

FOUR_LAYERS = Dims(hidden=4096, layers=4, heads=32, kv_heads=8, head_size=128, ffn=14336)
"""An eighth of Llama-3.1-8B: 80 MB at rank 128."""
RANK, ELEMENTS, ROUNDS = 128, 20 << 20, 7
GOAL_TIMES_MEMCPY = 4.0
GOAL_OF_TWO_THREADS = 1 / 1.7

Bits = npt.NDArray[np.uint16]


async def bench(folder: Path) -> list[Figure]:
    path = write_adapter(folder / "sql", shape=FOUR_LAYERS, modules=ALL_LINEAR, rank=RANK, size=0.02)
    figures = _casts()
    with read_adapter(path) as source:
        return figures + _whole(path, source) + _memory(source)


def _casts() -> list[Figure]:
    """The casts alone, of numbers that are in memory: magnitudes, largest of each rank, product and rounding."""
    generator = np.random.default_rng(0)
    values = np.tile(generator.normal(0, 0.02, 1 << 20).astype(np.float32).astype(BFLOAT16), ELEMENTS >> 20)
    out = np.zeros(ELEMENTS, np.uint16)
    copied = _least_ms(lambda: np.copyto(out, values.view(np.uint16)))
    figures = []
    for name, factor in (("scale 2", np.float32(2)), ("scale 2.5", np.float32(2.5))):
        took = _least_ms(lambda factor=factor: _convert(values, factor, out))
        figures.append(
            Figure(
                f"packing: cast, scale, range; {name}", took, "ms", copied,
                f"a warm memcpy of {2 * ELEMENTS >> 20} MB", "ratio", GOAL_TIMES_MEMCPY, "bfloat16 to float16",
            )
        )  # fmt: skip
    return figures


def _convert(values: npt.NDArray[np.void], factor: np.float32, out: Bits) -> int:
    cast, bits, top = cast_for("BF16", values.size, factor, np.dtype(np.float16)), values.view(np.uint16), 0
    magnitudes = np.empty(CHUNK_ELEMENTS, np.uint16)
    for first in range(0, values.size, CHUNK_ELEMENTS):
        piece = slice(first, first + CHUNK_ELEMENTS)
        np.bitwise_and(bits[piece], np.uint16(0x7FFF), out=magnitudes)
        top = max(top, int(magnitudes.reshape(-1, 2048).max(axis=0).max()))
        cast.convert(values[piece], magnitudes, out[piece])
    return top


def _whole(path: Path, source: AdapterSource) -> list[Figure]:
    packing = plan(source, Layout("float16"))
    out, twin = np.zeros(packing.shape, np.float16), np.ones(packing.shape, np.float16)
    copied = _least_ms(lambda: np.copyto(out, twin))
    one = _least_ms(lambda: pack(source, packing, out))
    two = _least_ms(lambda: pack(source, packing, out, threads=2))
    return [
        Figure(
            "packing: a whole adapter", one, "ms", copied, f"a warm memcpy of its {packing.size_bytes >> 20} MB",
            note="with reading from the page cache, norms and padding",
        ),
        Figure("packing: two threads", two, "ms", one, "one thread", "ratio", round(GOAL_OF_TWO_THREADS, 3)),
        Figure(
            "packing: two processes, each", _in_two_processes(path) / 2, "ms", one, "one thread",
            note="what the second core of this machine can give at most",
        ),
    ]  # fmt: skip


def _in_two_processes(path: Path) -> float:
    """Return the milliseconds of one packing while another process packs as well."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for _ in range(2):  # the first time is for starting up
            took_ms = max(pool.map(_packed_again, [path] * 2))
    return took_ms


def _packed_again(path: Path) -> float:
    with read_adapter(path) as source:
        packing = plan(source, Layout("float16"))
        out = np.zeros(packing.shape, np.float16)
        began_ns = perf_counter_ns()
        for _ in range(3 * ROUNDS):
            pack(source, packing, out)
        return (perf_counter_ns() - began_ns) / 3 / ROUNDS / 1e6


def _memory(source: AdapterSource) -> list[Figure]:
    packing = plan(source, Layout("float16"))
    out = np.zeros(packing.shape, np.float16)
    tracemalloc.start()
    pack(source, packing, out)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    largest = max(tensor.size_bytes for target in source.targets for tensor in target.tensors)
    return [Figure("packing: memory", float(peak_bytes), "bytes", float(largest), "its largest tensor", "ratio", 1.0)]


def _least_ms(work: Callable[[], object]) -> float:
    """Return the shortest of some rounds: what else the machine does only ever adds."""
    least_ns = 1 << 62
    for _ in range(ROUNDS):
        began_ns = perf_counter_ns()
        work()
        least_ns = min(least_ns, perf_counter_ns() - began_ns)
    return least_ns / 1e6
