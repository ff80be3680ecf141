"""With `hide_backend` no client learns an engine's id, its address or its configuration, however a request ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from sidecar.backends.api import HttpRejection, Weights
from sidecar.core.effects import Load
from sidecar.core.enums import Fault, Phase
from sidecar.core.events import LoadFailed
from sidecar.proto import admin_pb2, gateway_pb2
from tests.kit.emulated import EngineProcess, core_request
from tests.kit.openai_house import ScriptedVllm, event, house
from tests.kit.peft_files import write_adapter
from tests.kit.ports import free_port
from tests.kit.serving import Serving, serving, until, write_adapters

ENGINES = ("gpu-secret-1", "gpu-secret-2")
DEADLY, UNARY = "a01", 1
OPTIONS = ("--compute", "none", "--max-seq-tokens", "1000000", "--kv-blocks", "1000000", "--crash-on-load", DEADLY)
LONG = 900_000
TOKENS = gateway_pb2.TokenIds(ids=[1, 2, 3])
KEYS = ("backends[]", "engine.")


async def all_of(call: Any) -> str:
    """Return all that a gRPC call tells its client, its trailing metadata in plain words."""
    told: list[Any] = []
    try:
        if hasattr(call, "__aiter__"):
            told += [repr(message) async for message in call]
        else:
            told.append(repr(await call))
    except grpc.aio.AioRpcError as error:
        told += [error.code(), error.details(), repr(error.trailing_metadata())]
    return repr(told)


@dataclass
class Clients:
    """A client of each front; each returns all that it was told."""

    served: Serving
    http: httpx.AsyncClient

    async def post(self, path: str, **body: Any) -> str:
        response = await self.http.post(path, json=body)
        return f"{response.status_code} {response.headers} {response.text}"

    def requests(self, name: str, tokens: int, **headers: str) -> list[Awaitable[str]]:
        """Return the same request for each front, in each of its forms."""
        metadata = tuple(headers.items())
        generate = gateway_pb2.GenerateRequest(adapter=name, tokens=TOKENS, max_tokens=tokens)
        kserve: Any = service_pb2_grpc.GRPCInferenceServiceStub(self.served.channel)
        streamed = core_request(tokens=tokens, streaming=True, lora_name=name)
        body = {"model": name, "prompt": "hello", "max_tokens": tokens}
        return [
            all_of(self.served.gateway.Generate(generate, metadata=metadata)),
            all_of(kserve.ModelInfer(core_request(tokens=tokens, lora_name=name), metadata=metadata)),
            all_of(kserve.ModelStreamInfer(iter([streamed]), metadata=metadata)),
            all_of(kserve.ModelStreamInfer(iter([streamed]), metadata=(*metadata, ("triton_grpc_error", "true")))),
            self._posted(body, headers),
            self._posted(body | {"stream": True}, headers),
        ]

    async def _posted(self, body: dict[str, Any], headers: dict[str, str]) -> str:
        headers = {f"x-{name}": value for name, value in headers.items()}
        response = await self.http.post("/v1/completions", json=body, headers=headers)
        return f"{response.status_code} {response.headers} {response.text}"

    def verbs(self) -> list[Awaitable[str]]:
        kserve: Any = service_pb2_grpc.GRPCInferenceServiceStub(self.served.channel)
        return [
            all_of(kserve.ModelConfig(service_pb2.ModelConfigRequest(name="none"))),
            all_of(kserve.ModelMetadata(service_pb2.ModelMetadataRequest(name="none"))),
            all_of(kserve.ModelStatistics(service_pb2.ModelStatisticsRequest(name="none"))),
            all_of(kserve.RepositoryIndex(service_pb2.RepositoryIndexRequest())),
            all_of(kserve.SystemSharedMemoryStatus(service_pb2.SystemSharedMemoryStatusRequest(name="none"))),
            all_of(kserve.ServerMetadata(service_pb2.ServerMetadataRequest())),
        ]


@asynccontextmanager
async def clients_of(folder: Path, engines: list[EngineProcess], hide: bool) -> AsyncIterator[Clients]:
    write_adapters(folder, 2)
    entries = [
        {
            "id": name,
            "url": f"triton://{engine.grpc_address}",
            "metrics": f"http://{engine.metrics_address}/metrics",
        }
        for name, engine in zip(ENGINES, engines, strict=True)
    ]
    file = folder.parent / "config.json"
    record: dict[str, Any] = {"backends": entries, "hide_backend": hide}
    async with (
        serving(engines, folder, file=file, **record) as served,
        httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}", timeout=60, trust_env=False) as http,
    ):
        yield Clients(served, http)


async def told_of_everything(clients: Clients) -> list[str]:
    """Return what clients are told while requests end in as many ways as there are."""
    served, told = clients.served, []
    told.append(await clients.post("/v1/chat/completions", model="a00", messages=[{"role": "user", "content": "x"}]))
    unknown = gateway_pb2.GenerateRequest(tokens=gateway_pb2.TokenIds(ids=[1_000_000]), max_tokens=1)
    told.append(await all_of(served.gateway.Generate(unknown)))  # the engine refuses it
    told += await asyncio.gather(*clients.verbs())
    running = [asyncio.ensure_future(one) for one in clients.requests("a00", LONG)]
    told.append(await running.pop(UNARY))  # which the engine refuses, as it streams
    await until(lambda: all(ticket.tokens for ticket in served.sidecar.gateway.tickets.values()))
    told += await asyncio.gather(*clients.requests("a00", LONG, **{"lora-deadline-ms": "1"}))
    told += await asyncio.gather(*clients.requests(DEADLY, 2))  # both engines die of it, and what they run is lost
    told += await asyncio.gather(*running, *clients.verbs())
    await until(lambda: all(backend.phase is Phase.DOWN for backend in served.state.backends.values()))
    told += await asyncio.gather(*clients.verbs())
    told += await asyncio.gather(*clients.requests("a00", 2, **{"lora-deadline-ms": "50"}))
    for name in ENGINES:
        await served.backends.Drain(admin_pb2.BackendRequest(backend=name))
    told += await asyncio.gather(*clients.requests("a00", 2, **{"lora-deadline-ms": "50"}))
    return told


@pytest.mark.parametrize("hide", [True, False])
async def test_no_answer_names_an_engine(tmp_path: Path, hide: bool) -> None:
    """Of refusals, failures, engines' own errors and lost engines, by every front; without the option, many do."""
    folder = tmp_path / "served"
    folder.mkdir()
    async with EngineProcess(*OPTIONS, time_scale=0.2) as one, EngineProcess(*OPTIONS, time_scale=0.2) as two:
        engines = [one, two]
        addresses = [address for engine in engines for address in (engine.grpc_address, engine.metrics_address)]
        async with clients_of(folder, engines, hide) as clients:
            told = await told_of_everything(clients)
    words = (*ENGINES, *addresses, *KEYS)
    naming = [each for each in told if any(word in each for word in words)]
    assert not (hide and naming), json.dumps(naming, indent=1)
    assert hide or len(naming) > 10


