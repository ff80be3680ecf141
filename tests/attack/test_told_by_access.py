"""What tenants could learn or gain beyond what they may: by watching, by errors, by the keys that they make."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
import yaml
from tritonclient.grpc import service_pb2_grpc

from sidecar.proto import admin_pb2 as pb
from sidecar.proto import admin_pb2_grpc, gateway_pb2
from sidecar.shell.catalogue import Wanted
from tests.integration.test_access_matrix import kserve_request, read_until
from tests.kit.emulated import running_engine
from tests.kit.faults import ENDLESS
from tests.kit.kserve_clients import DUMMY
from tests.kit.peft_files import write_adapter
from tests.kit.serving import Serving, serving, until

OPERATOR = "operators-key-in-clear-text"
Metadata = tuple[tuple[str, str], ...]


def key_of(tenant: str) -> str:
    return f"key-of-{tenant}-in-clear-text"


def metadata_of(key: str) -> Metadata:
    return (("authorization", f"Bearer {key}"),)


ACME, BLUE, OPS = (metadata_of(key) for key in (key_of("acme"), key_of("blue"), OPERATOR))


def access_of(folder: Path, **policies: Any) -> dict[str, Any]:
    keys = [{"tenant": tenant, "key": key_of(tenant)} for tenant in ("acme", "blue")]
    keys.append({"tenant": "ops", "key": OPERATOR, "roles": ["operator"]})
    (folder / "keys.yaml").write_text(yaml.safe_dump(keys))
    identity = {"mode": "enforce", "keys_file": str(folder / "keys.yaml")}
    return {"identity": identity, "access": {"policies": policies}}


def stub_of(served: Serving, service: str) -> Any:
    return getattr(admin_pb2_grpc, f"{service}Stub")(served.admin_channel)


async def error_of(call: Any) -> str:
    """Return an error's code and text, "" if there is none."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return f"{error.code().name}: {error.details()}"
    return ""


async def generated(served: Serving, metadata: Metadata, adapter: str = "", tokens: int = 1) -> str:
    asked = gateway_pb2.GenerateRequest(adapter=adapter, tokens=gateway_pb2.TokenIds(ids=[1]), max_tokens=tokens)

    async def answer() -> None:
        async for _ in served.gateway.Generate(asked, metadata=metadata):
            pass

    return await error_of(answer())


@pytest.mark.parametrize("policy", ["open", "tenant_prefix"])
async def test_an_old_token_shows_no_name_that_is_hidden_now(tmp_path: Path, policy: str) -> None:
    """The change that one saw is not the name as it is now."""
    write_adapter(tmp_path / "one", seed=1)
    write_adapter(tmp_path / "two", seed=2)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], roots=[tmp_path], **access_of(tmp_path, ready=policy)) as served,
    ):
        catalogue = served.sidecar.gateway.catalogue
        await catalogue.register("shared", str(tmp_path / "one"), Wanted(allow=("acme", "blue")))
        await catalogue.register("shared", str(tmp_path / "two"), Wanted(allow=("blue",)))
        await catalogue.register("last", str(tmp_path / "one"), Wanted(allow=("acme", "blue")))
        watching = stub_of(served, "Adapters").Watch(pb.WatchRequest(token="0"), metadata=ACME)
        seen: list[str] = []

        def note(change: Any) -> bool:
            seen.append(change.name)
            return bool(change.name == "last")

        await read_until(watching, note)
        assert seen == ["last"]


MANAGES_ITS_OWN = """
permit (principal in Role::"operator", action, resource);
permit (principal, action == Action::"manage", resource is Tenant) when { resource == principal };
"""


async def test_who_manages_its_own_tenant_makes_no_operator(tmp_path: Path) -> None:
    """A key has no role, group or class that its maker has not."""
    (tmp_path / "policies.cedar").write_text(MANAGES_ITS_OWN)
    config = access_of(tmp_path, cedar=str(tmp_path / "policies.cedar"))
    async with running_engine(**DUMMY) as engine, serving([engine], **config) as served:
        access = stub_of(served, "Access")
        for more in ({"roles": ["operator"]}, {"groups": ["ml"]}, {"roles": ["viewer"], "groups": ["ml"]}):
            refused = await error_of(access.CreateKey(pb.CreateKeyRequest(tenant="acme", **more), metadata=ACME))
            assert refused.startswith("PERMISSION_DENIED: you may give a key no more than you have yourself"), refused
        assert "PERMISSION_DENIED" in await error_of(
            access.CreateKey(pb.CreateKeyRequest(tenant="blue"), metadata=ACME)
        )
        assert not served.sidecar.access.store.keys()
        assert not await error_of(access.CreateKey(pb.CreateKeyRequest(tenant="acme"), metadata=ACME))
        wanted = pb.CreateKeyRequest(tenant="acme", roles=["operator"], groups=["ml"])
        assert not await error_of(access.CreateKey(wanted, metadata=OPS))


async def test_a_key_makes_none_that_outlives_it(tmp_path: Path) -> None:
    """One that leaked would never end."""
    (tmp_path / "policies.cedar").write_text(MANAGES_ITS_OWN)
    config = access_of(tmp_path, cedar=str(tmp_path / "policies.cedar"))
    async with running_engine(**DUMMY) as engine, serving([engine], **config) as served:
        access = stub_of(served, "Access")
        made = await access.CreateKey(pb.CreateKeyRequest(tenant="acme", expires_s=3600), metadata=OPS)
        short = metadata_of(made.secret)
        for expires_s in (0, 3700):
            wanted = pb.CreateKeyRequest(tenant="acme", expires_s=expires_s)
            assert "would have a later end" in await error_of(access.CreateKey(wanted, metadata=short))
        assert not await error_of(access.CreateKey(pb.CreateKeyRequest(tenant="acme", expires_s=3000), metadata=short))


