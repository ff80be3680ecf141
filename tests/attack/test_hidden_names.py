"""A client cannot tell a name that it may not use from one that does not exist.

Each round makes a random registry, asks for a hidden name in every way that clients have, forgets the name and asks the
same again. What comes back is compared byte for byte, and so is what happens inside.
"""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from sidecar.access.checking import TENANTS as OF_TENANTS
from sidecar.access.principal import Action
from sidecar.proto import admin_pb2, admin_pb2_grpc, gateway_pb2
from sidecar.state.records import Record, added
from tests.integration.test_kserve_verbs import region_of
from tests.kit.emulated import running_engine
from tests.kit.kserve_clients import DUMMY
from tests.kit.registries import adapter, record
from tests.kit.serving import Serving, serving
from tests.kit.tokens import TokenMaker

TENANTS = ("acme", "acme-evil", "blue", "b")
WORDS = ("sql", "sqI", "math", "chat", "s", "sql2")
ID = "the-same-id"
ON_NAMES = [action for action in Action if action not in (*OF_TENANTS, Action.DRAIN)]
VOLATILE = ("date", "x-ratelimit-reset-tokens")


def a_record(rng: random.Random, name: str) -> Record:
    """Return a name with one to three versions, perhaps a canary, labels and an allow list."""
    made = record(name, rng.randrange(1, 1 << 30))
    for _ in range(rng.randrange(3)):
        labels = (("team", rng.choice(WORDS)),) if rng.random() < 0.3 else ()
        made, _ = added(made, name, adapter(rng.randrange(1, 1 << 30)), f"/adapters/{name}", now=2.0, labels=labels)
    if len(made.versions) > 1 and rng.random() < 0.5:
        made = replace(made, canary=(made.versions[0].ordinal, rng.randrange(1, 100)))
    if rng.random() < 0.6:
        made = replace(made, allow=tuple(rng.sample(TENANTS, rng.randrange(1, 3))))
    return made


def a_name(rng: random.Random) -> str:
    word = rng.choice(WORDS)
    return f"{rng.choice(TENANTS)}/{word}" if rng.random() < 0.7 else word


def is_hidden(policy: str, tenant: str, wanted: Record) -> bool:
    """Say by the documented rules, written again here, whether a tenant without roles may use a name."""
    if wanted.allow is not None and tenant not in wanted.allow:
        return True
    return policy != "open" and wanted.allow is None and not wanted.name.startswith(f"{tenant}/")


