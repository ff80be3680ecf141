"""Engines behind a Service, found by its EndpointSlices, and addresses that are several of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from sidecar.discovery.found import Found
from sidecar.kubernetes.api import Api
from sidecar.kubernetes.endpoint_slices import EndpointSlices
from sidecar.kubernetes.services import problem_of, problems
from tests.kit.kubernetes_api import Fault, write_kubeconfig
from tests.kit.kubernetes_cluster import Cluster, cluster, needs_faults, on_clusters
from tests.kit.serving import until


@asynccontextmanager
async def finding(home: Cluster, service: str, port: str | int) -> AsyncIterator[list[frozenset[Found]]]:
    """Follow a Service's engines; what is given grows with each set that was found."""
    sets: list[frozenset[Found]] = []

    async def follow() -> None:
        async with aclosing(EndpointSlices(home.access, home.namespace, service, port).watch()) as found:
            async for each in found:
                sets.append(each)  # noqa: PERF401 — it never ends

    task = asyncio.create_task(follow())
    try:
        yield sets
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@on_clusters
async def test_engines_come_and_go_with_their_slices(kind: str) -> None:
    """All slices of the Service together, none of another one's; a set is told of once."""
    async with cluster(kind) as home:
        await home.add_slice("t-1", "triton", ["10.1.0.1", "10.1.0.2"])
        await home.add_slice("o-1", "other", ["10.1.0.9"])
        async with finding(home, "triton", "grpc") as sets:
            await until(lambda: bool(sets))
            assert {each.address for each in sets[-1]} == {"10.1.0.1:8001", "10.1.0.2:8001"}
            await home.add_slice("t-2", "triton", ["10.1.0.3"])
            await until(lambda: len(sets[-1]) == 3)
            leaving = {"addresses": ["10.1.0.3"], "conditions": {"ready": False, "serving": True, "terminating": True}}
            await home.patch("endpointslices", "t-2", {"endpoints": [leaving]})
            await until(lambda: Found("10.1.0.3", "10.1.0.3:8001", False, True) in sets[-1])
            await home.patch("endpointslices", "t-2", {"metadata": {"labels": {"x": "y"}}})
            await home.delete("endpointslices", "t-2")
            await until(lambda: len(sets[-1]) == 2)
            assert len(sets) == 4


@needs_faults
async def test_a_server_that_is_away_takes_no_engine(kind: str) -> None:
    """Nothing is yielded while it cannot be asked; what has changed meanwhile is found after."""
    async with cluster(kind) as home:
        await home.add_slice("t-1", "triton", ["10.1.0.1"])
        async with finding(home, "triton", 8001) as sets:
            await until(lambda: home.fake.watching("endpointslices"))
            await home.fake.stop()
            await home.fake.start()
            await home.add_slice("t-2", "triton", ["10.1.0.2"])
            await until(lambda: len(sets[-1]) == 2)
            assert [len(each) for each in sets] == [1, 2]


@on_clusters
async def test_a_service_that_is_not_there_is_told(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """No slice is the truth about it, and most often a wrong name; a wrong port is told with those there are."""
    async with cluster(kind) as home:
        await home.add_slice("t-1", "triton", ["10.1.0.1"])
        async with finding(home, "tritan", 8001) as misspelt, finding(home, "triton", 9) as elsewhere:
            await until(lambda: bool(misspelt) and bool(elsewhere))
        assert misspelt[0] == elsewhere[0] == frozenset()
        assert "tritan in" in caplog.text
        assert "no port 9; it has grpc (8001)" in caplog.text


@on_clusters
async def test_a_service_of_several_engines_is_no_backend(kind: str) -> None:
    """Behind its one address DNS shows one; its slices show how many there are, and the message what to write."""
    async with cluster(kind) as home:
        ports = [{"name": "grpc", "port": 80, "targetPort": 8001}]
        metadata = {"name": "triton"}
        await home.create(
            "services", {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"ports": ports}}
        )
        await home.add_slice("t-1", "triton", ["10.1.0.1"])
        api = Api(home.access)
        try:
            assert await problem_of(api, "triton", 80) is None
            await home.add_slice("t-2", "triton", ["10.1.0.2"])
            problem = await problem_of(api, f"triton.{home.namespace}.svc", 80)
            assert problem is not None
            assert "2 endpoints (10.1.0.1:8001, 10.1.0.2:8001)" in problem
            assert f"{{service: triton, namespace: {home.namespace}, port: grpc}}" in problem
            for host, port in (("nothing", 80), ("triton", 81), ("10.1.0.1", 80)):
                assert await problem_of(api, host, port) is None
        finally:
            await api.close()


@needs_faults
async def test_a_configuration_is_checked_against_the_cluster(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each place that is several engines is told of; one that may not be looked at, and no cluster, are no problem."""
    async with cluster(kind) as home:
        spec = {"ports": [{"port": 8001}]}
        for name in ("one", "two"):
            await home.create("services", {"kind": "Service", "metadata": {"name": name}, "spec": spec})
        await home.add_slice("one-1", "one", ["10.1.0.1"], ports=[{"port": 8001}])
        await home.add_slice("two-1", "two", ["10.1.0.2", "10.1.0.3"], ports=[{"port": 8001}])
        places = {"0": "one:8001", "1": "two.ml:8001", "2": "gpu-1.example.com:8001"}
        monkeypatch.setenv("KUBECONFIG", str(write_kubeconfig(tmp_path / "config", home.fake.address)))
        found = await asyncio.to_thread(problems, places)
        assert set(found) == {"1"}
        assert "port: 8001" in found["1"]
        home.fake.faults.append(Fault("get", "services", status=403, times=9))
        assert await asyncio.to_thread(problems, places) == {}
    monkeypatch.delenv("KUBECONFIG")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert await asyncio.to_thread(problems, places) == {}
