"""What is known of an engine keeps it from failing: seats, pages, dtypes; and what is not known is learned."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from sidecar.config import parse
from sidecar.core.effects import Effect
from sidecar.core.enums import Phase
from sidecar.core.events import Event
from sidecar.proto import admin_pb2, admin_pb2_grpc
from sidecar.serve.app import Sidecar
from tests.kit.emulated import running_engine
from tests.kit.faults import DUMMY, assert_nothing_left, assert_right, attempt, gathered, heals
from tests.kit.serving import Serving, serving, until, write_adapters

PAGE_BYTES = 240 * 96 * 2
"""A page of the tiny model with all linear modules at rank 8, in fp16."""


class Watermarks:
    """An observer of the most that was ever in flight at once, in requests and in pages, and of what was learned."""

    def __init__(self, served: Serving) -> None:
        self._served = served
        self.in_flight = 0
        self.pages = 0
        self.learned = 0
        served.sidecar.gateway.observe(self)

    def observed(self, event: Event, effects: Sequence[Effect], now_ns: int) -> None:
        state = self._served.state
        backend = state.backends["trt-0"]
        versions = {state.requests[request].version for request in backend.running}
        versions |= {state.loads[load].digest for load in backend.loads}
        self.in_flight = max(self.in_flight, len(backend.running) + len(backend.loads))
        self.learned = max(self.learned, backend.estimate.pages)
        self.pages = max(self.pages, sum(state.packed_for(digest, backend).pages for digest in versions))


async def test_what_is_in_flight_never_exceeds_seats_and_pages(tmp_path: Path) -> None:
    """With the engine's config.json, its cache is never asked for more than it has: it has no error to report.

    Seats come from its gauges, with a tenth more so that none stands empty.
    """
    names = write_adapters(tmp_path / "loras", 16)
    config = tmp_path / "config.json"
    sizes = {"max_lora_rank": 8, "lora_max_rank_cached": 8, "lora_host_bytes": 4 * PAGE_BYTES}
    async with (
        running_engine(**DUMMY, **sizes, seats=20, metrics_port=0, write_engine_config=config) as engine,
        serving([engine], tmp_path / "loras", backend={"engine": {"config": str(config)}}) as served,
    ):
        assert served.state.backends["trt-0"].facts.host_pages_total == engine.engine.spec.host_pages == 4
        most = Watermarks(served)
        for tried in await gathered(*(attempt(served, names[n * 7 % 16]) for n in range(400))):
            assert_right(served, tried)
        assert 2 <= most.in_flight <= 22  # how many are there at once is the machine's affair, above it none may be
        assert 2 <= most.pages <= 4
        assert engine.engine.counters.host_evictions > 0
        assert not [record.error for record in engine.served if "no done tasks" in (record.error or "")]
        assert "load_cache_full" not in heals(served)
        await assert_nothing_left(served)


async def test_a_device_of_unknown_size_is_learned(tmp_path: Path) -> None:
    """One adapter at first, then as many as the engine keeps up with; all are served on the way."""
    names = write_adapters(tmp_path, 12)
    async with (
        running_engine(**DUMMY, lora_device_pages=3, metrics_port=0) as engine,
        serving([engine], tmp_path) as served,
    ):
        backend = served.state.backends["trt-0"]
        assert backend.facts.device_pages is None
        assert backend.estimate.pages == 1
        most = Watermarks(served)
        for tried in await gathered(*(attempt(served, names[n % 12]) for n in range(240))):
            assert_right(served, tried)
        assert most.learned > 1
        await assert_nothing_left(served)


@asynccontextmanager
async def unreached(server: Any, **backend: Any) -> AsyncIterator[Sidecar]:
    """Run a sidecar without waiting for its backend to come up."""
    free = {"address": "127.0.0.1:0"}
    entry = {"url": f"triton://{server.grpc_address}", "id": "trt-0"} | backend
    config = {"backends": [entry], "listeners": {"data": free, "admin": free, "http": free}}
    sidecar = await Sidecar.start(parse(config, "the test"))
    try:
        yield sidecar
    finally:
        await sidecar.stop()


async def test_a_contradiction_of_dtypes_is_refused_and_shown() -> None:
    """Declared fp16, served bf16: the backend stays down, and `backends show` says both and the way out."""
    async with (
        running_engine(**DUMMY, lora_weights="bf16") as engine,
        unreached(engine, engine={"dtype": "float16"}) as sidecar,
    ):
        await until(lambda: "bfloat16" in sidecar.gateway.backends["trt-0"].detail())
        async with grpc.aio.insecure_channel(sidecar.admin_address) as channel:
            shown = await admin_pb2_grpc.BackendsStub(channel).Get(admin_pb2.BackendRequest(backend="trt-0"))
        assert shown.state == "down"
        assert "declared as float16 and its model takes lora_weights as bfloat16" in shown.detail
        assert "backends[].engine.dtype" in shown.detail
        assert not engine.served


async def test_a_trouble_that_lasts_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """A backend that stays wrong is looked at several times a second; its log line is written once."""
    async with running_engine(**DUMMY, dtype="float32") as engine, unreached(engine) as sidecar:
        endpoint: Any = sidecar.gateway.backends["trt-0"]
        await until(lambda: "float32" in endpoint.detail())
        reached = asyncio.Event()
        config = endpoint._server._probe.config

        async def again() -> Any:
            reached.set()
            return await config()

        endpoint._server._probe.config = again
        await reached.wait()
        reached.clear()
        await reached.wait()
        lines = [record for record in caplog.records if record.name == "sidecar.backends.endpoint"]
        assert len([line for line in lines if "float32" in line.getMessage()]) == 1


async def test_a_backend_that_is_not_there_is_reached_when_it_comes(tmp_path: Path) -> None:
    """Down at first, with its address in the detail; up without help once something listens."""
    async with running_engine(**DUMMY) as engine:
        address = engine.grpc_address
        port = int(address.rsplit(":", 1)[1])
        await engine.stop()
        async with unreached(engine) as sidecar:
            await until(lambda: "does not answer" in sidecar.gateway.backends["trt-0"].detail())
            assert address in sidecar.gateway.backends["trt-0"].detail()
            async with running_engine(**DUMMY, grpc_port=port):
                await until(lambda: sidecar.gateway.state.backends["trt-0"].phase is Phase.UP)