class Client:
    """One tenant's client of every API."""

    def __init__(self, served: Serving, http: httpx.AsyncClient, authorization: str) -> None:
        self._served = served
        self._http = http
        self._metadata = (("authorization", authorization), ("x-request-id", ID))
        self._headers = {"authorization": authorization, "x-request-id": ID}
        self._kserve: Any = service_pb2_grpc.GRPCInferenceServiceStub(served.channel)
        self._access: Any = admin_pb2_grpc.AccessStub(served.admin_channel)

    async def everything(self, wanted: Record, typo: str) -> list[Any]:
        """Return all that a client can see of a name, in every API."""
        seen: list[Any] = []
        digest = wanted.version.adapter.digest
        for model in (wanted.name, f"{wanted.name}@v1", f"{wanted.name}@v7", f"{wanted.name}@{digest}", typo):
            seen.append(await self._post("/v1/completions", {"model": model, "prompt": "hello", "max_tokens": 2}))
            chat = [{"role": "user", "content": "hello"}]
            seen.append(await self._post("/v1/chat/completions", {"model": model, "messages": chat}))
            seen.append(await self._get(f"/v1/models/{model}"))
            seen.append(await self._generate(model))
            seen += [await self._infer(model), await self._stream(model)]
            seen += await self._asked_as_a_model(model)
            seen += [await self._check(action, model) for action in ON_NAMES]
        index = await self._kserve.RepositoryIndex(service_pb2.RepositoryIndexRequest(), metadata=self._metadata)
        return [*seen, index, await self._get("/v1/models"), await self._get("/v1/models?versions=true")]

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        return _shown(await self._http.post(path, json=body, headers=self._headers))

    async def _get(self, path: str) -> Any:
        return _shown(await self._http.get(path, headers=self._headers))

    async def _generate(self, model: str) -> Any:
        request = gateway_pb2.GenerateRequest(adapter=model, tokens=gateway_pb2.TokenIds(ids=[1, 2]), max_tokens=2)
        try:
            return [answer async for answer in self._served.gateway.Generate(request, metadata=self._metadata)]
        except grpc.aio.AioRpcError as error:
            return _status(error)

    async def _check(self, action: Action, model: str) -> Any:
        request = admin_pb2.CheckRequest(action=action.value, resource=model)
        try:
            return await self._access.Check(request, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            return _status(error)

    def _request(self, model: str) -> Any:
        request = service_pb2.ModelInferRequest(model_name="tensorrt_llm", id="7")
        request.parameters["lora_name"].string_param = model
        for name, values in (("input_ids", [1, 2]), ("input_lengths", [2]), ("request_output_len", [2])):
            tensor = request.inputs.add(name=name, datatype="INT32", shape=[1, len(values)])
            tensor.contents.int_contents.extend(values)
        return request

    async def _asked_as_a_model(self, model: str) -> list[Any]:
        """Ask the verbs that a client of KServe asks about a model."""
        seen = []
        for version in ("", "1"):
            asked = {"name": model, "version": version}
            for call, request in (
                (self._kserve.ModelReady, service_pb2.ModelReadyRequest(**asked)),
                (self._kserve.ModelMetadata, service_pb2.ModelMetadataRequest(**asked)),
            ):
                try:
                    seen.append(await call(request, metadata=self._metadata))
                except grpc.aio.AioRpcError as error:
                    seen.append(_status(error))
        return seen

    async def _infer(self, model: str) -> Any:
        try:
            return await self._kserve.ModelInfer(self._request(model), metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            return _status(error)

    async def _stream(self, model: str) -> Any:
        call = self._kserve.ModelStreamInfer(iter([self._request(model)]), metadata=self._metadata)
        return [message.SerializeToString(deterministic=True) async for message in call]


def _shown(response: httpx.Response) -> Any:
    headers = sorted(item for item in response.headers.multi_items() if item[0] not in VOLATILE)
    return response.status_code, headers, response.content


def _status(error: grpc.aio.AioRpcError) -> Any:
    return error.code(), error.details(), sorted(map(tuple, error.trailing_metadata() or ()))


async def metrics_of(http: httpx.AsyncClient) -> dict[str, float]:
    text = (await http.get("/metrics")).text
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]
    counted = ("_total", "_count", "_bucket")
    return {name: float(value) for name, value in lines if name.partition("{")[0].endswith(counted)}


def moved(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Return the counters that rose, without those that count time."""
    rose = {name: value - before.get(name, 0.0) for name, value in after.items()}
    return {name: by for name, by in rose.items() if by and "requests" in name}


CEDAR = Path(__file__).parents[2] / "examples" / "access" / "tenant_prefix.cedar"


@pytest.mark.parametrize("policy", ["open", "tenant_prefix", "cedar"])
@pytest.mark.parametrize("rounds", [6, pytest.param(400, marks=pytest.mark.slow)])
async def test_a_hidden_name_looks_like_none(tmp_path: Path, policy: str, rounds: int) -> None:
    seed = time.time_ns() % 1_000_000
    rng = random.Random(seed)
    maker = TokenMaker(tmp_path)
    settings = {
        "identity": {"mode": "enforce", "issuers": [maker.entry]},
        "access": {"policies": {"cedar": str(CEDAR)} if policy == "cedar" else {"ready": policy}},
        "listeners": {name: {"address": "127.0.0.1:0"} for name in ("data", "admin", "http", "probes")},
    }
    compared = 0
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], **settings) as served,
        httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}", trust_env=False, timeout=60) as http,
        httpx.AsyncClient(base_url=f"http://{served.sidecar.listening.probes}", trust_env=False, timeout=60) as probes,
    ):
        for page in ("/metrics", "/metrics/model-server"):  # they name adapters and tenants
            assert (await http.get(page)).status_code == 404
        registry = served.sidecar.registry
        while compared < rounds:
            names = {a_name(rng) for _ in range(rng.randrange(1, 6))}
            records = [a_record(rng, name) for name in sorted(names)]
            for each in records:
                await registry.put(each, None)
            tenant = rng.choice(TENANTS)
            hidden = [each for each in records if is_hidden(policy, tenant, each)]
            if hidden:
                wanted = rng.choice(hidden)
                typo = rng.choice([name for letter in "lx1" if (name := wanted.name[:-1] + letter) not in names])
                client = Client(served, http, maker.bearer(tenant))
                told, inside = [], []
                for _ in range(2):
                    served.recorder.events.clear()
                    served.recorder.effects.clear()
                    counted = await metrics_of(probes)
                    told.append(await client.everything(wanted, typo))
                    rose = moved(counted, await metrics_of(probes))
                    happened = [type(event).__name__ for event in served.recorder.events if "Received" in repr(event)]
                    inside.append((happened, served.recorder.effects.copy(), rose))
                    if registry.get(wanted.name) is not None:
                        await registry.delete(wanted.name, wanted)
                        records.remove(wanted)
                assert told[0][0][0] == 404
                assert b"unknown or not permitted" in told[0][0][2]
                assert told[0][3][0] is grpc.StatusCode.NOT_FOUND
                for one, other in zip(*told, strict=True):
                    assert one == other, f"seed {seed}"
                assert [each[0] for each in inside] == [inside[0][0]] * 2, f"seed {seed}"
                assert inside[0][2] == inside[1][2], f"seed {seed}"
                compared += 1
            for each in records:
                await registry.delete(each.name, each)
    print(f"{compared} hidden names under {policy} look like none (seed {seed})")


async def test_a_base_model_that_may_not_be_used_looks_like_none(tmp_path: Path) -> None:
    """Its own name, in each protocol, for requests that would be served and for ones that could not be."""
    maker = TokenMaker(tmp_path)
    rules = tmp_path / "adapters_only.cedar"
    rules.write_text('permit (principal, action in Action::"use", resource) when { resource is Adapter };')
    settings = {
        "identity": {"mode": "enforce", "issuers": [maker.entry]},
        "access": {"policies": {"cedar": str(rules)}},
        "backend": {"base_model": {"name": "org/base"}},
    }
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], **settings) as served,
        httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}", trust_env=False, timeout=60) as http,
    ):
        client = Client(served, http, maker.bearer("blue"))
        told = []
        for name in ("org/base", "org/none"):
            seen: list[Any] = [await client._generate(name), await client._infer(name), await client._stream(name)]
            seen.append(await client._get(f"/v1/models/{name}"))
            seen += await client._asked_as_a_model(name)
            for body in ({"prompt": "hello"}, {"prompt": [1, 2]}, {"prompt": "hello", "n": 2}):
                seen.append(await client._post("/v1/completions", {"model": name, "max_tokens": 2, **body}))
            for fields in ({"tokens": gateway_pb2.TokenIds(ids=[1]), "stop_words": ["x"]}, {"text": ""}):
                request = gateway_pb2.GenerateRequest(adapter=name, max_tokens=2, **fields)
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    _ = [answer async for answer in served.gateway.Generate(request, metadata=client._metadata)]
                seen.append(_status(refused.value))
            told.append(repr(seen).replace(name, "NAME"))
        assert told[0] == told[1]
        assert "NOT_FOUND" in told[0]


def a_request(name: str = "", task_id: int | None = None, region: str = "") -> Any:
    """Return a request with a name or an old task id, whose prompt may lie in a region."""
    request = service_pb2.ModelInferRequest(model_name="tensorrt_llm", id="7")
    if name:
        request.parameters["lora_name"].string_param = name
    for tensor_name, values in (("input_ids", [1, 2]), ("input_lengths", [2]), ("request_output_len", [2])):
        tensor = request.inputs.add(name=tensor_name, datatype="INT32", shape=[1, len(values)])
        if region and tensor_name == "input_ids":
            tensor.parameters["shared_memory_region"].string_param = region
            tensor.parameters["shared_memory_byte_size"].int64_param = 8
        else:
            tensor.contents.int_contents.extend(values)
    if task_id is not None:
        tensor = request.inputs.add(name="lora_task_id", datatype="UINT64", shape=[1, 1])
        tensor.contents.uint64_contents.append(task_id)
    tensor = request.inputs.add(name="streaming", datatype="BOOL", shape=[1, 1])
    tensor.contents.bool_contents.append(True)
    return request


async def told_of(served: Serving, metadata: Any, *requests: Any) -> list[Any]:
    """Return what a client of KServe gets for requests, by each verb."""
    kserve: Any = service_pb2_grpc.GRPCInferenceServiceStub(served.channel)
    seen: list[Any] = []
    for request in requests:
        call = kserve.ModelStreamInfer(iter([request]), metadata=metadata)
        seen.append([message.SerializeToString(deterministic=True) async for message in call])
        try:
            seen.append(await kserve.ModelInfer(request, metadata=metadata))
        except grpc.aio.AioRpcError as error:
            seen.append(_status(error))
    return seen


@pytest.mark.parametrize("policy", ["open", "tenant_prefix"])
@pytest.mark.parametrize("mode", ["off", "enforce"])
async def test_an_old_task_id_does_not_tell_the_name_that_it_means(tmp_path: Path, policy: str, mode: str) -> None:
    """It is refused alike whether its name is hidden or does not exist; neither answer has the name."""
    maker = TokenMaker(tmp_path)
    secret = replace(record("acme/secret", 5), allow=("acme",))
    settings = {
        "identity": {"mode": mode, "issuers": [maker.entry]},
        "access": {"policies": {"ready": policy}},
        "legacy_task_ids": {7: "acme/secret"},
    }
    async with running_engine(**DUMMY) as engine, serving([engine], **settings) as served:
        metadata = (("authorization", maker.bearer("blue")), ("lora-tenant", "blue"), ("x-request-id", ID))
        registry = served.sidecar.registry
        told = []
        await registry.put(secret, None)
        told.append(await told_of(served, metadata, a_request(task_id=7)))
        await registry.delete(secret.name, secret)
        told.append(await told_of(served, metadata, a_request(task_id=7)))
    assert told[0] == told[1]
    assert b'adapter "lora_task_id 7" is unknown or not permitted' in told[0][0][0]
    assert b"secret" not in repr(told).encode()


async def test_a_region_of_another_tenant_looks_like_none(tmp_path: Path) -> None:
    """In a request that would be served, in one with an unknown adapter, and when one asks for it by its name."""
    maker = TokenMaker(tmp_path)
    settings = {"identity": {"mode": "enforce", "issuers": [maker.entry]}}
    async with running_engine(**DUMMY) as engine, serving([engine], **settings) as served:
        blue, red = ((("authorization", maker.bearer(tenant)), ("x-request-id", ID)) for tenant in ("blue", "red"))
        kserve: Any = service_pb2_grpc.GRPCInferenceServiceStub(served.channel)
        name = "a-region-with-a-name-that-is-longer-than-messages-show-of-others'-words-" + "x" * 100

        async def everything() -> list[Any]:
            requests = (a_request(region=name), a_request("nothing", region=name))
            seen = await told_of(served, red, *requests)
            try:
                seen.append(await kserve.SystemSharedMemoryStatus(asked, metadata=red))
            except grpc.aio.AioRpcError as error:
                seen.append(_status(error))
            forget = service_pb2.SystemSharedMemoryUnregisterRequest(name=name)
            seen.append(await kserve.SystemSharedMemoryUnregister(forget, metadata=red))
            return seen

        asked = service_pb2.SystemSharedMemoryStatusRequest(name=name)
        none = await everything()
        with region_of(np.array([1, 2], np.int32)) as memory:
            wanted = service_pb2.SystemSharedMemoryRegisterRequest(name=name, key=memory.name, byte_size=8)
            await kserve.SystemSharedMemoryRegister(wanted, metadata=blue)
            assert list((await kserve.SystemSharedMemoryStatus(asked, metadata=blue)).regions) == [name]
            assert await everything() == none
            served_streams = await told_of(served, blue, a_request(region=name))
            assert b"Unable to find" not in served_streams[0][0]
    assert f"Unable to find shared memory region: '{name}'".encode() in none[0][0]
    assert none[-2][0] is grpc.StatusCode.NOT_FOUND


async def test_the_id_of_a_key_of_another_tenant_looks_like_none(tmp_path: Path) -> None:
    maker = TokenMaker(tmp_path)
    settings = {"identity": {"mode": "enforce", "issuers": [maker.entry]}, "data_directory": str(tmp_path / "data")}
    async with running_engine(**DUMMY) as engine, serving([engine], **settings) as served:
        access: Any = admin_pb2_grpc.AccessStub(served.admin_channel)
        made = await access.CreateKey(admin_pb2.CreateKeyRequest(tenant="blue"))
        told = []
        for key_id in (made.key.id, made.secret, "000000000000"):
            request = admin_pb2.RevokeKeyRequest(id=key_id)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await access.RevokeKey(request, metadata=(("authorization", maker.bearer("red")), ("x-request-id", ID)))
            told.append(_status(refused.value))
    assert told == [told[0]] * 3
    assert told[0][0] is grpc.StatusCode.PERMISSION_DENIED
