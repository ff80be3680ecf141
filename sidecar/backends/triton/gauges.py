"""What a Triton server's metrics say of its TensorRT-LLM engine."""

from __future__ import annotations

from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

PREFIX = "nv_trt_llm_"
SCRAPE_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Gauges:
    """Seats and KV tokens of the engine, all and in use, and its iterations so far; None for what is not published."""

    seats: int | None = None
    kv_tokens: int | None = None
    iterations: int | None = None
    kv_used: int | None = None


class Scraper:
    """Reads the gauges of one model at one URL, over a connection that is kept."""

    def __init__(self, url: str, model: str) -> None:
        self._url = url
        self._model = model
        # Reading the machine's certificates takes tens of milliseconds: only where they are needed.
        verify = url.startswith("https:")
        self._client = httpx.AsyncClient(timeout=SCRAPE_TIMEOUT_S, trust_env=False, verify=verify)

    async def scrape(self) -> Gauges | None:
        """Read the gauges; None when the metrics cannot be had, which is no reason to call the engine lost."""
        try:
            reply = await self._client.get(self._url)
            reply.raise_for_status()
            return parse(reply.text, self._model)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError):
            return None

    async def close(self) -> None:
        await self._client.aclose()


def parse(text: str, model: str) -> Gauges:
    """Pick a model's gauges out of a scrape. Raises ValueError for what is no scrape."""
    ours = "\n".join(line for line in text.splitlines() if line.startswith(PREFIX))
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(ours):
        for sample in family.samples:
            if sample.labels.get("model", model) != model:
                continue
            for label, value in sample.labels.items():
                if label not in ("model", "version"):
                    found[sample.name, value] = sample.value
    blocks = found.get(("nv_trt_llm_kv_cache_block_metrics", "max"))
    per_block = found.get(("nv_trt_llm_kv_cache_block_metrics", "tokens_per"))
    used = found.get(("nv_trt_llm_kv_cache_block_metrics", "used"))
    return Gauges(
        seats=_positive(found.get(("nv_trt_llm_request_metrics", "max"))),
        kv_tokens=int(blocks * per_block) if blocks and per_block else None,
        iterations=_whole(found.get(("nv_trt_llm_general_metrics", "iteration_counter"))),
        kv_used=int(used * per_block) if used is not None and per_block else None,
    )


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _positive(value: float | None) -> int | None:
    """An engine that has not reported yet says 0 seats: that is not known rather than none."""
    return int(value) if value else None
