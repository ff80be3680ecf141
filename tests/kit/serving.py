"""A whole sidecar in the test's event loop, in front of emulated engines, and its clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio

from sidecar.config import parse, validated, written_in
from sidecar.core.effects import Effect
from sidecar.core.events import Event
from sidecar.core.facts import Layout, packed_key, task_id_of
from sidecar.lab.engine.kserve.compute import dummy_token
from sidecar.lab.engine.tokens import BOS
from sidecar.lab.engine.trtllm import TrtllmServer
from sidecar.proto import admin_pb2_grpc, gateway_pb2, gateway_pb2_grpc
from sidecar.serve.app import Sidecar
from sidecar.serve.reloading import Source
from tests.kit.peft_files import write_adapter
from tests.kit.trtllm_emulated import TrtllmProcess

PATIENCE_S = 60.0
"""How long a test waits for something that must happen; much longer than it takes."""


class Recorder:
    """An observer that records every event and effect of a sidecar's core."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.effects: list[Effect] = []

    def observed(self, event: Event, effects: Sequence[Effect], now_ns: int) -> None:
        self.events.append(event)
        self.effects += effects

    def count(self, kind: type) -> int:
        return sum(isinstance(effect, kind) for effect in self.effects)

    def of(self, kind: type) -> list[Any]:
        return [effect for effect in self.effects if isinstance(effect, kind)]


@dataclass
class Serving:
    """A running sidecar, its recorded events and effects, and gRPC stubs."""

    sidecar: Sidecar
    recorder: Recorder
    channel: grpc.aio.Channel
    admin_channel: grpc.aio.Channel
    gateway: Any = field(init=False)
    adapters: Any = field(init=False)
    backends: Any = field(init=False)
    queues: Any = field(init=False)
    replicas: Any = field(init=False)
    configuration: Any = field(init=False)

    def __post_init__(self) -> None:
        self.gateway = gateway_pb2_grpc.GatewayStub(self.channel)
        self.adapters = admin_pb2_grpc.AdaptersStub(self.admin_channel)
        self.backends = admin_pb2_grpc.BackendsStub(self.admin_channel)
        self.queues = admin_pb2_grpc.QueuesStub(self.admin_channel)
        self.replicas = admin_pb2_grpc.ReplicasStub(self.admin_channel)
        self.configuration = admin_pb2_grpc.ConfigurationStub(self.admin_channel)

    @property
    def state(self) -> Any:
        return self.sidecar.gateway.state

    def task_id(self, name: str) -> int:
        return task_id_of(packed_key(self.state.names[name].digest, Layout("float16")))

    def expected(self, name: str, count: int) -> list[int]:
        """Return the tokens that an engine with dummy compute answers for an adapter; "" is the base model."""
        task_id = self.task_id(name) if name else 0
        return [dummy_token(task_id, position) for position in range(count)]

    async def ask(self, adapter: str, tokens: int = 4, prompt: int = 5, **fields: Any) -> Answer:
        """Generate from a prompt of token ids. Raises AioRpcError if the sidecar answers with an error."""
        return await self.ask_tokens(adapter, [BOS, *range(prompt - 1)], tokens, **fields)

    async def ask_tokens(self, adapter: str, prompt: Sequence[int], tokens: int, **fields: Any) -> Answer:
        """Generate from a prompt. Raises AioRpcError if the sidecar answers with an error."""
        ids = gateway_pb2.TokenIds(ids=prompt)
        answer = Answer()
        request = gateway_pb2.GenerateRequest(adapter=adapter, tokens=ids, max_tokens=tokens, **fields)
        call = self.gateway.Generate(request)
        try:
            async for response in call:
                answer.messages += 1
                answer.tokens += response.token_ids
                if response.HasField("origin"):
                    answer.origins.append(response.origin)
        finally:
            call.cancel()  # a task that is cancelled while the call's metadata arrives leaves it open
        return answer


@dataclass
class Answer:
    """A client's answer. `origins` must have one entry: two mean that the answer ended twice."""

    tokens: list[int] = field(default_factory=list)
    origins: list[Any] = field(default_factory=list)
    messages: int = 0


@asynccontextmanager
async def serving(
    engines: Sequence[Any],
    adapters: Path | None = None,
    roots: Sequence[Path] = (),
    until_up: bool = True,
    file: Path | None = None,
    **record: Any,
) -> AsyncIterator[Serving]:
    """Run a sidecar in front of engines (`tests.kit.emulated` servers or processes); wait until all are up if so asked.

    `adapters` is the folder whose subfolders are served, `roots` may be registered from; `record` is configuration, and
    its `backend` (a dict) goes into every backend's entry. The configuration is read from `file`, if there is one.
    Engines are not asked about their weights unless `weights_check` is given: tests count what engines have.
    """
    backend = record.pop("backend", {})
    record = {"weights_check": "off"} | record
    free = {"address": "127.0.0.1:0"}
    config = {
        "backends": [place_of(engine, number) | backend for number, engine in enumerate(engines)],
        "listeners": {"data": free, "admin": free, "http": free},
        "adapters": ({"serve": str(adapters)} if adapters else {}) | {"roots": [str(root) for root in roots]},
    }
    if file is None:
        sidecar = await Sidecar.start(parse(config | record, "the test"))
    else:
        source = written(file, config | record)
        sidecar = await Sidecar.start(source.read(), source=source)
    recorder = Recorder()
    sidecar.gateway.observe(recorder)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(sidecar.stop)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(sidecar.data_address))
        admin = await stack.enter_async_context(grpc.aio.insecure_channel(sidecar.admin_address))
        if until_up:
            await until(lambda: all(b.takes_requests for b in sidecar.gateway.state.backends.values()))
        yield Serving(sidecar, recorder, channel, admin)


def written(file: Path, record: Mapping[str, Any]) -> Source:
    """Write a configuration, and return it as what a sidecar is started with."""
    file.write_text(json.dumps(record))
    return Source(file, lambda: validated(written_in(file, {})))


def place_of(engine: Any, number: int) -> dict[str, str]:
    if isinstance(engine, TrtllmServer | TrtllmProcess):
        return {"url": f"trtllm://{engine.http_address}", "id": f"trtllm-{number}"}
    if not hasattr(engine, "grpc_address"):
        return {"url": f"vllm://{engine.http_address}", "id": f"vllm-{number}"}
    metrics = {"metrics": f"http://{engine.metrics_address}/metrics"} if engine.metrics_address else {}
    return {"url": f"triton://{engine.grpc_address}", "id": f"trt-{number}"} | metrics


async def until(holds: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    """Wait until a condition holds; fail after `patience_s`."""
    async with asyncio.timeout(patience_s):
        while not holds():
            await asyncio.sleep(0.005)


async def until_async(holds: Callable[[], Awaitable[bool]], patience_s: float = PATIENCE_S) -> None:
    """Wait until what has to be asked for holds; fail after `patience_s`."""
    async with asyncio.timeout(patience_s):
        while not await holds():
            await asyncio.sleep(0.05)


def write_adapters(folder: Path, count: int, **options: Any) -> list[str]:
    """Write PEFT folders `a00`, `a01`, … and return their names."""
    names = [f"a{number:02}" for number in range(count)]
    for seed, name in enumerate(names):
        write_adapter(folder / name, seed=seed, **options)
    return names
