"""CPU time of short answers: a request of few tokens through the sidecar, and through a bare `grpc.aio` relay.

All subjects take turns in each round, and the middle round counts. Requests on open streams are compared with the same
on the relay's streams; requests that are calls of their own (unary `ModelInfer`, `Generate`) with such calls of the
relay.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc.aio

from tests.bench import clients
from tests.bench.figures import Figure, middle
from tests.bench.processes import RelayProcess, SidecarProcess, backend_of
from tests.bench.relay import STREAMS, Subject, Traffic, streams
from tests.kit.emulated import EngineProcess, core_request, set_parameter
from tests.kit.serving import write_adapters

TOKENS, ROUNDS, REQUESTS = 4, 5, 2048
GOAL = 2.0
INFER = "/inference.GRPCInferenceService/ModelInfer"


async def bench(folder: Path) -> list[Figure]:
    names = write_adapters(folder / "adapters", 4)
    async with AsyncExitStack() as stack:
        relay, sidecar = await _pair(stack, folder)
        channels = [await stack.enter_async_context(clients.open_channel(place.data)) for place in (relay, sidecar)]
        unary = await _pair(stack, folder, "--no-decoupled")
        unary_channels = [await stack.enter_async_context(clients.open_channel(place.data)) for place in unary]
        subjects = [
            Subject(relay, await streams(stack, relay.data, [""], TOKENS, REQUESTS * TOKENS)),
            Subject(sidecar, await streams(stack, sidecar.data, names, TOKENS, REQUESTS * TOKENS)),
            Subject(unary[0], _unary(unary_channels[0], [""])),
            Subject(unary[1], _unary(unary_channels[1], names)),
            Subject(relay, _calls(channels[0])),
            Subject(sidecar, _generates(channels[1], names)),
        ]
        rounds = [[await subject.cost_us() for subject in subjects] for _ in range(ROUNDS + 1)]
    message, own_message, bare_unary, own_unary, call, generate = map(middle, zip(*rounds[1:], strict=True))
    label, stream = "bare grpc.aio relay", message * TOKENS
    return [
        Figure(
            f"short: KServe stream, {TOKENS} tokens", own_message * TOKENS, "µs/request", stream, label, "ratio", GOAL
        ),
        Figure("short: unary ModelInfer, 1 token", own_unary, "µs/request", bare_unary, label, "ratio", GOAL),
        Figure(
            f"short: Generate, {TOKENS} tokens", generate, "µs/request", call, f"{label}, a stream a request",
            "ratio", GOAL, f"beside a request on an open stream: {generate / stream:.2f}×",
        ),
    ]  # fmt: skip


async def _pair(stack: AsyncExitStack, folder: Path, *flags: str) -> tuple[RelayProcess, SidecarProcess]:
    engine = await stack.enter_async_context(EngineProcess("--compute", "none", "--kv-blocks", "65536", *flags))
    served = {"serve": str(folder / "adapters")}
    sidecar = SidecarProcess(folder, [backend_of(engine)], adapters=served)
    return (
        await stack.enter_async_context(RelayProcess(engine.grpc_address)),
        await stack.enter_async_context(sidecar),
    )


def _spread(requests: int) -> int:
    return requests // STREAMS


def _unary(channel: grpc.aio.Channel, names: list[str]) -> Traffic:
    method: Any = channel.unary_unary(
        INFER, request_serializer=clients.as_they_are, response_deserializer=clients.as_they_are
    )

    async def one(number: int) -> None:
        message = core_request("hello", 1, request_id=f"r{number}")
        if name := names[number % len(names)]:
            set_parameter(message, "lora_name", name)
        raw = message.SerializeToString()
        for _ in range(_spread(REQUESTS)):
            await method(raw)

    async def traffic() -> int:
        await asyncio.gather(*(one(number) for number in range(STREAMS)))
        return REQUESTS

    return traffic


def _calls(channel: grpc.aio.Channel) -> Traffic:
    """Ask the relay with a stream for each request, as each `Generate` is a call."""

    async def one(number: int) -> None:
        message = clients.named_request("", TOKENS, f"r{number}")
        for _ in range(_spread(REQUESTS)):
            stream = clients.open_stream(channel)
            await stream.write(message)
            await stream.done_writing()
            while await stream.read() is not grpc.aio.EOF:  # type: ignore[attr-defined]
                pass

    async def traffic() -> int:
        await asyncio.gather(*(one(number) for number in range(STREAMS)))
        return REQUESTS

    return traffic


def _generates(channel: grpc.aio.Channel, names: list[str]) -> Traffic:
    async def traffic() -> int:
        chosen = [names[number % len(names)] for number in range(STREAMS)]
        await asyncio.gather(*(clients.generate_many(channel, name, TOKENS, _spread(REQUESTS)) for name in chosen))
        return REQUESTS

    return traffic
