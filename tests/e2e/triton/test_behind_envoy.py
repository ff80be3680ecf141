"""Unmodified NVIDIA programs through a real Envoy that asks the endpoint picker, to a real and an emulated Triton.

What is right is what the server itself tells the same program, to which the adapter's weights are its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sidecar.adapters.convert import convert
from sidecar.core.effects import Settle
from tests.e2e.envoy.house import LANES
from tests.e2e.envoy.outside import MOST, answered_by, log_used, nothing_is_left
from tests.e2e.envoy.server import EnvoyInstalled, EnvoyServer
from tests.e2e.installed import needed
from tests.e2e.triton.lanes import EMULATOR, TRITON, server_of
from tests.e2e.triton.loads import engine_has
from tests.e2e.triton.perf import perf_analyzer, write_input
from tests.e2e.triton.test_clients import told
from tests.kit.kserve_clients import CORE, PATIENCE_S, core_inputs, in_thread, sync_stream
from tests.kit.ports import free_port
from tests.kit.serving import Serving, serving, write_adapters

FREE = {"address": "127.0.0.1:0"}
NAME = "a00"
CALLS = "engines_h2"
"""The cluster of calls that the picker has been asked about."""

THREADS = 16
"""perf_analyzer has no more, each with a stream."""


@pytest.fixture(autouse=True, scope="module")
def _envoy() -> EnvoyInstalled:
    return needed(EnvoyInstalled)


before = pytest.mark.parametrize(
    ("kind", "lane"),
    [
        (TRITON, "duplex-streamed"),
        (EMULATOR, "duplex-streamed"),
        (EMULATOR, "duplex-duplex"),
        pytest.param(TRITON, "duplex-duplex", marks=pytest.mark.nightly),
    ],
)


@dataclass
class House:
    """A server, a sidecar in front of it, an Envoy that asks that, and the adapter's files for who has no sidecar."""

    server: Any
    served: Serving
    envoy: EnvoyServer
    converted: Path

    async def nothing_is_left(self) -> None:
        """Fail unless every request leaves the sidecar, and the engine by its own count."""
        await nothing_is_left(self.served)
        await engine_has(self.server, 0)

    async def directly(self, program: str, has_adapter: bool) -> Any:
        return await told(program, self.server.grpc_address, str(self.converted) if has_adapter else "")

    async def through(self, program: str, has_adapter: bool) -> Any:
        return await told(program, self.envoy.address, NAME if has_adapter else "")


@asynccontextmanager
async def house(folder: Path, kind: str, lane: str, decoupled: bool, in_path: bool = True) -> AsyncIterator[House]:
    """Run it. With `in_path` the picker knows where Envoy reaches the data listener."""
    write_adapters(folder / "loras", 1, size=0.4)
    convert(folder / "loras" / NAME, folder / "converted")
    request_mode, response_mode, needs = LANES[lane]
    data = f"127.0.0.1:{free_port()}"
    picker = FREE | needs | ({"in_path_grpc": data} if in_path else {})
    listeners = {"data": {"address": data}, "admin": FREE, "http": FREE, "probes": FREE, "endpoint_picker": picker}
    async with AsyncExitStack() as stack:
        server = server_of(kind, folder / "server", {"compute": "llama", "shape": "tiny", "decoupled": decoupled})
        stack.push_async_callback(server.kill)
        await server.start()
        served = await stack.enter_async_context(serving([server], folder / "loras", listeners=listeners))
        asked = served.sidecar.endpoint_picker_address
        envoy = EnvoyServer(folder / "envoy", asked, request_mode, response_mode, data=data, carries_calls=True)
        yield House(server, served, await stack.enter_async_context(envoy), folder / "converted")


@before
@pytest.mark.parametrize(
    ("program", "calls", "alone"),
    [("blocking", 22, 0), ("closing", 6, 6), ("callbacks", 1, 0), ("with_asyncio", 6, 3)],
    ids=["unary", "closed-streams", "open-streams", "both-streams"],
)
async def test_a_program_is_told_the_same(
    tmp_path: Path, kind: str, lane: str, program: str, calls: int, alone: int
) -> None:
    """For the base model and an adapter. It makes so many `calls`, of which `alone` are streams of one request each.

    These go past the sidecar in the mode that is meant for it.
    """
    async with house(tmp_path, kind, lane, decoupled=program != "blocking") as here:
        through = [await here.through(program, has_adapter) for has_adapter in (False, True)]
        await here.nothing_is_left()
        assert await answered_by(here.envoy, CALLS) == 2 * calls
        if lane == "duplex-streamed":
            assert await log_used(here.served) >= 2 * alone * MOST
        assert through == [await here.directly(program, has_adapter) for has_adapter in (False, True)]
    assert through[0] != through[1], "the adapter changes nothing, so that equal answers prove nothing"


@before
async def test_open_streams_are_refused_without_a_way(tmp_path: Path, kind: str, lane: str) -> None:
    """By the setting that is missing; streams whose side the program closes are carried all the same."""
    async with house(tmp_path, kind, lane, decoupled=True, in_path=False) as here:

        def ask() -> tuple[Any, Any]:
            with sync_stream(here.envoy.address) as (client, answers):
                client.async_stream_infer(CORE, core_inputs(4), parameters={"lora_name": NAME})
                found: tuple[Any, Any] = answers.get(timeout=PATIENCE_S)
                return found

        result, error = await in_thread(ask)
        assert result is None
        assert error.status() == "StatusCode.FAILED_PRECONDITION"
        assert "listeners.endpoint_picker.in_path_grpc" in error.message()
        assert await answered_by(here.envoy, CALLS) == 0
        assert await here.through("closing", True) == await here.directly("closing", True)
        await here.nothing_is_left()


@before
@pytest.mark.parametrize("decoupled", [False, True], ids=["unary", "streaming"])
@pytest.mark.parametrize(("asked", "level"), [(40, 4), pytest.param(2000, 32, marks=pytest.mark.nightly)])
async def test_perf_analyzer(tmp_path: Path, kind: str, lane: str, decoupled: bool, asked: int, level: int) -> None:
    """It counts as many answers as it asked for, and as we; each has the tokens that the server gives directly."""
    async with house(tmp_path, kind, lane, decoupled) as here:
        right = (await here.directly("callbacks" if decoupled else "blocking", True))["tokens-0"]
        data = write_input(tmp_path / "input.json", len(right), decoupled)
        load = ["--request-count", str(asked), "--concurrency-range", str(level)]
        (measured,) = await perf_analyzer(
            here.envoy.address, data, *load, *(["--streaming"] if decoupled else []),
            parameters=[f"lora_name:{NAME}:string"],
        )  # fmt: skip
        await here.nothing_is_left()
        assert measured.answers == (tuple(right),) * asked
        assert measured.responses == (len(right) if decoupled else 1,) * asked
        settled = Counter(settle.outcome.value for settle in here.served.recorder.of(Settle))
        assert settled == {"ok": asked}
        assert await answered_by(here.envoy, CALLS) == (min(level, THREADS) if decoupled else asked)
