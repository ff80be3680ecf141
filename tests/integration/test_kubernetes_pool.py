"""Engines found through the EndpointSlices of a Service, from the configuration to the answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidecar.config import parse
from sidecar.errors import Misused
from sidecar.serve.app import Sidecar
from tests.kit.found_engines import FREE, Names, Pool, in_front
from tests.kit.kubernetes_cluster import cluster
from tests.kit.serving import until, write_adapters

SERVICE = "triton"


async def test_pods_come_are_terminated_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a backend called after its pod. One that terminates takes nothing new, and is forgotten once gone."""
    write_adapters(tmp_path / "adapters", 2)
    pool = Pool(Names())
    async with cluster() as home:
        monkeypatch.setenv("KUBECONFIG", str(await home.kubeconfig(tmp_path)))
        first, second = await pool.start(), await pool.start()
        slice_of = {"ports": [{"name": "grpc", "port": pool.port, "protocol": "TCP"}]}
        endpoints = [
            {"addresses": [address], "targetRef": {"kind": "Pod", "name": f"triton-{number}"}}
            for number, address in enumerate((first, second))
        ]
        await home.add_slice("triton-abc", SERVICE, [], endpoints=endpoints[:1], **slice_of)
        config = pool.config(tmp_path / "adapters")
        config["backends"][0]["discover"] = {"endpoint_slices": {"service": SERVICE, "port": "grpc"}, "grace_s": 0.1}
        async with in_front(config) as served:
            takes = lambda: {each.id for each in served.state.backends.values() if each.takes_requests}  # noqa: E731
            await until(lambda: takes() == {"gpu-triton-0"})
            assert (await served.ask("a00")).tokens == served.expected("a00", 4)
            await home.patch("endpointslices", "triton-abc", {"endpoints": endpoints})
            await until(lambda: takes() == {"gpu-triton-0", "gpu-triton-1"})
            endpoints[0]["conditions"] = {"ready": False, "serving": True, "terminating": True}
            await home.patch("endpointslices", "triton-abc", {"endpoints": endpoints})
            await until(lambda: takes() == {"gpu-triton-1"})
            assert (await served.ask("a01")).origins[0].backend == "gpu-triton-1"
            await home.patch("endpointslices", "triton-abc", {"endpoints": endpoints[1:]})
            await until(lambda: set(served.state.backends) == {"gpu-triton-1"})
            assert (await served.ask("a00")).tokens == served.expected("a00", 4)
        for address in (first, second):
            await pool.stop(address)


async def test_without_a_cluster_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    discover = {"endpoint_slices": {"service": SERVICE, "port": "grpc"}}
    config = {
        "backends": [{"id": "gpu", "kind": "triton", "discover": discover}],
        "listeners": {"data": FREE, "admin": FREE, "http": FREE},
    }
    with pytest.raises(Misused, match="runs in no pod"):
        await Sidecar.start(parse(config, "the test"))
