"""Bytes between the sidecar and an engine: of a request whose adapter is there, beside the adapter's weights."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

from tests.bench import clients
from tests.bench.figures import Figure
from tests.bench.forwarder import Forwarder
from tests.bench.large import FORTY_MB, engine_options
from tests.bench.processes import SidecarProcess, backend_of
from tests.kit.emulated import EngineProcess

REQUESTS = 100
GOAL_BYTES = 4096


async def bench(folder: Path) -> list[Figure]:
    FORTY_MB.write(folder / "adapters" / "large", 0)
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(EngineProcess(*engine_options()))
        forwarder = await stack.enter_async_context(Forwarder(engine.grpc_address))
        backend = {**backend_of(engine), "url": f"triton://{forwarder.address}"}
        served = {"serve": str(folder / "adapters")}
        sidecar = await stack.enter_async_context(SidecarProcess(folder, [backend], adapters=served))
        channel = await stack.enter_async_context(clients.open_channel(sidecar.data))
        stream = clients.open_stream(channel)
        stack.callback(stream.cancel)
        before_bytes = forwarder.sent_bytes
        await clients.ask(stream, clients.named_request("large", 1))
        loaded_bytes = forwarder.sent_bytes
        await clients.ask_many(stream, clients.named_request("large", 1), REQUESTS)
        hot_bytes = (forwarder.sent_bytes - loaded_bytes) / REQUESTS
    weights = float(FORTY_MB.size_bytes)
    return [
        Figure("wire: first request", loaded_bytes - before_bytes, "bytes", weights, "its weights"),
        Figure(
            "wire: hot request", hot_bytes, "bytes", weights, "its weights", "value", GOAL_BYTES,
            "sent to the engine, its headers and the sidecar's own probes included",
        ),
    ]  # fmt: skip
