"""What takes long to register is permitted again when it is stored: names and keys change meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGCONT, SIGSTOP
from typing import Any

import grpc
import pytest
import yaml

from sidecar.proto import admin_pb2 as pb
from sidecar.proto import admin_pb2_grpc
from tests.integration.test_load_calls import dying, trained
from tests.integration.test_push import chunks_of, messages, start_of
from tests.kit.authority import NEEDS_OPENSSL, Authority
from tests.kit.emulated import running_engine
from tests.kit.faulty_http import Fault, faulty_server
from tests.kit.peft_files import write_adapter
from tests.kit.redis_servers import running
from tests.kit.replica_pool import CALM_S, replicas
from tests.kit.serving import Serving, serving, until

DUMMY = {"compute": "none", "shape": "tiny"}
WEIGHTS = "adapter_model.safetensors"
OPERATOR = f"lsk_{1:012d}_{'a' * 64}"
Metadata = tuple[tuple[str, str], ...]


def enforced(folder: Path) -> dict[str, Any]:
    """Return a configuration in which publishers share one space of names, and keys can be revoked."""
    (folder / "keys.yaml").write_text(yaml.safe_dump([{"tenant": "ops", "key": OPERATOR, "roles": ["operator"]}]))
    return {
        "identity": {"mode": "enforce", "keys_file": str(folder / "keys.yaml"), "local_admin": False},
        "access": {"policies": {"ready": "open"}},
    }


def bearer(secret: str) -> Metadata:
    return (("authorization", f"Bearer {secret}"),)


@dataclass
class Publisher:
    """A tenant that publishes, with a key that can be revoked."""

    served: Serving
    metadata: Metadata
    key: str

    @classmethod
    async def of(cls, served: Serving, tenant: str) -> Publisher:
        access: Any = admin_pb2_grpc.AccessStub(served.admin_channel)  # type: ignore[no-untyped-call]
        wanted = pb.CreateKeyRequest(tenant=tenant, roles=["publisher"])
        made = await access.CreateKey(wanted, metadata=bearer(OPERATOR))
        return cls(served, bearer(made.secret), made.key.id)

    async def revoke(self) -> None:
        access: Any = admin_pb2_grpc.AccessStub(self.served.admin_channel)  # type: ignore[no-untyped-call]
        await access.RevokeKey(pb.RevokeKeyRequest(id=self.key), metadata=bearer(OPERATOR))

    async def register(self, path: str, **fields: Any) -> Any:
        wanted = pb.RegisterRequest(name="sql", path=path, **fields)
        return await self.served.adapters.Register(wanted, metadata=self.metadata)

    async def push(self, folder: Path, before_last: Callable[[], Awaitable[Any]], **fields: Any) -> Any:
        """Push a folder; `before_last` runs before the last chunk is sent, when all others have come."""
        requests = messages(start_of(folder, **fields), chunks_of(folder))

        async def held_back() -> AsyncIterator[Any]:
            for request in requests[:-1]:
                yield request
            await before_last()
            yield requests[-1]

        return await self.served.adapters.Push(held_back(), metadata=self.metadata)


async def refused(call: Awaitable[Any]) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code().name, caught.value.details() or ""


@asynccontextmanager
async def houses(kind: str, folder: Path) -> AsyncIterator[list[Serving]]:
    """Run one sidecar with a registry in a file, or two that share a Redis."""
    (folder / "served").mkdir()
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(running_engine(**DUMMY))
        config = enforced(folder)
        if kind == "file":
            one = serving([engine], roots=[folder], data_directory=str(folder / "data"), **config)
            yield [await stack.enter_async_context(one)]
        else:
            server = await stack.enter_async_context(running(folder / "server"))
            authority = Authority(folder)
            await authority.found()
            key, certificate = await authority.sign("replica", "IP:127.0.0.1")
            tls = {"ca": str(authority.ca), "certificate": str(certificate), "key": str(key)}
            section = {"address": "127.0.0.1:0", "lease_s": CALM_S, "tls": tls}
            pool = replicas(2, server.url, [engine], folder / "served", replicas=section, **config)
            yield await stack.enter_async_context(pool)


@pytest.mark.parametrize("kind", ["file", pytest.param("redis", marks=NEEDS_OPENSSL)])
async def test_a_push_does_not_land_on_a_name_that_another_tenant_has_taken_meanwhile(
    kind: str, tmp_path: Path
) -> None:
    """The name stays what the other made of it: its content, and for whom it is."""
    ours, theirs = (write_adapter(tmp_path / name, seed=seed) for seed, name in enumerate(("ours", "theirs")))
    async with houses(kind, tmp_path) as pool:
        acme, blue = await Publisher.of(pool[0], "acme"), await Publisher.of(pool[-1], "blue")

        async def taken() -> None:
            await until(lambda: any(pool[0].sidecar.gateway.sources.spool.directory.glob(f"incoming/*/{WEIGHTS}")))
            await blue.push(theirs, lambda: asyncio.sleep(0), allow=["blue"])

        code, words = await refused(acme.push(ours, taken, allow=["acme"]))
        assert code == "PERMISSION_DENIED"
        assert 'you may not change "sql"' in words
        for served in pool:
            record = served.sidecar.registry.get("sql")
            assert record is not None
            assert (record.allow, len(record.versions)) == (("blue",), 1)


async def test_a_push_ends_with_its_key(tmp_path: Path) -> None:
    """Its next chunk is not taken, and nothing of it is left."""
    folder = write_adapter(tmp_path / "sql")
    async with houses("file", tmp_path) as (served,):
        acme, data = await Publisher.of(served, "acme"), tmp_path / "data"
        requests = messages(start_of(folder), chunks_of(folder))
        call = served.adapters.Push(metadata=acme.metadata)
        for request in requests[:3]:
            await call.write(request)
        await until(lambda: any(data.glob(f"incoming/*/{WEIGHTS}")))
        await acme.revoke()
        await call.write(requests[3])
        code, words = await refused(call)
        assert (code, "was revoked" in words) == ("UNAUTHENTICATED", True)
        await until(lambda: not list((data / "incoming").iterdir()))
        assert served.sidecar.registry.get("sql") is None


@pytest.mark.parametrize("what", ["key", "name"])
async def test_a_download_that_takes_long_is_asked_again(what: str, tmp_path: Path) -> None:
    """Its caller's key is revoked meanwhile, or another tenant registers the name for itself."""
    theirs = write_adapter(tmp_path / "theirs", seed=1)
    with faulty_server() as server:
        server.serve("sql", write_adapter(tmp_path / "origin"))
        server.faults[WEIGHTS] = [Fault(stall=True)]
        config = enforced(tmp_path) | {"origins": {"allow": [server.url("")], "attempts_max": 3}}
        async with running_engine(**DUMMY) as engine, serving([engine], roots=[tmp_path], **config) as served:
            acme, blue = await Publisher.of(served, "acme"), await Publisher.of(served, "blue")
            registering = asyncio.create_task(refused(acme.register(server.url("sql"), allow=["acme"])))
            await until(lambda: server.count(WEIGHTS) > 0)
            if what == "key":
                await acme.revoke()
            else:
                await blue.register(str(theirs), allow=["blue"])
            before = served.sidecar.registry.get("sql")
            server.released.set()
            code, words = await registering
            told = ("UNAUTHENTICATED", "was revoked") if what == "key" else ("PERMISSION_DENIED", "you may not change")
            assert (code, told[1] in words) == (told[0], True), words
            assert served.sidecar.registry.get("sql") == before


async def test_a_load_call_is_asked_again_before_its_name_moves(tmp_path: Path) -> None:
    """An engine takes its time with a step; the trainer's key is revoked meanwhile, and the name stays where it was."""
    async with dying() as engine, trained([engine], tmp_path, **enforced(tmp_path)) as trainer:
        acme = await Publisher.of(trainer.served, "acme")
        trainer.client.http.headers.update(dict(acme.metadata))
        assert (await trainer.load(trainer.write(1))).status_code == 200
        before = trainer.served.sidecar.registry.get("grpo")
        assert before is not None
        engine.signal(SIGSTOP)
        loading = asyncio.create_task(trainer.load(trainer.write(2)))
        await until(lambda: trainer.served.sidecar.registry.get("grpo") != before)
        await acme.revoke()
        engine.signal(SIGCONT)
        reply = await loading
        assert (reply.status_code, "was revoked" in reply.text) == (401, True), reply.text
        after = trainer.served.sidecar.registry.get("grpo")
        assert after is not None
        assert (after.current, after.versions) == (before.current, before.versions)