@pytest.mark.parametrize("hide", [True, False])
async def test_an_engine_that_is_removed_stays_unnamed(tmp_path: Path, hide: bool) -> None:
    """Also one that tells of itself; what is not an engine's name is told as it is."""
    engine = ScriptedVllm("gpu-1")
    engine.address = "vllm-0.engines.svc:8000"
    async with house(tmp_path, [engine], hide_backend=hide) as served:
        sent = b'data: {"choices":[{"text":"gpu-1"}]}\n\n'

        async def ask(**more: Any) -> httpx.Response:
            return await served.client.post("/v1/completions", json={"model": "base", "prompt": "x", **more})

        own = b'{"error": {"message": "vllm-0.engines.svc: CUDA error at gpu-1; 10.1.2.3:8000", "type": "gpu-1x"}}'
        asking = asyncio.ensure_future(ask())
        await engine.running_are(1)
        engine.fail(Fault.REJECTED, "x", HttpRejection(400, own))
        error = (await asking).json()["error"]
        hidden = "an engine: CUDA error at an engine; an engine"
        assert error["message"] == (hidden if hide else "vllm-0.engines.svc: CUDA error at gpu-1; 10.1.2.3:8000")
        assert error["type"] == "gpu-1x"
        asking = asyncio.ensure_future(ask(stream=True))
        await engine.running_are(1)
        engine.deliver(sent)
        await until(lambda: all(not ticket.replies for ticket in served.gateway.tickets.values()))
        await served.gateway.remove_backend("gpu-1", "it has gone")
        answer = (await asking).text
        assert answer.startswith(sent.decode())
        last = json.loads(answer.removeprefix(sent.decode()).removeprefix("data: "))["error"]["message"]
        assert ("gpu-1" in last) is not hide
        assert ("an engine was lost after the first token" in last) is hide


LAST_WORDS = "Worker 3 failed (/opt/engine/run.py); see it; a request visits at most 9 (CUDA error"


class Refusing(ScriptedVllm):
    """A backend that takes no adapter, and says why."""

    def load(self, effect: Load, weights: Weights) -> None:
        weights.release()
        self._post(LoadFailed(effect.load, Fault.REJECTED, LAST_WORDS))


@pytest.mark.parametrize("hide", [True, False])
async def test_what_engines_say_when_they_fail_is_for_operators(tmp_path: Path, hide: bool) -> None:
    """Of a load, of a request that is sent again in vain, and of one that has begun; the first time and later."""
    engine, told = ScriptedVllm("gpu-1"), []
    async with house(tmp_path, [engine], hide_backend=hide) as served:

        async def ask(model: str, **more: Any) -> str:
            body = {"model": model, "prompt": "x", **more}
            return (await served.client.post("/v1/completions", json=body)).text

        for fault, tries in ((Fault.WHOLE_ENGINE, 2), (Fault.LOST, 2)):
            asking = asyncio.ensure_future(ask("base"))
            for _ in range(tries):
                await engine.running_are(1)
                engine.fail(fault, LAST_WORDS)
            told.append(await asking)
        asking = asyncio.ensure_future(ask("base", stream=True))
        await engine.running_are(1)
        engine.deliver(b'data: {"choices":[{"text":"x"}]}\n\n')
        await until(lambda: all(not ticket.replies for ticket in served.gateway.tickets.values()))
        engine.fail(Fault.REJECTED, LAST_WORDS, tokens=1)
        told.append(await asking)
        await served.register("deadly")
        asking = asyncio.ensure_future(ask("deadly"))
        await engine.running_are(1)
        engine.fail(Fault.DEADLY, LAST_WORDS)
        told += [await asking, await ask("deadly")]
    async with house(tmp_path, [Refusing("gpu-1")], hide_backend=hide) as served:
        await served.register("sql")
        told += [await ask("sql"), await ask("sql")]
    for text in told:
        assert ("gpu-1" not in text and "Worker" not in text and "CUDA" not in text) is hide, text


