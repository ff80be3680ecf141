"""Engines that are restarted by deleting their pods, as a Deployment makes them anew."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.kit.kubernetes_api import Fault
from tests.kit.kubernetes_cluster import Cluster, cluster
from tests.kit.peft_files import write_adapter
from tests.kit.serving import Serving, serving, until
from tests.kit.trtllm_emulated import TrtllmProcess
from tests.kit.trtllm_served import entry_of

SERVICE, LIMIT = "trtllm", 16


class Deployment:
    """Pods behind a Service, each with an engine. One that is deleted is replaced."""

    def __init__(self, home: Cluster, stack: AsyncExitStack) -> None:
        self.home = home
        self.stack = stack
        self.engines: dict[str, TrtllmProcess] = {}
        self.made = 0

    async def add(self) -> str:
        name = f"pod-{self.made}"
        self.made += 1
        engine = TrtllmProcess("--compute", "none", "--max-loras", "4", "--max-cpu-loras", "8", "--iteration-stats")
        self.engines[name] = await self.stack.enter_async_context(engine)
        spec = {"containers": [{"name": "engine", "image": "engine"}]}
        await self.home.create("pods", {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec})
        port = int(engine.http_address.rpartition(":")[2])
        await self.home.add_slice(
            f"slice-{name}",
            SERVICE,
            [],
            ports=[{"name": "http", "port": port, "protocol": "TCP"}],
            endpoints=[self.endpoint(name)],
        )
        return name

    def endpoint(self, name: str, **conditions: bool) -> dict[str, Any]:
        pod = {"kind": "Pod", "name": name}
        return {"addresses": ["127.0.0.1"], "targetRef": pod, "conditions": {"ready": True} | conditions}

    async def pods(self) -> set[str]:
        return {pod["metadata"]["name"] for pod in await self.home.list("pods")}

    async def deleted(self) -> str:
        """Wait until a pod is deleted, and let it end as the cluster does: terminating first, then gone."""
        async with asyncio.timeout(60):
            while not (gone := set(self.engines) - await self.pods()):
                await asyncio.sleep(0.02)
        (name,) = gone
        terminating = self.endpoint(name, ready=False, serving=True, terminating=True)
        await self.home.patch("endpointslices", f"slice-{name}", {"endpoints": [terminating]})
        return name

    async def end(self, name: str) -> None:
        await self.engines.pop(name).kill()
        await self.home.delete("endpointslices", f"slice-{name}")


@asynccontextmanager
async def deployed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Deployment, Serving]]:
    """Run two pods, and a sidecar that finds them and restarts them at their limit."""
    (folder / "steps").mkdir()
    async with AsyncExitStack() as stack:
        home = await stack.enter_async_context(cluster())
        monkeypatch.setenv("KUBECONFIG", str(await home.kubeconfig(folder)))
        deployment = Deployment(home, stack)
        pods = [await deployment.add() for _ in range(2)]
        entry = entry_of(folder, 4, 8) | {
            "id": "rl",
            "kind": "trtllm",
            "discover": {"endpoint_slices": {"service": SERVICE, "port": "http"}, "grace_s": 0.1},
            "host_versions_max": LIMIT,
            "host_versions_on_limit": "drain",
            "restart": {"delete_pod": True},
        }
        served = await stack.enter_async_context(
            serving([], None, [folder / "steps"], until_up=False, backends=[entry], openai={"load_calls": True})
        )
        await until(lambda: takers(served) == {f"rl-{pod}" for pod in pods})
        yield deployment, served


def takers(served: Serving) -> set[str]:
    return {backend.id for backend in served.state.backends.values() if backend.takes_requests}


async def load_until(served: Serving, folder: Path, enough: asyncio.Event) -> None:
    """Load steps, as a trainer does, until there are enough of them."""
    step = 0
    async with httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}", timeout=60) as http:
        while not enough.is_set():
            step += 1
            path = write_adapter(folder / "steps" / f"{step}", seed=step)
            record = {"lora_name": "grpo", "lora_path": str(path), "load_inplace": True}
            reply = await http.post("/v1/load_lora_adapter", json=record)
            assert reply.status_code == 200, reply.text


async def test_pods_are_deleted_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one only once another pod is up in the place of the last; the old one counts for nothing."""
    async with deployed(tmp_path, monkeypatch) as (deployment, served):
        enough = asyncio.Event()
        loading = asyncio.create_task(load_until(served, tmp_path, enough))
        first = await deployment.deleted()
        await until(lambda: f"rl-{first}" not in takers(served))
        assert served.sidecar.restarts.at == f"rl-{first}"
        await deployment.end(first)
        await until(lambda: f"rl-{first}" not in served.state.backends)
        (other,) = takers(served)
        await until(lambda: served.sidecar.gateway.backends[other].wear.versions > LIMIT)
        assert served.sidecar.restarts.at == f"rl-{first}"
        assert {f"rl-{pod}" for pod in await deployment.pods()} == {other}
        new = await deployment.add()
        second = await deployment.deleted()
        assert f"rl-{second}" == other
        assert f"rl-{new}" in takers(served)
        enough.set()
        await loading


async def test_a_pod_that_may_not_be_deleted_stays_in_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with deployed(tmp_path, monkeypatch) as (deployment, served):
        deployment.home.fake.faults.append(Fault("delete", "pods", 403, times=2))
        enough = asyncio.Event()
        loading = asyncio.create_task(load_until(served, tmp_path, enough))
        await until(lambda: caplog.text.count("a Role must allow it to delete pods there") == 2)
        enough.set()
        await loading
        assert len(await deployment.pods()) == 2
        assert len(takers(served)) == 2
