"""Adapters' files between replicas: a push is on two of them, and what one has the others need not fetch."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from sidecar.adapters.origins.files import files_of
from sidecar.adapters.spool import digest_of_folder
from sidecar.errors import Invalid
from sidecar.proto import admin_pb2, peers_pb2
from tests.kit.emulated import running_engine
from tests.kit.peft_files import write_adapter
from tests.kit.redis_servers import running
from tests.kit.replica_pool import replica, settled
from tests.kit.serving import Serving, until

ENGINE = {"compute": "none", "shape": "tiny"}


@asynccontextmanager
async def two(tmp_path: Path) -> AsyncIterator[tuple[Serving, Serving]]:
    """Run two replicas, of which the second can be left; nothing is served from a folder that both see."""
    (tmp_path / "adapters").mkdir()
    async with (
        running(tmp_path / "redis") as redis,
        running_engine(**ENGINE) as engine,
        replica(0, redis.url, [engine], tmp_path / "adapters") as left,
        replica(1, redis.url, [engine], tmp_path / "adapters") as right,
    ):
        await until(lambda: settled([left, right]))
        yield left, right


def messages(name: str, folder: Path) -> Iterator[Any]:
    """Yield what a client sends of a folder."""
    contents = [(path.name, path.read_bytes()) for path in files_of(folder)]
    files = [
        admin_pb2.PushFile(name=file, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for file, data in contents
    ]
    yield admin_pb2.PushRequest(start=admin_pb2.PushStart(name=name, files=files))
    for number, (_, data) in enumerate(contents):
        yield admin_pb2.PushRequest(chunk=admin_pb2.PushChunk(file=number, offset=0, data=data))


async def test_a_push_outlives_the_replica_that_took_it(tmp_path: Path) -> None:
    """It is acknowledged when another one has the files too."""
    write_adapter(tmp_path / "own", seed=3)
    async with two(tmp_path) as (left, right):
        await right.adapters.Push(messages("own", tmp_path / "own"))
        digest = left.state.names["own"].digest
        assert digest_of_folder(left.sidecar.gateway.sources.spool.folder(digest)) == digest
        await right.sidecar.gateway.stop()
        await right.sidecar.replica.stop()
        await until(lambda: left.sidecar.replica.board.owner_of("b0") == left.sidecar.replica.member.id)
        assert (await left.ask("own")).tokens == left.expected("own", 4)


async def test_what_another_replica_has_is_not_fetched_from_its_origin(tmp_path: Path) -> None:
    """A folder that only the other one's machine has, as here one that is nowhere any more."""
    write_adapter(tmp_path / "own", seed=3)
    async with two(tmp_path) as (left, right):
        await right.adapters.Push(messages("own", tmp_path / "own"))
        digest = right.state.names["own"].digest
        await asyncio.to_thread(left.sidecar.gateway.sources.spool.discard, digest)
        found = await left.sidecar.gateway.sources.locate(str(tmp_path / "nowhere"), digest)
        assert found == left.sidecar.gateway.sources.spool.folder(digest)
        assert digest_of_folder(found) == digest


async def test_what_nobody_has_is_told_as_ever(tmp_path: Path) -> None:
    async with two(tmp_path) as (left, right):
        with pytest.raises(Invalid, match="push it again"):
            await left.sidecar.gateway.sources.locate(f"push://{'0' * 64}", "0" * 64)
        stub = left.sidecar.replica.peers.stub(right.sidecar.replica.member.id)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for _ in stub.Source(peers_pb2.SourceRequest(digest="0" * 64)):
                pass
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_files_that_are_not_what_they_should_be_are_not_taken(tmp_path: Path) -> None:
    """They are looked at where they arrive, so a damaged copy goes no further."""
    write_adapter(tmp_path / "own", seed=3)
    async with two(tmp_path) as (left, right):
        await right.adapters.Push(messages("own", tmp_path / "own"))
        digest = right.state.names["own"].digest
        spool = right.sidecar.gateway.sources.spool
        (spool.folder(digest) / "adapter_model.safetensors").write_bytes(b"damaged")
        await asyncio.to_thread(left.sidecar.gateway.sources.spool.discard, digest)
        with pytest.raises(Invalid, match="push it again"):
            await left.sidecar.gateway.sources.locate(f"push://{digest}", digest)
