"""How answers came, as told from outside: by the sidecar's metrics, by Envoy's own counters, by an answer's headers."""

from __future__ import annotations

from collections.abc import Mapping

from tests.bench.processes import metrics_of
from tests.e2e.envoy.server import EnvoyServer
from tests.kit.serving import Serving, until_async

HELD = ("running_requests", "queued_requests", "picker_requests")
"""What counts requests that are somewhere now."""
MOST = 0.5
"""The part of streams that the log must tell of. On a busy machine some need no log: an answer that comes to Envoy in
one piece, and a call in path whose client was late to close its side."""


async def log_used(served: Serving) -> int:
    """Return how many entries of Envoy's access log have told of an answer that went past the sidecar."""
    samples = await metrics_of(served.sidecar.listening.probes)
    return int(samples["picker_log_entries_total", ("used",)])


async def answered_by(envoy: EnvoyServer, cluster: str) -> int:
    """Return how many requests Envoy has sent to the servers of a cluster and got an answer to."""
    name = f"cluster.{cluster}.upstream_rq_completed"
    return (await envoy.stats(name)).get(name, 0)


async def nothing_is_left(served: Serving) -> None:
    """Wait until the metrics say that no request runs, waits, or is on its way through Envoy."""

    async def is_quiet() -> bool:
        samples = await metrics_of(served.sidecar.listening.probes)
        return not any(value for (name, _), value in samples.items() if name in HELD)

    await until_async(is_quiet)


def went_past(headers: Mapping[str, str]) -> bool:
    """Whether an answer went past the sidecar, as docs/envoy.md has it."""
    return headers["server"] == "envoy" and "x-accel-buffering" not in headers
