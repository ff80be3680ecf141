"""API keys from the command line, and the clients that present them."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from sidecar.config.openai import LOADS
from sidecar.proto import gateway_pb2
from tests.kit.authority import NEEDS_OPENSSL, Authority
from tests.kit.emulated import running_engine
from tests.kit.forked import python
from tests.kit.redis_servers import running
from tests.kit.replica_pool import CALM_S, replica, settled
from tests.kit.serving import Serving, serving, until, write_adapters

DUMMY = {"compute": "none", "shape": "tiny"}
ENFORCED = {"identity": {"mode": "enforce"}}


async def sidecar(served: Serving, *arguments: str) -> tuple[int, str, str]:
    """Run a command against the served sidecar's admin listener."""
    process = await python(
        "-m", "sidecar", *arguments, "--admin", served.sidecar.admin_address,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, error = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), error.decode()


async def said_over_http(served: Serving, key: str) -> httpx.Response:
    async with httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}") as client:
        return await client.get("/v1/models", headers={"authorization": f"Bearer {key}"})


async def said_over_grpc(served: Serving, key: str, adapter: str = "a00") -> str:
    """Return OK, or the status of a refusal."""
    try:
        request = gateway_pb2.GenerateRequest(adapter=adapter, tokens=gateway_pb2.TokenIds(ids=[1, 2]), max_tokens=1)
        async for _ in served.gateway.Generate(request, metadata=(("authorization", f"Bearer {key}"),)):
            pass
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


async def test_a_keys_life_from_the_command_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    write_adapters(tmp_path / "adapters", 1)
    data = str(tmp_path / "data")
    queue = {"classes": {"batch": {}}}
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path / "adapters", data_directory=data, queue=queue, **ENFORCED) as served,
    ):
        code, out, error = await sidecar(
            served, "keys", "create", "--tenant", "acme", "--expires", "90d", "--role", "viewer", "--role", "publisher",
            "--group", "red", "--class", "default", "--note", "of the CI",
        )  # fmt: skip
        assert code == 0, error
        first, _, secret, *rest = out.splitlines()
        assert first.startswith("key ")
        assert "of tenant acme, good until 20" in first
        assert "only time that it is shown" in rest[1]
        assert "api_key=KEY), or OPENAI_API_KEY=KEY" in out
        assert '("authorization", "Bearer KEY")' in out
        assert (await said_over_http(served, secret)).status_code == 200
        assert await said_over_grpc(served, secret) == "OK"
        code, out, error = await sidecar(served, "keys", "create", "--tenant", "acme", "--expires", "0d")
        assert (code, out) == (2, "")
        assert "--expires wants more than 0" in error
        code, out, error = await sidecar(served, "keys", "create", "--tenant", "other", "--json")
        other: dict[str, Any] = json.loads(out)
        assert (other["expires_at"], other["revoked_at"], other["used_at"]) == (None, None, None)
        code, out, error = await sidecar(served, "keys", "list", "--tenant", "acme", "--json")
        (listed,) = json.loads(out)
        assert listed["id"] == first.split()[1]
        assert set(other) - set(listed) == {"secret"}, "one that is made is as one that is listed"
        assert (listed["roles"], listed["groups"], listed["class"]) == (["viewer", "publisher"], ["red"], "default")
        assert listed["created_by"] == "local"
        assert listed["expires_at"] - listed["created_at"] == pytest.approx(90 * 24 * 3600)
        assert listed["used_at"] >= listed["created_at"]
        code, out, error = await sidecar(served, "keys", "revoke", listed["id"])
        assert out == f"key {listed['id']} of tenant acme is revoked; no replica that answers takes it any more\n"
        refused = await said_over_http(served, secret)
        assert refused.status_code == 401
        assert f"{listed['id']} was revoked at" in refused.text
        assert await said_over_grpc(served, secret) == "UNAUTHENTICATED"
        assert await said_over_grpc(served, other["secret"]) == "OK"
        code, out, error = await sidecar(served, "keys", "list")
        assert [line.split()[2] for line in out.splitlines()[1:] if line.startswith(listed["id"])] == ["revoked"]
        assert secret not in out
        for arguments, says in (
            (("revoke", "nobody"), 'there is no key "nobody"; sidecar keys list shows the ids'),
            (("create", "--tenant", ""), "tenant"),
            (("create", "--tenant", "*"), 'tenant: "*" is no tenant'),
            (("create", "--tenant", "a", "--expires", "soon"), "--expires wants a duration such as"),
            (
                ("create", "--tenant", "a", "--role", "king"),
                '--role: there is no role "king"; there are operator, publisher, viewer',
            ),
            (("create", "--tenant", "a", "--class", "bth"), 'there is no class "bth"; there are batch, default'),
            (("create", "--tenant", "a", "--class", LOADS), "there are batch, default (queue.classes adds one)"),
            (("create", "--tenant", "a", "--note", "two\nlines"), "one line of printable characters"),
        ):
            code, out, error = await sidecar(served, "keys", *arguments)
            assert (code > 0, out) == (True, "")
            assert says in error
    assert secret not in caplog.text
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path / "adapters", data_directory=data, **ENFORCED) as served,
    ):
        assert await said_over_grpc(served, other["secret"]) == "OK"
        assert await said_over_grpc(served, secret) == "UNAUTHENTICATED"
        code, out, error = await sidecar(served, "keys", "list", "--json")
        assert {key["id"]: key["state"] for key in json.loads(out)} == {
            listed["id"]: "revoked",
            other["id"]: "active",
        }


