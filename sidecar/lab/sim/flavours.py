"""The kinds of engines that can be simulated, and all that differs between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sidecar.lab.engine.shape import ALL_LINEAR
from sidecar.lab.engine.spec import EngineSpec, module_layer_pages

TOGETHER = ("attn_q", "attn_k", "attn_v")
"""TensorRT-LLM builds these for adapters all together or not at all."""
PYTORCH_OPTIMAL_RANK = 8
"""The rank that fills a page of the PyTorch backend's caches."""


def built_for(modules: Sequence[str]) -> tuple[str, ...]:
    """Return the modules that TensorRT-LLM must be built for to serve adapters that change these."""
    together = TOGETHER if any(name in TOGETHER for name in modules) else ()
    return (*together, *(name for name in modules if name not in together))


def _as_counted(spec: EngineSpec) -> EngineSpec:
    return spec


def _by_largest(spec: EngineSpec) -> EngineSpec:
    """Return the engine with caches for so many adapters of the largest rank, and as many slots in a CUDA graph."""
    paged = replace(spec, lora_optimal_rank=PYTORCH_OPTIMAL_RANK)
    on_gpu, on_host = spec.device_pages, spec.host_pages
    return replace(
        paged,
        lora_device_pages=module_layer_pages(paged, on_gpu),
        lora_host_pages=module_layer_pages(paged, on_host),
        lora_slots=on_gpu,
    )


def _widest_for_each(widths: Sequence[int]) -> int:
    """Return what a cache sized by adapters keeps a rank: whole page widths of the widest module for each module."""
    narrowest = min(widths)
    return len(widths) * -(-max(widths) // narrowest) * narrowest


@dataclass(frozen=True, kw_only=True)
class Flavour:
    """A simulated kind of engine: the emulator's scheduler, and the engine whose step times are used."""

    scheduler: str
    engine: str = "trtllm"
    of_kind: str | None = None
    """The kind of live engine that it stands for."""
    tokens_per_block: int = 64
    reserved_modules: tuple[str, ...] | None = None
    """The modules for which each slot reserves memory; None: those that the engine is built for."""
    targets: Callable[[Sequence[str]], tuple[str, ...]] = tuple
    """Returns the modules that the engine is built for to serve adapters that change these."""
    slot_width: Callable[[Sequence[int]], int] = sum
    """Returns the elements that a slot reserves for each rank and layer, from the widths (in + out) of its modules."""
    sized: Callable[[EngineSpec], EngineSpec] = _as_counted
    """Returns the engine with the pages of its caches, from one whose pages are counts of adapters."""
    counts_adapters: bool = False
    """True if the sizes of its caches are counts of adapters of any rank."""
    reads_files: bool = False
    """True if requests name an adapter's files and the loop reads them. Everything waits then, so the sidecar loads one
    adapter at a time.
    """
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the core is told besides: fields of EngineFacts."""
    cancels_after_ns: int = 0
    """How long it takes to notice that a client has gone."""


FLAVOURS: dict[str, Flavour] = {
    "trtllm_no_evict": Flavour(scheduler="guaranteed_no_evict"),
    "trtllm_max_utilization": Flavour(scheduler="max_utilization"),
    "vllm": Flavour(
        scheduler="vllm",
        engine="vllm",
        of_kind="vllm",
        tokens_per_block=16,
        reserved_modules=ALL_LINEAR,
        counts_adapters=True,
    ),
    "strict_fifo": Flavour(scheduler="strict_fifo"),
    "trtllm_pytorch": Flavour(
        scheduler="trtllm_pytorch",
        of_kind="trtllm",
        tokens_per_block=32,
        targets=built_for,
        slot_width=_widest_for_each,
        sized=_by_largest,
        counts_adapters=True,
        reads_files=True,
        facts={"reads_files": True, "canonical_files": True},
        cancels_after_ns=1_000_000_000,
    ),
}


def flavour_of(kind: str, usual: str) -> str:
    """Return the flavour that stands for a live engine of this kind."""
    return next((name for name, flavour in FLAVOURS.items() if flavour.of_kind == kind), usual)
