"""What a Triton server's metrics say of its TensorRT-LLM engine."""

from __future__ import annotations

from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class Gauges:
    """Seats and KV tokens of the engine, and how many iterations it has run; None for what is not published."""

    seats: int | None = None
    kv_tokens: int | None = None
    iterations: int | None = None


async def scrape(url: str) -> Gauges | None:
    """Read the gauges; None when the metrics cannot be had, which is no reason to call the engine lost."""
    try:
        async with httpx.AsyncClient(timeout=2.0, trust_env=False) as client:
            reply = await client.get(url)
            reply.raise_for_status()
        return parse(reply.text)
    except (httpx.HTTPError, ValueError):
        return None


def parse(text: str) -> Gauges:
    """Pick the engine's gauges out of a scrape."""
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("nv_trt_llm_"):
                for label, value in sample.labels.items():
                    if label not in ("model", "version"):
                        found[sample.name, value] = sample.value
    blocks = found.get(("nv_trt_llm_kv_cache_block_metrics", "max"))
    per_block = found.get(("nv_trt_llm_kv_cache_block_metrics", "tokens_per"))
    return Gauges(
        seats=_whole(found.get(("nv_trt_llm_request_metrics", "max"))),
        kv_tokens=int(blocks * per_block) if blocks and per_block else None,
        iterations=_whole(found.get(("nv_trt_llm_general_metrics", "iteration_counter"))),
    )


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
