"""A sidecar in a process of its own, engines that cost next to nothing behind it, and a real Envoy in front."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.processes import Measured, SidecarProcess
from tests.e2e.envoy import variants
from tests.e2e.envoy.server import EnvoyServer
from tests.kit.quick_client import QuickClient
from tests.kit.quick_engine import ENGINE
from tests.kit.serving import write_adapters
from tests.kit.trtllm_emulated import BASE_CONFIG

TELLS_ENGINE = {
    "name": "tells-engine",
    "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.header_mutation.v3.HeaderMutation",
        "mutations": {
            "response_mutations": [{"append": {"header": {"key": ENGINE, "value": "%UPSTREAM_REMOTE_ADDRESS%"}}}]
        },
    },
}
"""A filter that says in a header which engine has answered; an engine's own headers are not its clients'."""
FD = "FULL_DUPLEX_STREAMED"


@dataclass(frozen=True)
class Gateway:
    """How Envoy is set: its modes of requests and answers, what the listener needs, and further changes."""

    request_mode: str = FD
    response_mode: str = "STREAMED"
    listener: tuple[tuple[str, Any], ...] = ()
    changed: Callable[[Sequence[str]], variants.Change] = lambda engines: lambda record: None


GATEWAYS = {
    "lane": Gateway(),
    "istio": Gateway(FD, FD, changed=variants.istio),
    "ai-gateway": Gateway("BUFFERED", "BUFFERED", (("override_mode", True),), lambda _: variants.ai_gateway),
    "agentgateway": Gateway(FD, FD, changed=lambda _: variants.agentgateway),
}


@dataclass
class QuickHouse:
    """All of it."""

    engines: Sequence[Measured]
    sidecar: SidecarProcess
    envoy: EnvoyServer
    names: Sequence[str]

    @property
    def addresses(self) -> list[str]:
        """Those of the engines."""
        return [str(engine.ready["http"]) for engine in self.engines]

    def client(self) -> QuickClient:
        """Return a client of Envoy's."""
        return QuickClient(self.envoy.address)

    async def running(self) -> int:
        """Return how many requests have a seat."""
        samples = await self.sidecar.metrics()
        return int(sum(value for (name, _), value in samples.items() if name == "running_requests"))

    async def waiting(self) -> int:
        """Return how many requests wait in the sidecar."""
        samples = await self.sidecar.metrics()
        return int(sum(value for (name, _), value in samples.items() if name == "queued_requests"))


@asynccontextmanager
async def quick_house(
    folder: Path,
    gateway: Gateway | str = "lane",
    hosts: Sequence[str] = ("127.0.0.1",),
    adapters: int = 1,
    seats: int = 4096,
    changed: variants.Change = lambda record: None,
    **settings: Any,
) -> AsyncIterator[QuickHouse]:
    """Run it, with an engine on each of `hosts`. `changed` changes Envoy's bootstrap after what the gateway does."""
    chosen = GATEWAYS[gateway] if isinstance(gateway, str) else gateway
    names = write_adapters(folder / "adapters", adapters)
    (folder / "shared").mkdir()
    base = folder / "base.json"
    base.write_text(json.dumps(BASE_CONFIG))
    async with AsyncExitStack() as stack:
        running = [await stack.enter_async_context(Measured("-m", "tests.kit.quick_engine", host)) for host in hosts]
        addresses = [str(engine.ready["http"]) for engine in running]
        common = {
            "adapters_dir": str(folder / "shared"),
            "engine": {"seats": seats},
            "base_model": {"name": "tiny-llama", "config": str(base)},
        }
        backends = [
            {"url": f"vllm://{address}", "id": f"vllm-{number}", **common} for number, address in enumerate(addresses)
        ]
        free = {"address": "127.0.0.1:0"}
        listeners = {"data": free, "admin": free, "http": free, "endpoint_picker": free | dict(chosen.listener)}
        settings = {"listeners": listeners, "adapters": {"serve": str(folder / "adapters")}} | settings
        backends = settings.pop("backends", backends)
        sidecar = await stack.enter_async_context(SidecarProcess(folder, backends, **settings))

        def change(record: dict[str, Any]) -> None:
            chosen.changed(addresses)(record)
            changed(record)
            variants.manager_of(record)["http_filters"].insert(0, TELLS_ENGINE)

        envoy = EnvoyServer(
            folder / "envoy", sidecar.endpoint_picker, chosen.request_mode, chosen.response_mode, change
        )
        yield QuickHouse(running, sidecar, await stack.enter_async_context(envoy), names)
