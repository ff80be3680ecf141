"""A sidecar before an emulated engine, and what a guest of it is told against what the engine was asked.

The engine's own log says with which adapter each request ran, and what was sent to it is read once more as a C++ server
would (`oracle`). A guest may use `sql` and `chat`, and `chef`, which the engine has as well, never.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
from tritonclient.grpc import service_pb2

from sidecar.backends.triton.streams import Run
from sidecar.proto import admin_pb2, gateway_pb2
from tests.fuzz.wire.oracle import ids_named
from tests.fuzz.wire.within import Aborted, Within
from tests.kit.emulated import running_engine
from tests.kit.peft_files import write_adapter
from tests.kit.serving import Serving, serving

ADAPTERS = ("sql", "chat", "chef")
COOK, GUEST = "the-cook-3f1c", "guest"
PATIENCE_S = 60.0
INFER, STREAM = (f"/inference.GRPCInferenceService/Model{verb}" for verb in ("Infer", "StreamInfer"))
GENERATE = "/lorasidecar.v1.Gateway/Generate"
_RUN = re.compile(r"\d+\.\d+")
_VERSION = "lora_version"


Ended = Callable[[], list[Any]]


@dataclass(frozen=True)
class Told:
    """What a client was told: the version that answered, "" for the base model, None where it was an error."""

    version: str | None
    error: str = ""


class House:
    """The guest's ways in. Requests go one after another, so that what the engine logs meanwhile is theirs."""

    def __init__(self, served: Serving, ended: Ended, http: httpx.AsyncClient, sent: list[bytes]) -> None:
        self.served = served
        self.ids: dict[str, int | None] = {"": None}
        self._ended = ended
        self._http = http
        self._sent = sent
        self._metadata = (("lora-tenant", GUEST),)
        channel = served.channel
        self._unary: Any = channel.unary_unary(INFER)
        self._generate: Any = channel.unary_stream(GENERATE)
        self._stream: Any = channel.stream_stream(STREAM)
        self._call: Any = None
        self._within = Within(served.sidecar, self._metadata)

    async def learn(self, ask: Any) -> None:
        """Learn the engine's ids of the adapters, from honest requests, and what the base model is called."""
        for model in (await self._http.get("/v1/models")).json()["data"]:
            self.ids[model["id"]] = None
        for name in ADAPTERS:
            await ask(name)
            (run,) = [run for run in self._runs() if run.tokens]
            self.ids[name] = run.task_id
        self._sent.clear()

    async def unary(self, raw: bytes, wired: bool) -> Told:
        try:
            sent = self._unary(raw, metadata=self._metadata, timeout=PATIENCE_S) if wired else self._within.unary(raw)
            answer = service_pb2.ModelInferResponse.FromString(await sent)
        except (grpc.aio.AioRpcError, Aborted) as error:
            return _refused(error)
        return Told(_version_in(answer) or "")

    async def stream(self, raw: bytes, wired: bool) -> Told:
        """Send a message, by the wire on a stream that stays open, and take what comes until its end."""
        version = None
        async with asyncio.timeout(PATIENCE_S):
            async for one in self._on_stream(raw) if wired else _each(await self._within.stream(raw)):
                answer = service_pb2.ModelStreamInferResponse.FromString(one)
                version = _version_in(answer.infer_response) or version
                if answer.error_message:
                    return Told(None, answer.error_message.partition("]")[0].strip("["))
                if answer.infer_response.parameters["triton_final_response"].bool_param:
                    return Told(version or "")
        raise AssertionError("a stream ended before its answer")

    async def _on_stream(self, raw: bytes) -> AsyncIterator[bytes]:
        if self._call is None or self._call.done():
            self._call = self._stream(metadata=self._metadata)
        await self._call.write(raw)
        while True:
            yield await self._call.read()

    async def generate(self, raw: bytes, wired: bool) -> Told:
        version = ""
        try:
            if wired:
                sent = self._generate(raw, metadata=self._metadata, timeout=PATIENCE_S)
                answers = [gateway_pb2.GenerateResponse.FromString(answer) async for answer in sent]
            else:
                answers = await self._within.generate(raw)
        except (grpc.aio.AioRpcError, Aborted) as error:
            return _refused(error)
        for answer in answers:
            version = answer.origin.version or version
        return Told(version)

    async def admin(self, method: str, raw: bytes) -> Told:
        try:
            await self.served.admin_channel.unary_unary(method)(raw, timeout=PATIENCE_S)
        except grpc.aio.AioRpcError as error:
            return _refused(error)
        return Told(None, "answered")

    async def openai(self, body: bytes) -> Told:
        headers = {"content-type": "application/json", "x-lora-tenant": GUEST}
        answer = await self._http.post("/v1/completions", content=body, headers=headers)
        if answer.status_code != 200:
            return Told(None, f"HTTP {answer.status_code}")
        text = answer.text
        if text.startswith("data:"):
            text = text.partition("\n")[0].removeprefix("data:")
        return Told(str(json.loads(text)["model"]))

    def lies(self, told: Told) -> list[str]:
        """Say how what the engine was asked differs from what the client was told, since the last time."""
        runs, sent = self._runs(), self._sent[:]
        self._sent.clear()
        for kept in (self.served.recorder.events, self.served.recorder.effects):
            kept.clear()
        named = set().union(*(ids_named(message) for message in sent))
        said = [] if told.version is None else [self.ids.get(told.version.partition("@")[0], -1)]
        found = []
        if self.ids["chef"] in named | {run.task_id for run in runs}:
            found.append("the engine was asked for chef")
        if said and any(run.task_id != said[0] for run in runs if run.tokens):
            found.append(f"told {told.version!r}, and the engine ran {[run.task_id for run in runs]}")
        if said and sent and ids_named(sent[-1]) != ({said[0]} if said[0] is not None else set()):
            found.append(f"told {told.version!r}, and the message reads {ids_named(sent[-1])}")
        return found

    def _runs(self) -> list[Any]:
        """Return the clients' requests that ended in the engine since the last time."""
        return [run for run in self._ended() if _RUN.fullmatch(run.request_id)]


