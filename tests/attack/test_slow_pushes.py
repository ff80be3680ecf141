"""Publishers whose pushes never end: they hold back neither others' pushes nor each other's for long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import yaml

from sidecar.errors import Refused
from sidecar.fronts.admin import adapters as push
from sidecar.proto import admin_pb2 as pb
from sidecar.proto import admin_pb2_grpc
from tests.integration.test_push import chunks_of, messages, start_of
from tests.kit.emulated import running_engine
from tests.kit.peft_files import write_adapter
from tests.kit.serving import Serving, serving, until

SLOW, PATIENCE_S = 8, 60.0
Metadata = tuple[tuple[str, str], ...]


def key_of(number: int) -> str:
    return f"lsk_{number:012d}_{str(number) * 64}"


def shown(key: str) -> Metadata:
    return (("authorization", f"Bearer {key}"),)


@asynccontextmanager
async def house(tmp_path: Path) -> AsyncIterator[Serving]:
    """Serve publishers of two tenants, and an operator, who prove themselves by keys."""
    keys = [
        {"tenant": tenant, "key": key_of(number), "roles": [role]}
        for number, (tenant, role) in enumerate(
            [("acme", "publisher"), ("globex", "publisher"), ("ops", "operator")], 1
        )
    ]
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump(keys))
    access = {
        "identity": {"mode": "enforce", "keys_file": str(tmp_path / "keys.yaml"), "local_admin": False},
        "access": {"policies": {"ready": "roles"}},
        "data_directory": str(tmp_path / "data"),
    }
    async with running_engine(compute="none") as engine, serving([engine], **access) as served:
        yield served


def begun(served: Serving, folder: Path, number: int, key: str) -> Any:
    """Return a push that has sent its start, and no more."""
    return served.adapters.Push(metadata=shown(key)), messages(start_of(folder, f"slow-{number}"), [])[0]


async def pushed(served: Serving, folder: Path, name: str, key: str) -> Any:
    async def stream() -> AsyncIterator[Any]:
        for request in messages(start_of(folder, name), chunks_of(folder)):
            yield request

    return await served.adapters.Push(stream(), metadata=shown(key))


async def test_slow_pushes_of_a_tenant_hold_no_other_back(tmp_path: Path) -> None:
    """What it may not begin itself is refused, to be tried again."""
    folder = write_adapter(tmp_path / "sql")
    async with house(tmp_path) as served:
        calls = []
        for number in range(SLOW):
            call, start = begun(served, folder, number, key_of(1))
            await call.write(start)
            calls.append(call)
        incoming = tmp_path / "data" / "incoming"
        await until(lambda: len(list(incoming.iterdir())) + sum(call.done() for call in calls) == SLOW)
        assert (await pushed(served, folder, "mine", key_of(2))).adapter.version == "mine@v1"
        refused = [await call.code() for call in calls if call.done()]
        assert refused == [grpc.StatusCode.RESOURCE_EXHAUSTED] * (SLOW - push.PUSHES_OF_TENANT_MAX)
        for call in calls:
            call.cancel()
        await until(lambda: not list(incoming.iterdir()))
        assert (await pushed(served, folder, "ours", key_of(1))).adapter.version == "ours@v1"


async def test_a_push_ends_with_its_key(tmp_path: Path) -> None:
    """While its client sends nothing, too, and nothing of it is left."""
    folder = write_adapter(tmp_path / "sql")
    async with house(tmp_path) as served:
        access: Any = admin_pb2_grpc.AccessStub(served.admin_channel)  # type: ignore[no-untyped-call]
        request = pb.CreateKeyRequest(tenant="acme", roles=["publisher"])
        made = await access.CreateKey(request, metadata=shown(key_of(3)))
        call, start = begun(served, folder, 0, made.secret)
        await call.write(start)
        incoming = tmp_path / "data" / "incoming"
        await until(lambda: any(incoming.iterdir()))
        await access.RevokeKey(pb.RevokeKeyRequest(id=made.key.id), metadata=shown(key_of(3)))
        async with asyncio.timeout(push.SILENCE_S_MAX / 2):
            assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
        await until(lambda: not list(incoming.iterdir()))


async def test_a_push_that_trickles_is_given_up(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "sql")

    async def trickle() -> AsyncIterator[Any]:
        for request in messages(start_of(folder), chunks_of(folder, size_bytes=1)):
            yield request
            await asyncio.sleep(0.02)

    async with house(tmp_path) as served:
        receiving = push.Pushes(served.sidecar.gateway, silence_s_max=0.5).receive(trickle())
        with pytest.raises(Refused, match="KiB a second"):
            async with asyncio.timeout(PATIENCE_S):
                await receiving
