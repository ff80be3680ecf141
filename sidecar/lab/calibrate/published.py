"""Figures that no package measures: the published cost of adapters, and assumptions about copies.

Both published series are SqueezeBits' ("Serving Multiple LoRAs at Once", 2024-12) on an A100 80 GB: Llama-3.1-8B, 1K
tokens in and out, a batch of 256, 16 adapters of ranks 8 to 64.
"""

from __future__ import annotations

from dataclasses import dataclass

from sidecar.pace.cost_table import Copy, LoraLoss

PUBLISHED_FOR = ("llama-3.1-8b", "a100_sxm")
RANKS = (8.0, 64.0)
MODULES = (2.0, 7.0)
TO_DEVICE = Copy(gb_per_s=24.0, overhead_us=20.0)
TO_HOST = Copy(gb_per_s=6.0, overhead_us=20.0)
COPY_SOURCE = "copies: assumptions: PCIe 4.0 x16 from pinned memory, memcpy on one core, launch overhead of a copy."
FREE = LoraLoss(
    modules=MODULES, ranks=RANKS, loss=((0.0, 0.0), (0.0, 0.0)), adapters=1, loss_from_2_to_64=0, least_share=0
)
"""Adapters that cost nothing."""

_MEASUREMENT = (
    "SqueezeBits, 'Serving Multiple LoRAs at Once', 2024-12 (A100 80 GB, {engine}, 1K in and 1K out, batch 256, 16 "
    "adapters)"
)
_LEAST_SHARE = (
    "least_share is an assumption: the extra kernels are launched for the whole batch as soon as one request has an "
    "adapter."
)


@dataclass(frozen=True)
class PublishedLoss:
    """An engine's display name, the cost of adapters in it, and the source of that."""

    title: str
    loss: LoraLoss
    source: str


def _loss(*rows: tuple[float, float], from_2_to_64: float) -> LoraLoss:
    return LoraLoss(
        modules=MODULES, ranks=RANKS, loss=rows, adapters=16.0, loss_from_2_to_64=from_2_to_64, least_share=0.5
    )


LORA = {
    "trtllm": PublishedLoss(
        "TensorRT-LLM",
        _loss((0.163, 0.163), (0.438, 0.438), from_2_to_64=0.1),
        f"lora: {_MEASUREMENT.format(engine='TensorRT-LLM 0.14')}: 14.1 to 18.6 % less throughput for q/v adapters, "
        "40.0 to 47.7 % for all linear layers, flat in rank; about 10 % from 2 to 64 adapters. loss holds the middles "
        f"of the ranges. {_LEAST_SHARE}",
    ),
    "vllm": PublishedLoss(
        "vLLM",
        _loss((0.245, 0.435), (0.247, 0.444), from_2_to_64=0.08),
        f"lora: {_MEASUREMENT.format(engine='vLLM 0.6.3')}: 23.8 to 46.1 % less throughput for q/v adapters, 23.9 to "
        "47.0 % for all linear layers, growing with the rank from 8 to 64; about 10 % from 2 to 64 adapters. These are "
        "whole engines' losses, and a part of them is the memory that slots take from keys and values, which whoever "
        "runs an engine counts apart: loss and loss_from_2_to_64 hold the rest, such that runs at that set-up lose "
        "what was published. That the extra time grows linearly with the rank is an assumption. "
        f"{_LEAST_SHARE}",
    ),
}
"""By the engine's name on the command line."""
