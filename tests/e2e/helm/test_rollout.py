"""A rollout of three gateways as Kubernetes does it, under load, with what the chart renders: no request fails."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random

import grpc.aio

from sidecar.proto import gateway_pb2, gateway_pb2_grpc
from tests.e2e.helm.pods import Balancer, Pod
from tests.e2e.helm.rendering import Renderer, configuration, one
from tests.kit.emulated import EngineProcess
from tests.kit.peft_files import write_adapter
from tests.kit.redis_servers import running

REPLICAS, ENGINES, CLIENTS, TOKENS = 3, 2, 4, 8
NAMES = ("sql", "chef", "legal")
PROPAGATION_S = 0.3
"""How long balancers go on sending to a pod that is ending; the preStop hook waits for longer."""


class Clients:
    """Ask by name, each request on a connection of its own, until told to stop; whatever goes wrong is kept."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._leave = asyncio.Event()
        self.answers: dict[str, set[tuple[int, ...]]] = {name: set() for name in NAMES}
        self.answered = 0
        self.failures: list[str] = []

    async def run(self) -> None:
        await asyncio.gather(*(self._ask_again_and_again(number) for number in range(CLIENTS)))

    def stop(self) -> None:
        self._leave.set()

    async def more(self) -> None:
        """Wait for twenty more answers, or a failure."""
        enough = self.answered + 20
        while self.answered < enough and not self.failures:
            await asyncio.sleep(0.01)

    async def _ask_again_and_again(self, number: int) -> None:
        while not self._leave.is_set():
            number += 1
            name = NAMES[number % len(NAMES)]
            try:
                self.answers[name].add(await self._ask(name))
                self.answered += 1
            except grpc.aio.AioRpcError as error:
                self.failures.append(f"{name}: {error.code().name}: {error.details()}")

    async def _ask(self, name: str) -> tuple[int, ...]:
        ids = gateway_pb2.TokenIds(ids=[1, 2, 3])
        request = gateway_pb2.GenerateRequest(adapter=name, tokens=ids, max_tokens=TOKENS)
        async with grpc.aio.insecure_channel(self._address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            answers = gateway_pb2_grpc.GatewayStub(channel).Generate(request)
            return tuple([token async for answer in answers for token in answer.token_ids])


async def test_rollout(newest: Renderer, tmp_path: Path) -> None:
    """Each old pod is taken off the balancer and ended after a new one is ready; the answers stay what they were."""
    for name in NAMES:
        write_adapter(tmp_path / "loras" / name, seed=len(name))
    async with AsyncExitStack() as stack:
        engines = [
            await stack.enter_async_context(EngineProcess("--compute", "none", time_scale=1.0)) for _ in range(ENGINES)
        ]
        redis = await stack.enter_async_context(running(tmp_path / "redis"))
        objects = newest.objects(
            {
                "replicaCount": REPLICAS,
                "identity": {"mode": "off"},
                "preStopSeconds": 1,
                "backends": [{"url": f"triton://{engine.grpc_address}"} for engine in engines],
                "redis": {"url": f"{redis.url}/0"},
                "config": {"adapters": {"serve": str(tmp_path / "loras")}, "replicas": {"lease_s": 2}},
            }
        )
        workload = one(objects, "Deployment")
        assert workload["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
        random = Random()
        net, ports = f"127.{random.randint(2, 250)}.{random.randint(2, 250)}", str(random.randint(2000, 2999))
        template, text = workload["spec"]["template"], configuration(objects)
        pods = [Pod(template, text, f"{net}.{n}", ports, tmp_path / f"pod-{n}") for n in range(1, 2 * REPLICAS + 1)]
        for pod in pods:
            stack.push_async_callback(pod.kill)
        balancer = Balancer()
        clients = Clients(await balancer.start())
        stack.callback(balancer.stop)
        await asyncio.gather(*(pod.start() for pod in pods[:REPLICAS]))
        balancer.pods = pods[:REPLICAS]
        asking = asyncio.create_task(clients.run())
        stack.callback(asking.cancel)
        await clients.more()
        for old, new in zip(pods[:REPLICAS], pods[REPLICAS:], strict=True):
            await new.start()
            balancer.pods = [*balancer.pods, new]
            ending = asyncio.create_task(old.end())
            await asyncio.sleep(PROPAGATION_S)
            balancer.pods = [pod for pod in balancer.pods if pod is not old]
            assert await ending == 0
            await clients.more()
        clients.stop()
        await asking
    assert clients.failures == []
    assert clients.answered > 20 * REPLICAS
    assert all(len(found) == 1 for found in clients.answers.values())
    assert len(set().union(*clients.answers.values())) == len(NAMES)
