"""Read the gauges of a TensorRT-LLM engine from its Triton server's metrics."""

from __future__ import annotations

import ssl
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from sidecar.backends.gauges import count_of, sum_of
from sidecar.backends.http_client import HttpClient, WireError

REQUESTS, BLOCKS, GENERAL = (
    "nv_trt_llm_request_metrics",
    "nv_trt_llm_kv_cache_block_metrics",
    "nv_trt_llm_general_metrics",
)
SCRAPE_TIMEOUT_S = 2.0
KEEP_S = 5.0


@dataclass(frozen=True)
class Gauges:
    """Seats and KV tokens of the engine, total and in use, its iterations so far, and the requests that it has, waiting
    ones included; None if not published.
    """

    seats: int | None = None
    kv_tokens: int | None = None
    iterations: int | None = None
    kv_used: int | None = None
    inside: int | None = None


class Scraper:
    """Reads the gauges of one model at one URL, over a connection that is kept."""

    def __init__(self, url: str, model: str) -> None:
        self._url = url
        self._model = model
        self._client = client_of(url)

    async def scrape(self) -> Gauges | None:
        """Return the gauges; None if they cannot be read, which does not make the engine lost."""
        try:
            reply = await self._client.get(self._url, SCRAPE_TIMEOUT_S)
            return parse(reply.text, self._model) if reply.is_ok else None
        except (WireError, ValueError):
            return None

    async def close(self) -> None:
        await self._client.close()


def client_of(url: str) -> HttpClient:
    """Return a client for one URL. Reading the machine's certificates takes tens of milliseconds."""
    return HttpClient("", ssl.create_default_context() if url.startswith("https:") else None, kept_s=KEEP_S)


def parse(text: str, model: str) -> Gauges:
    """Return a model's gauges from the text of a scrape. Raises ValueError if it is malformed."""
    ours = "\n".join(line for line in text.splitlines() if line.startswith((REQUESTS, BLOCKS, GENERAL)))
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(ours):
        for sample in family.samples:
            if sample.labels.get("model", model) != model:
                continue
            for label, value in sample.labels.items():
                if label not in ("model", "version"):
                    found[sample.name, value] = sample.value
    blocks, per_block, used = (found.get((BLOCKS, which)) for which in ("max", "tokens_per", "used"))
    return Gauges(
        seats=_positive(found.get((REQUESTS, "max"))),
        kv_tokens=_positive(blocks * per_block) if blocks and per_block else None,
        iterations=count_of(found.get((GENERAL, "iteration_counter"))),
        kv_used=count_of(used * per_block) if used is not None and per_block else None,
        inside=sum_of(found.get((REQUESTS, which)) for which in ("waiting", "active")),
    )


def _positive(value: float | None) -> int | None:
    """Return a positive number; None for 0, which an engine publishes before its first report."""
    return count_of(value) or None
