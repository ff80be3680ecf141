"""One suite over every kind of backend in the registry.

A kind that is added to the registry is picked up by its line; its engine is added to `ENGINES`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from sidecar.backends import registry
from sidecar.backends.kind import Kind, Wiring
from sidecar.backends.registry import KINDS, kind_named
from sidecar.backends.triton.loads import LoaderProcess
from sidecar.proto import admin_pb2
from tests.conformance.kinds import LIVE, RECORD, Stage
from tests.kit.emulated import start_engine
from tests.kit.peft_files import BASE_MODEL, write_adapter
from tests.kit.ports import free_port
from tests.kit.serving import serving, until
from tests.kit.sglang_emulated import sglang_entry, start_sglang
from tests.kit.trtllm_emulated import BASE_CONFIG, start_trtllm
from tests.kit.vllm_emulated import start_vllm

NAMES = tuple(KINDS)
SLOTS = 2
SOON = {"progress_timeout_s": 2.0}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", RECORD, ids=lambda check: check.__name__)
def test_record(name: str, check: Callable[[Kind], None]) -> None:
    """Every kind's record keeps every check."""
    check(kind_named(name))


# The engines. Each has one seat and two slots.


class Emulated:
    """An emulated engine in this event loop, on one port."""

    slots = SLOTS

    def __init__(self, start: Callable[..., Awaitable[Any]], record: dict[str, Any], **options: Any) -> None:
        self.record = record | SOON
        self._start = start
        self._options = options
        self._server: Any = None

    async def start(self) -> None:
        self._server = await self._start(compute="none", seats=1, **self._options)

    async def kill(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            await server.stop()

    def running(self) -> int:
        return 0 if self._server is None else self._server.engine.counters.active


def triton(shared: Path) -> Emulated:
    port = free_port()
    record = {"url": f"triton://127.0.0.1:{port}", "weights_transport": "grpc"}
    return Emulated(start_engine, record, grpc_port=port, lora_host_pages=SLOTS, lora_device_pages=SLOTS)


def triton_llmapi(shared: Path) -> Emulated:
    port = free_port()
    record = {"url": f"triton://127.0.0.1:{port}", "adapters_dir": str(shared)}
    return Emulated(start_engine, record, grpc_port=port, protocol="llmapi", lora_host_pages=SLOTS)


def trtllm(shared: Path) -> Emulated:
    port = free_port()
    base = shared.parent / "base.json"
    base.write_text(json.dumps(BASE_CONFIG))
    record = {
        "url": f"trtllm://127.0.0.1:{port}",
        "adapters_dir": str(shared),
        "base_model": {"name": "base", "aliases": [BASE_MODEL], "config": str(base)},
        "lora_config": {"max_loras": SLOTS, "max_cpu_loras": 2 * SLOTS, "lora_target_modules": ["attn_q", "attn_v"]},
    }
    return Emulated(start_trtllm, record, http_port=port, max_loras=SLOTS, max_cpu_loras=2 * SLOTS)


def vllm(shared: Path) -> Emulated:
    port = free_port()
    record = {"url": f"vllm://127.0.0.1:{port}", "adapters_dir": str(shared)}
    return Emulated(start_vllm, record, http_port=port, max_loras=SLOTS, max_cpu_loras=SLOTS)


def sglang(shared: Path, adapters_dir: Path | None = None) -> Emulated:
    port = free_port()
    record = sglang_entry(shared.parent) | {"url": f"sglang://127.0.0.1:{port}"}
    if adapters_dir is not None:
        record["adapters_dir"] = str(adapters_dir)
    return Emulated(start_sglang, record, http_port=port, max_loras=SLOTS + 1, max_cpu_loras=2 * SLOTS)


ENGINES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "triton": ("triton", triton),
    "triton_llmapi": ("triton", triton_llmapi),
    "trtllm": ("trtllm", trtllm),
    "vllm": ("vllm", vllm),
    "sglang": ("sglang", sglang),
    "sglang by files": ("sglang", lambda shared: sglang(shared, shared)),
}
"""By the name of the model: its kind, and what makes its engine, given the folder that is shared with it."""


def test_every_model_has_an_engine() -> None:
    """A kind without an engine here would pass the live checks unseen."""
    assert set(registry.models()) == {name.partition(" ")[0] for name in ENGINES}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [write_adapter(folder / f"a{seed}", seed=seed) for seed in range(SLOTS + 2)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def loader() -> AsyncIterator[LoaderProcess]:
    loader = LoaderProcess()
    yield loader
    await loader.close()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("model", ENGINES)
@pytest.mark.parametrize("check", LIVE, ids=lambda check: check.__name__)
async def test_live(
    model: str,
    check: Callable[[Stage], Awaitable[None]],
    adapters: list[Path],
    loader: LoaderProcess,
    tmp_path: Path,
) -> None:
    """Every kind's backends keep every check, in front of an engine for each model that the kind has."""
    name, make_engine = ENGINES[model]
    await check(Stage(kind_named(name), make_engine(tmp_path / "shared"), adapters, Wiring(loader)))


@pytest.mark.parametrize("model", ENGINES)
async def test_pickers_read_adapters_by_their_clients_names(model: str, adapters: list[Path], tmp_path: Path) -> None:
    """Every kind's engines tell what they have under vLLM's names, whatever an engine itself calls an adapter."""
    engine = ENGINES[model][1](tmp_path / "shared")
    await engine.start()
    try:
        async with (
            serving([], adapters[0].parent, backends=[engine.record | {"id": "engine"}]) as served,
            httpx.AsyncClient() as http,
        ):
            await served.adapters.Prefetch(admin_pb2.PrefetchRequest(name="a0", backends=["engine"]))
            await until(lambda: len(served.state.backends["engine"].shadow.host.held) == 1)
            page = (await http.get(f"http://{served.sidecar.http_address}/metrics/model-server")).text
    finally:
        await engine.kill()
    families = {family.name: family for family in text_string_to_metric_families(page)}
    [resident] = families["vllm:lora_adapter_loaded"].samples
    assert {name: resident.labels[name] for name in ("engine", "adapter_name", "level", "pinned")} == {
        "engine": "engine", "adapter_name": "a0", "level": "gpu", "pinned": "false",
    }  # fmt: skip
    assert {sample.value for sample in families["vllm:max_gpu_lora_adapters"].samples} <= {engine.slots}
    loads = {sample.name: sample.value for sample in families["vllm:lora_adapter_load_seconds"].samples}
    assert loads["vllm:lora_adapter_load_seconds_count"] == 1