@pytest.mark.parametrize("expires_s", [1e300, 1e12, 3e11, float("inf"), float("nan"), -1.0])
async def test_an_end_that_is_no_time_makes_no_key(tmp_path: Path, expires_s: float) -> None:
    """Lists and the audit could not tell it."""
    async with running_engine(**DUMMY) as engine, serving([engine], **access_of(tmp_path)) as served:
        access = stub_of(served, "Access")
        wanted = pb.CreateKeyRequest(tenant="acme", expires_s=expires_s)
        assert "INVALID_ARGUMENT: the key would end after" in await error_of(access.CreateKey(wanted, metadata=OPS))
        assert not served.sidecar.access.store.keys()


async def test_the_error_of_a_load_tells_no_folder_to_those_who_only_use_the_name(tmp_path: Path) -> None:
    """In each protocol; its publisher and operators hear the cause."""
    folder = tmp_path / "blue-internal" / "sql"
    write_adapter(folder, seed=1)
    config = access_of(tmp_path, ready="tenant_prefix", roles={"blue": ["publisher"]})
    async with running_engine(**DUMMY) as engine, serving([engine], roots=[tmp_path], **config) as served:
        await served.sidecar.gateway.catalogue.register("blue/sql", str(folder), Wanted(allow=("acme", "blue")))
        shutil.rmtree(folder)
        kserve: Any = service_pb2_grpc.GRPCInferenceServiceStub(served.channel)
        told = [await generated(served, ACME, "blue/sql")]
        stream = kserve.ModelStreamInfer(iter([kserve_request("blue/sql")]), metadata=ACME)
        told.append((await read_until(stream, lambda message: bool(message.error_message))).error_message)
        async with httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}", trust_env=False) as http:
            body = {"model": "blue/sql", "prompt": "Is it?", "max_tokens": 1}
            told.append((await http.post("/v1/completions", json=body, headers=list(ACME))).text)
        for text in told:
            assert "cannot be used now; ask its publisher or your operator" in text
            assert "internal" not in text
        assert str(folder) in await generated(served, BLUE, "blue/sql")
        assert str(folder) in await generated(served, OPS, "blue/sql")


CURRENT_IS_HIDDEN = """
permit (principal in Role::"operator", action, resource);
permit (principal, action, resource is Adapter);
permit (principal, action, resource is Version) when { resource.ordinal == 1 };
"""


async def test_nothing_is_told_of_a_current_version_that_is_hidden(tmp_path: Path) -> None:
    """Neither its rank and size nor when it came."""
    write_adapter(tmp_path / "one", seed=1, rank=8)
    write_adapter(tmp_path / "two", seed=2, rank=16)
    (tmp_path / "policies.cedar").write_text(CURRENT_IS_HIDDEN)
    config = access_of(tmp_path, cedar=str(tmp_path / "policies.cedar"))
    async with running_engine(**DUMMY) as engine, serving([engine], roots=[tmp_path], **config) as served:
        await served.sidecar.gateway.catalogue.register("sql", str(tmp_path / "one"), Wanted())
        await served.sidecar.gateway.catalogue.register("sql", str(tmp_path / "two"), Wanted(pin=True))
        await until(lambda: bool(served.state.store.entries))
        ask = stub_of(served, "Adapters").Get
        whole, seen = [await ask(pb.AdapterRequest(name="sql"), metadata=each) for each in (OPS, ACME)]
        assert (whole.rank, whole.path, len(whole.versions)) == (16, str(tmp_path / "two"), 2)
        assert whole.store
        assert (seen.rank, seen.path, seen.dtype, seen.base_model) == (0, "", "", "")
        assert [*seen.store, *seen.backends, *seen.modules] == []
        assert [version.version for version in seen.versions] == ["v1"]


async def test_a_request_that_waits_ends_with_its_key(tmp_path: Path) -> None:
    """Only what runs may end as usual: with `on_revoked: finish` an engine got it long after."""
    few_seats = DUMMY | ENDLESS | {"seats": 2, "metrics_port": 0}
    async with running_engine(**few_seats) as engine, serving([engine], **access_of(tmp_path)) as served:
        access = stub_of(served, "Access")
        made = await access.CreateKey(pb.CreateKeyRequest(tenant="acme"), metadata=OPS)
        key = metadata_of(made.secret)
        running = asyncio.create_task(generated(served, key, tokens=1 << 19))
        await until(lambda: any(request.running for request in served.state.requests.values()))
        blue = [asyncio.create_task(generated(served, BLUE, tokens=1 << 19)) for _ in range(10)]
        await until(lambda: len(served.state.requests) == 11 and bool(served.state.waiting.requests))
        waiting = asyncio.create_task(generated(served, key, tokens=1 << 19))
        await until(lambda: len(served.state.requests) == 12)
        await access.RevokeKey(pb.RevokeKeyRequest(id=made.key.id), metadata=OPS)
        async with asyncio.timeout(60):
            assert "the credential of the request was revoked" in await waiting
        assert not running.done()
        for call in (running, *blue):
            call.cancel()
        await asyncio.wait([running, *blue])
