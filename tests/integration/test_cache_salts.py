"""The salts of prefix blocks: what engines receive, byte for byte, of tenants whose identity is enforced."""

from __future__ import annotations

import hmac
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.requests import Request

from sidecar.proto import admin_pb2 as pb
from sidecar.proto import gateway_pb2
from tests.integration.test_openai_triton import CHAT, COMPLETIONS, client_of
from tests.integration.test_vllm import fronted
from tests.kit import trtllm_served
from tests.kit.authority import NEEDS_OPENSSL, Authority
from tests.kit.peft_files import write_adapter
from tests.kit.picker_house import body_of, head_of, picker_house
from tests.kit.redis_servers import running
from tests.kit.replica_pool import CALM_S, owned, replicas
from tests.kit.serving import Serving, serving, until
from tests.kit.sglang_emulated import running_sglang, sglang_entry
from tests.kit.trtllm_emulated import running_trtllm
from tests.kit.vllm_emulated import running_vllm

KEYS = {tenant: f"lsk_{number:012d}_{tenant.encode().hex():0<64}" for number, tenant in enumerate(("acme", "blue"), 1)}
CLIENTS = '"cache_salt": "of my own"'
MEMBERS = '{"prompt": "hé", %s"model": "%s", "max_tokens": 2, "ignore_eos": true}'
OTHERS = '{"messages": [{"role": "user", "content": "hé"}], %s"model": "%s", "max_tokens": 2}'
Bodies = list[bytes]


@pytest.fixture
def bodies(monkeypatch: pytest.MonkeyPatch) -> Bodies:
    """Return the bodies of completions and chats that emulated engines have received, as they came."""
    came: Bodies = []
    read = Request.body

    async def recorded(request: Request) -> bytes:
        body = await read(request)
        if request.url.path in (COMPLETIONS, CHAT):
            came.append(body)
        return body

    monkeypatch.setattr(Request, "body", recorded)
    return came


def enforced(folder: Path, **policies: Any) -> dict[str, Any]:
    keys = [{"tenant": tenant, "key": key} for tenant, key in KEYS.items()]
    (folder / "keys.yaml").write_text(yaml.safe_dump(keys))
    identity = {"mode": "enforce", "keys_file": str(folder / "keys.yaml")}
    return {"identity": identity, "access": {"policies": {"ready": "tenant_prefix"} | policies}}


async def register(served: Serving, folder: Path, name: str, *allow: str) -> None:
    """Register an adapter with the weights of its name's last part."""
    path = folder / "weights" / name.rpartition("/")[2]
    if not path.exists():
        write_adapter(path, seed=len(name))
    await served.adapters.Register(pb.RegisterRequest(name=name, path=str(path), allow=allow))


def salt(served: Serving, tenant: str, own: str = "") -> str:
    """Return a tenant's salt, made of the secret that the sidecar keeps."""
    entry: Any = served.sidecar.access.store.get("salt")
    message = tenant + (f"\0{own}" if own else "")
    return hmac.digest(bytes.fromhex(entry.secret), message.encode(), "sha256").hex()


async def ask(served: Serving, tenant: str, body: str, path: str = COMPLETIONS) -> None:
    async with client_of(served) as client:
        headers = {"authorization": f"Bearer {KEYS[tenant]}"}
        answer = await client.post(path, content=body.encode(), headers=headers)
        assert answer.status_code == 200, answer.text


def model_of(body: bytes) -> str:
    return str(json.loads(body)["model"])


