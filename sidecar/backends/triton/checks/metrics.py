"""Check that the engine's metrics can be read; say what is unknown without them."""

from __future__ import annotations

from dataclasses import replace

from sidecar.backends.checks.finding import Finding, failed, ok, warning
from sidecar.backends.checks.port import METRICS_PORT
from sidecar.backends.http_client import WireError
from sidecar.backends.triton import gauges
from sidecar.backends.triton.checks.look import Look
from sidecar.backends.triton.gauges import Gauges

SEATS_FIX = "config.yaml: engine: {seats: the engine's max_batch_size, kv_tokens: its KV blocks × tokens a block}"
UNKNOWN = "seats and KV size are guessed, and an engine that hangs or restarts is noticed late"


async def metrics(look: Look) -> Finding:
    """Check that seats, KV tokens and the iteration counter are published."""
    target = look.target
    url = target.metrics_url or target.usual_metrics_url
    if url is None:
        return await _not_configured(look)
    try:
        found = gauges.parse(await _read(url), target.model)
    except (WireError, ValueError) as error:
        judge = failed if target.metrics_url else warning
        return judge(
            f"{url} cannot be read ({error}): {UNKNOWN}",
            "config.yaml: metrics: http://HOST:PORT/metrics   (or --metrics)",
            f"tritonserver --metrics-address=0.0.0.0 --metrics-port={METRICS_PORT}",
        )
    return _take(look, url, found)


async def _not_configured(look: Look) -> Finding:
    """Return the warning for a backend without metrics, and whether they are at Triton's default address."""
    usual = f"http://{look.target.host}:{METRICS_PORT}/metrics"
    try:
        found = gauges.parse(await _read(usual), look.target.model)
    except (WireError, ValueError):
        found = Gauges()
    elsewhere = "" if found == Gauges() else f", and {usual} has them"
    return warning(f"none are configured{elsewhere}: {UNKNOWN}", f"config.yaml: metrics: {usual}   (or --metrics)")


def _take(look: Look, url: str, found: Gauges) -> Finding:
    look.gauges = found
    facts = look.facts
    look.facts = replace(
        facts,
        # Each instance has a batch of its own, and the gauges are those of one instance.
        seats=facts.seats or (found.seats and found.seats * facts.caches),
        kv_tokens=facts.kv_tokens or (found.kv_tokens and found.kv_tokens * facts.caches),
    )
    named = {
        "seats": found.seats,
        "KV tokens": found.kv_tokens,
        "the iteration counter": found.iterations,
    }
    missing = [name for name, value in named.items() if value is None]
    text = f"{found.seats} seats, {found.kv_tokens} KV tokens, iteration {found.iterations}"
    if not missing:
        return ok(text)
    if found == Gauges() and look.is_llm_api:
        return warning(f"an LLM-API model publishes none of its engine: {UNKNOWN}", SEATS_FIX)
    if found == Gauges():
        return warning(
            f'{url} answers, and publishes no nv_trt_llm_* gauges of "{look.target.model}": {UNKNOWN}',
            "config.yaml: metrics: URL of this engine's own tritonserver; it publishes them after its first request",
        )
    return warning(f"{', '.join(missing)} not published: {UNKNOWN}", SEATS_FIX)


async def _read(url: str) -> str:
    async with gauges.client_of(url) as client:
        reply = await client.get(url, gauges.SCRAPE_TIMEOUT_S)
    if not reply.is_ok:
        raise WireError(f"it answers {reply.status}")
    return reply.text