@pytest.mark.parametrize("kept", ["nothing", "hide_backend", "identity"])
async def test_what_a_client_reads_of_readiness_without_a_credential(tmp_path: Path, kept: str) -> None:
    """No engine where identity is enforced or engines are hidden; operators read of it at the listener for probes."""
    (tmp_path / "keys.yaml").write_text("[]\n")
    enforced = {"identity": {"mode": "enforce", "keys_file": str(tmp_path / "keys.yaml")}}
    more: dict[str, Any] = {"nothing": {}, "hide_backend": {"hide_backend": True}, "identity": enforced}[kept]
    free = {"address": "127.0.0.1:0"}
    listeners = dict.fromkeys(("data", "admin", "http", "probes"), free)
    backends = [{"id": ENGINES[0], "url": f"triton://127.0.0.1:{free_port()}"}]
    async with (
        serving([], backends=backends, listeners=listeners, until_up=False, **more) as served,
        httpx.AsyncClient(trust_env=False) as http,
    ):
        told = {}
        for place in (served.sidecar.http_address, served.sidecar.listening.probes):
            answer = await http.get(f"http://{place}/readyz")
            assert answer.status_code == 503
            told[place] = answer.text
        of_http, of_probes = told.values()
        assert ENGINES[0] in of_probes
        assert (ENGINES[0] in of_http) is (kept == "nothing")
        for path in ("/health", "/metrics", "/metrics/model-server", "/v1/models", "/openapi.json", "/v2/models/stats"):
            told[path] = (await http.get(f"http://{served.sidecar.http_address}{path}")).text
            assert kept == "nothing" or ENGINES[0] not in told[path]
        assert (ENGINES[0] in told["/metrics"]) is (kept == "nothing")


@pytest.mark.parametrize("fault", [Fault.WHOLE_ENGINE, Fault.LOST, Fault.DEADLY])
async def test_load_calls_tell_nothing_of_an_engine_that_fails(tmp_path: Path, fault: Fault) -> None:
    """Whoever loads an adapter hears what an engine says of the adapter, and not how it died."""
    engine = ScriptedVllm(ENGINES[0])
    loads = {"openai": {"load_calls": True}, "adapters": {"roots": [str(tmp_path)]}}
    async with house(tmp_path, [engine], hide_backend=True, **loads) as served:
        path = write_adapter(tmp_path / "new", seed=1)
        body = {"lora_name": "new", "lora_path": str(path)}
        asking = asyncio.ensure_future(served.client.post("/v1/load_lora_adapter", json=body))
        while not asking.done():
            await until(lambda: bool(engine.running) or asking.done())
            if engine.running:
                engine.fail(fault, f"{ENGINES[0]}: Worker 3 (/opt/run.py) met a CUDA error; a request visits at most 9")
        told = (await asking).text
    assert '"error"' in told
    assert not [word for word in (*ENGINES, "Worker 3", "/opt", "CUDA") if word in told], told


@pytest.mark.parametrize(
    "error",
    [
        b'{"object":"error","message":"CUDA at gpu-secret-1 10.1.2.3:8000","code":400}',
        b'{ "error": {"message": "CUDA at gpu-secret-1 10.1.2.3:8000"}}',
        b'{"error": {"message": "CUDA at gpu-secret-1 10.1.2.3:8000"}}',
        b"CUDA at gpu-secret-1 10.1.2.3",
    ],
)
async def test_the_error_that_ends_a_stream_names_no_engine_in_any_form(tmp_path: Path, error: bytes) -> None:
    """Of two prompts one has begun to answer, and the engine rejects the other in words of its own."""
    engine = ScriptedVllm(ENGINES[0])
    async with house(tmp_path, [engine], hide_backend=True) as served:
        body = {"model": "base", "prompt": ["x", "y"], "stream": True}
        asking = asyncio.ensure_future(served.client.post("/v1/completions", json=body))
        await engine.running_are(2)
        engine.deliver(event("x"))
        begun = next(iter(engine.running))
        await until(lambda: served.gateway.tickets[begun].tokens > 0)
        engine.running[begun] = engine.running.pop(begun)  # the other one is failed next
        engine.fail(Fault.REJECTED, "CUDA at gpu-secret-1", HttpRejection(400, error))
        told = (await asking).text
    assert "error" in told
    assert not [word for word in (ENGINES[0], "10.1.2.3") if word in told], told