@pytest.mark.parametrize(("path", "text"), [(COMPLETIONS, MEMBERS), (CHAT, OTHERS)])
async def test_requests_of_each_tenant_are_salted_at_vllm(path: str, text: str, tmp_path: Path, bodies: Bodies) -> None:
    (tmp_path / "adapters").mkdir()
    async with (
        running_vllm(compute="none") as (engine, _),
        fronted([engine], tmp_path, **enforced(tmp_path)) as served,
    ):
        await register(served, tmp_path, "acme/sql")
        await register(served, tmp_path, "acme/lent", "acme", "blue")

        async def received(tenant: str, model: str, own: str = "") -> tuple[str, str]:
            """Return a body that was sent, and the one that came, each without the model's name."""
            bodies.clear()
            sent = text % (own, model)
            await ask(served, tenant, sent, path)
            (came,) = bodies
            return sent.replace(model, "…", 1), came.decode().replace(model_of(came), "…", 1)

        for model in ("base", "acme/lent", "acme/sql"):
            for tenant in ("acme", "blue") if model != "acme/sql" else ("acme",):
                sent, came = await received(tenant, model)
                assert came == sent.replace('"…"', f'"…","cache_salt":"{salt(served, tenant)}"'), model
                sent, came = await received(tenant, model, f"{CLIENTS}, ")
                mixed = salt(served, tenant, '"of my own"')
                assert came == sent.replace(CLIENTS, f'"cache_salt": "{mixed}"')
        assert salt(served, "acme") != salt(served, "blue")


async def test_a_name_that_is_given_to_another_tenant_takes_no_blocks_along(tmp_path: Path, bodies: Bodies) -> None:
    """The engine knows the adapter by its name, which stays: what finds blocks again has to be the tenant's."""
    (tmp_path / "adapters").mkdir()
    async with (
        running_vllm(compute="none") as (engine, _),
        fronted([engine], tmp_path, **enforced(tmp_path, ready="open")) as served,
    ):
        salts = []
        for tenant in KEYS:
            await register(served, tmp_path, "sql", tenant)
            bodies.clear()
            await ask(served, tenant, MEMBERS % ("", "sql"))
            salts.append(json.loads(bodies[0]).get("cache_salt"))
            await served.adapters.Unregister(pb.UnregisterRequest(name="sql"))
        assert salts == [salt(served, tenant) for tenant in KEYS]


async def test_a_salt_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    async with running_vllm(compute="none") as (engine, _), fronted([engine], tmp_path, **enforced(tmp_path)) as served:
        await ask(served, "acme", MEMBERS % ('"cache_salt": null, ', "base"))
        for written in ("7", "true", "{}", '["a"]', '""'):
            with pytest.raises(AssertionError, match='"param": "cache_salt", "code": 400, "reason": "invalid_request"'):
                await ask(served, "acme", MEMBERS % (f'"cache_salt": {written}, ', "base"))


@pytest.mark.parametrize("mode", ["off", "observe"])
async def test_a_clients_salt_passes_where_identity_is_not_enforced(mode: str, tmp_path: Path, bodies: Bodies) -> None:
    (tmp_path / "adapters").mkdir()
    record = enforced(tmp_path)
    record["identity"]["mode"] = mode
    async with running_vllm(compute="none") as (engine, _), fronted([engine], tmp_path, **record) as served:
        for own in ("", f"{CLIENTS}, "):
            bodies.clear()
            await ask(served, "acme", MEMBERS % (own, "base"))
            assert bodies == [(MEMBERS % (own, "base")).encode()]


async def test_lists_of_prompts_large_bodies_and_generate(tmp_path: Path, bodies: Bodies) -> None:
    (tmp_path / "adapters").mkdir()
    async with (
        running_vllm(compute="none", max_seq_tokens=400_000) as (engine, _),
        fronted([engine], tmp_path, **enforced(tmp_path)) as served,
    ):
        bodies.clear()  # the engine may have been asked for a token, so that it tells its slots
        mixed = salt(served, "blue", '"of my own"')
        bodies.clear()
        await ask(served, "blue", f'{{"model": "base", "max_tokens": 1, {CLIENTS}, "prompt": ["one", "two"]}}')
        assert [json.loads(body)["cache_salt"] for body in bodies] == [mixed] * 2
        bodies.clear()
        large = f'{{"prompt": "{"é" * 150_000}", "model": "base", "max_tokens": 1, {CLIENTS}}}'
        await ask(served, "blue", large)
        assert bodies == [large.replace(CLIENTS, f'"cache_salt": "{mixed}"').encode()]
        bodies.clear()
        request = gateway_pb2.GenerateRequest(text="x", max_tokens=1)
        call = served.gateway.Generate(request, metadata=(("authorization", f"Bearer {KEYS['blue']}"),))
        assert [message async for message in call]
        assert json.loads(bodies[0])["cache_salt"] == salt(served, "blue")