async def test_a_call_without_a_key_is_told_how_to_send_one(tmp_path: Path) -> None:
    async with serving([], **ENFORCED) as served:
        process = await python(
            "-m", "sidecar", "generate", "base", "hi", "--server", served.sidecar.data_address,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        _, error = await process.communicate()
        assert b"the call has no credential" in error
        assert b"--token-file FILE sends the key or the token in a file [UNAUTHENTICATED]" in error, (
            "login is for admin"
        )
        async with httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}") as client:
            for header in ("Bearer", "bearer"):
                refused = await client.get("/v1/models", headers={"authorization": header})
                assert refused.status_code == 401
                assert "has nothing after Bearer; look whether the variable" in refused.text
            refused = await client.get("/v1/models", headers={"authorization": "Basic Bearer"})
            assert (refused.status_code, "another scheme than Bearer" in refused.text) == (401, True)
        for value in ("Bearer", "Bearer "):
            request = gateway_pb2.GenerateRequest(text="hi", max_tokens=1)
            with pytest.raises(grpc.aio.AioRpcError, match="nothing after Bearer") as raised:
                async for _ in served.gateway.Generate(request, metadata=(("authorization", value),)):
                    pass
            assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_sidecar_starts_without_its_redis_and_knows_names_and_keys(tmp_path: Path) -> None:
    write_adapters(tmp_path / "adapters", 1)
    async with running(tmp_path / "server") as server, running_engine(**DUMMY) as engine:
        config = {"data_directory": str(tmp_path / "data"), "state": {"url": server.url}, **ENFORCED}
        async with serving([engine], tmp_path / "adapters", **config) as served:
            _, out, error = await sidecar(served, "keys", "create", "--tenant", "acme", "--json")
            key = json.loads(out)
            _, out, error = await sidecar(served, "keys", "create", "--tenant", "acme", "--json")
            revoked = json.loads(out)
            assert (await sidecar(served, "keys", "revoke", revoked["id"]))[0] == 0
            assert await said_over_grpc(served, key["secret"]) == "OK"
        await server.kill()
        async with serving([engine], roots=[tmp_path], **config) as served:
            assert await said_over_grpc(served, key["secret"]) == "OK"
            assert await said_over_grpc(served, revoked["secret"]) == "UNAUTHENTICATED"
            code, _, error = await sidecar(served, "keys", "create", "--tenant", "acme")
            assert code == 1
            assert "changing a key or a limit needs Redis at" in error
            code, _, error = await sidecar(served, "keys", "revoke", key["id"])
            assert (code, f"the key {key['id']} is refused here from now on" in error) == (1, True), error
            assert "that is not in Redis yet and is tried again until it is" in error
            assert "other replicas take the key until then, without Redis until " in error
            assert await said_over_grpc(served, key["secret"]) == "UNAUTHENTICATED"
            await server.start()
            stored = served.sidecar.access.store
            await until(lambda: not any(map(stored.is_unstored, stored.keys())))
            assert await said_over_grpc(served, key["secret"]) == "UNAUTHENTICATED"
        await server.kill()
        async with serving([engine], roots=[tmp_path], **config) as served:
            assert await said_over_grpc(served, key["secret"]) == "UNAUTHENTICATED"


@NEEDS_OPENSSL
async def test_a_key_revoked_at_one_replica_is_refused_by_all_when_the_command_ends(tmp_path: Path) -> None:
    write_adapters(tmp_path / "adapters", 1)
    authority = Authority(tmp_path)
    await authority.found()
    key_file, certificate = await authority.sign("replica", "IP:127.0.0.1")
    tls = {"ca": str(authority.ca), "certificate": str(certificate), "key": str(key_file)}
    async with (
        running(tmp_path / "server") as server,
        running_engine(**DUMMY) as engine,
        AsyncExitStack() as stack,
    ):
        pool = []
        for number in range(3):
            section = {"address": "127.0.0.1:0", "name": f"r{number}", "lease_s": CALM_S, "tls": tls}
            starting = replica(number, server.url, [engine], tmp_path / "adapters", replicas=section, **ENFORCED)
            pool.append(await stack.enter_async_context(starting))
        await until(lambda: settled(pool))
        made = [await sidecar(served, "keys", "create", "--tenant", "acme", "--json") for served in pool]
        keys = [json.loads(out) for _, out, _ in made]
        for key in keys:
            assert [await said_over_grpc(served, key["secret"]) for served in pool] == ["OK"] * 3
        for served, key in zip(pool, keys, strict=True):
            code, _, error = await sidecar(served, "keys", "revoke", key["id"])
            assert code == 0, error
            said = await asyncio.gather(*(said_over_grpc(each, key["secret"]) for each in pool))
            assert said == ["UNAUTHENTICATED"] * 3
            assert {(await said_over_http(each, key["secret"])).status_code for each in pool} == {401}


async def test_a_whole_key_in_the_place_of_its_id_is_revoked_and_written_nowhere(tmp_path: Path) -> None:
    write_adapters(tmp_path / "adapters", 1)
    data = tmp_path / "data"
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path / "adapters", data_directory=str(data), **ENFORCED) as served,
    ):
        code, out, error = await sidecar(served, "keys", "create", "--tenant", "acme", "--json")
        assert code == 0, error
        secret = json.loads(out)["secret"]
        random = secret.rpartition("_")[2]
        assert await said_over_grpc(served, secret, adapter=secret) == "NOT_FOUND"
        code, out, error = await sidecar(served, "keys", "revoke", secret)
        assert (code, random in out + error) == (0, False), error
        assert await said_over_grpc(served, secret) == "UNAUTHENTICATED"
        for time in ("0d", "0s"):
            code, out, error = await sidecar(served, "keys", "create", "--tenant", "acme", "--expires", time)
            assert (code, "--expires wants more than 0" in error) == (2, True)
    written = [file.read_bytes() for file in data.rglob("*") if file.is_file()]
    assert written
    assert not any(random.encode() in content for content in written)