@asynccontextmanager
async def emulated_house(folder: Path, protocol: str, sent: list[bytes]) -> AsyncIterator[House]:
    """Run one before an emulated engine; `sent` are the messages that sidecars send (`tapped`)."""
    backend = {"adapters_dir": str(folder / "shared")} if protocol == "llmapi" else {}
    async with running_engine(compute="none", decoupled=False, protocol=protocol) as engine:

        def ended() -> list[Any]:
            log = engine._log.last
            new = list(log)
            log.clear()
            return new

        async with house(folder, engine, ended, sent, backend) as made:
            yield made


@asynccontextmanager
async def house(
    folder: Path, engine: Any, ended: Ended, sent: list[bytes], backend: dict[str, Any]
) -> AsyncIterator[House]:
    """Run one before an engine, of which `ended` returns the requests that have ended since the last time."""
    for seed, name in enumerate(ADAPTERS):
        write_adapter(folder / "roots" / name, seed=seed)
    rules: dict[str, Any] = {"tenant_from": "metadata", "legacy_task_ids": {7: "sql"}, "backend": backend}
    async with (
        serving([engine], roots=[folder / "roots"], **rules) as served,
        httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}", timeout=PATIENCE_S) as http,
    ):
        for name in ADAPTERS:
            allow = [COOK] if name == "chef" else []
            path = str(folder / "roots" / name)
            await served.adapters.Register(admin_pb2.RegisterRequest(name=name, path=path, allow=allow, hold_s=3600))
        made = House(served, ended, http, sent)
        await made.learn(lambda name: _honest(served, name))
        yield made


async def _honest(served: Serving, name: str) -> None:
    request = gateway_pb2.GenerateRequest(adapter=name, text="hello", max_tokens=1, tenant=COOK, stream=False)
    async for _ in served.gateway.Generate(request):
        pass


@contextmanager
def tapped() -> Iterator[list[bytes]]:
    """Note each message that a sidecar of this process sends to an engine."""
    message, sent = Run.message, []

    def noted(run: Run, stream: bool) -> bytes:
        sent.append(message(run, stream))
        return sent[-1]

    Run.message = noted  # type: ignore[method-assign]
    try:
        yield sent
    finally:
        Run.message = message  # type: ignore[method-assign]


def _refused(error: grpc.aio.AioRpcError | Aborted) -> Told:
    return Told(None, (error.code if isinstance(error, Aborted) else error.code()).name)


async def _each(messages: list[bytes]) -> AsyncIterator[bytes]:
    for message in messages:
        yield message


def _version_in(response: Any) -> str | None:
    return response.parameters[_VERSION].string_param if _VERSION in response.parameters else None