async def test_trtllm_serve_knows_a_salt_in_chats_only(tmp_path: Path, bodies: Bodies) -> None:
    """It refuses members that it does not know."""
    (tmp_path / "adapters").mkdir()
    async with (
        running_trtllm(compute="none") as (engine, _),
        trtllm_served.fronted([engine], tmp_path, **enforced(tmp_path)) as served,
    ):
        chat, text = OTHERS % ("", "tiny-llama"), MEMBERS % ("", "tiny-llama")
        await ask(served, "acme", chat, CHAT)
        assert json.loads(bodies[-1]) == json.loads(chat) | {"cache_salt": salt(served, "acme")}
        await ask(served, "acme", text)
        assert json.loads(bodies[-1]) == json.loads(text)


@pytest.mark.parametrize(("path", "text"), [(COMPLETIONS, MEMBERS), (CHAT, OTHERS)])
async def test_requests_of_each_tenant_are_salted_at_sglang(
    path: str, text: str, tmp_path: Path, bodies: Bodies
) -> None:
    (tmp_path / "adapters").mkdir()
    async with running_sglang(compute="none") as engine:
        entry = sglang_entry(tmp_path) | {"id": "sglang-0", "url": f"sglang://{engine.http_address}"}
        async with serving([], tmp_path / "adapters", [tmp_path], backends=[entry], **enforced(tmp_path)) as served:
            await register(served, tmp_path, "acme/sql")
            for tenant, model in (("acme", "acme/sql"), ("acme", "base"), ("blue", "base")):
                await ask(served, tenant, text % ("", model), path)
                assert json.loads(bodies[-1])["cache_salt"] == salt(served, tenant)


@NEEDS_OPENSSL
async def test_one_secret_for_all_replicas_and_after_a_restart(tmp_path: Path, bodies: Bodies) -> None:
    (tmp_path / "adapters").mkdir()
    backend = {"adapters_dir": str(tmp_path / "shared")}
    authority = Authority(tmp_path)
    await authority.found()
    key, certificate = await authority.sign("replica", "IP:127.0.0.1,DNS:localhost")
    tls = {"certificate": str(certificate), "key": str(key), "ca": str(authority.ca)}
    among = {"replicas": {"address": "127.0.0.1:0", "lease_s": CALM_S, "tls": tls}, **enforced(tmp_path)}
    async with running(tmp_path / "redis") as redis, running_vllm(compute="none") as (engine, _):
        salts = set()
        for _ in range(2):
            async with replicas(2, redis.url, [engine], tmp_path / "adapters", backend=backend, **among) as pool:
                salts |= {salt(served, "acme") for served in pool}
                for served in sorted(pool, key=lambda served: len(owned(served))):
                    await ask(served, "acme", MEMBERS % ("", "base"))
                assert sum(served.sidecar.replica.router.forwards for served in pool) == 1, "passed on, and salted"
        asked = [json.loads(body) for body in bodies if "hé".encode() in body]  # the others are the sidecar's own
        assert [body.get("cache_salt") for body in asked] == 4 * list(salts)
        assert len(salts) == 1


async def test_the_secret_is_kept_in_the_data_directory(tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    (tmp_path / "data").mkdir()
    record = enforced(tmp_path) | {"data_directory": str(tmp_path / "data")}
    salts = set()
    async with running_vllm(compute="none") as (engine, _):
        for _ in range(2):
            async with fronted([engine], tmp_path, **record) as served:
                salts.add(salt(served, "acme"))
    assert len(salts) == 1


async def test_in_the_lane(tmp_path: Path) -> None:
    """The picker gives Envoy the salted body."""
    async with picker_house(tmp_path, **enforced(tmp_path, ready="open")) as house:
        await until(lambda: "a00" in house.served.state.names)
        raw = house.begin()
        authorization = ("authorization", f"Bearer {KEYS['blue']}")
        await raw.send(head_of([authorization]), body_of("a00", cache_salt="of my own"))
        assert await raw.until_routed()
        parts = [reply.request_body.response.body_mutation.streamed_response.body for reply in raw.got]
        body = json.loads(b"".join(parts))
        assert body["cache_salt"] == salt(house.served, "blue", '"of my own"')
        raw.call.cancel()
