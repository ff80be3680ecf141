"""`sidecar backends check` against a real Triton: what it says of a server that serves, and of the usual mistakes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tritonclient.grpc import service_pb2

from sidecar.backends.checking import check
from sidecar.backends.checks.finding import Finding, State, Target
from sidecar.backends.engine_facts import from_engine_config
from sidecar.lab.engine.kserve import Options
from sidecar.lab.engine.kserve.options import spec_of
from sidecar.lab.engine.spec import engine_config_json
from tests.e2e.triton.repository import Repository
from tests.e2e.triton.server import TritonServer
from tests.kit.emulated import channel_to

ENGINE = {"compute": "none", "shape": "tiny"}


@asynccontextmanager
async def server_and_target(
    folder: Path, control: str = "none", **repository: Any
) -> AsyncIterator[tuple[Any, Target]]:
    """Run a server, and give the target that a complete configuration would make of it."""
    config = folder / "engine.json"
    config.write_text(json.dumps(engine_config_json(spec_of(Options(**ENGINE)))))
    server = TritonServer(folder / "triton", Repository(engine=ENGINE, **repository), control)
    async with server:
        metrics = f"http://{server.metrics_address}/metrics"
        yield server, Target("real", server.grpc_address, facts=from_engine_config(config), metrics_url=metrics)


async def look(target: Target) -> dict[str, Finding]:
    return {finding.check: finding async for finding in check(target)}


def worse(found: dict[str, Finding]) -> dict[str, State]:
    """Return the checks that did not end well."""
    return {name: finding.state for name, finding in found.items() if finding.state is not State.OK}


async def test_a_server_that_serves(tmp_path: Path) -> None:
    """All is well, by gRPC and by shared memory, a second time too; nothing of ours is left at the server."""
    async with server_and_target(tmp_path) as (server, target):
        for _ in range(2):
            found = await look(target)
            assert worse(found) == {}, found
        assert "triton 2." in found["reachable"].text
        assert "64 seats" in found["metrics"].text
        async with channel_to(server.grpc_address) as stub:
            reply = await stub.SystemSharedMemoryStatus(service_pb2.SystemSharedMemoryStatusRequest())
        assert not reply.regions


@pytest.mark.nightly
async def test_a_server_that_is_not_decoupled(tmp_path: Path) -> None:
    """Everything is asked by unary calls then."""
    async with server_and_target(tmp_path, decoupled=False) as (_, target):
        assert worse(await look(target)) == {"decoupled": State.WARNING}


@pytest.mark.nightly
async def test_the_ports_that_are_not_grpc(tmp_path: Path) -> None:
    """Triton's own HTTP and metrics ports are recognised."""
    async with server_and_target(tmp_path) as (server, target):
        http = await look(replace(target, address=server.http_address))
        assert "is Triton's HTTP port" in http["reachable"].text
        metrics = await look(replace(target, address=server.metrics_address))
        assert "is Triton's metrics port" in metrics["reachable"].text


@pytest.mark.nightly
async def test_several_instances_and_a_model_that_is_unloaded(tmp_path: Path) -> None:
    """The instance count comes from the server's own configuration; an unloaded model is there and not READY."""
    async with server_and_target(tmp_path, "explicit", instances=2, cores=("tensorrt_llm", "other")) as (_, target):
        found = await look(target)
        assert found["instances"].text.startswith("CACHES 2, not addressable")
        assert set(worse(found)) <= {"instances", "resident"}
        async with channel_to(target.address) as stub:
            await stub.RepositoryModelUnload(service_pb2.RepositoryModelUnloadRequest(model_name="other"))
        unloaded = await look(replace(target, model="other"))
        assert unloaded["model"].state is State.FAILED
        assert "--load-model=other" in unloaded["model"].fix
        unknown = await look(replace(target, model="tensorrt_lm"))
        assert "--model tensorrt_llm" in unknown["model"].fix
