"""Unmodified NVIDIA programs: what they are told through the sidecar is what the server tells them directly."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sidecar.adapters.convert import convert
from sidecar.core.effects import Settle
from tests.e2e.triton.loads import endings, servers
from tests.e2e.triton.perf import perf_analyzer, write_input
from tests.e2e.triton.server import TritonServer
from tests.kit.serving import Serving, serving, write_adapters

CLIENTS = Path(__file__).parent / "clients"
PROGRAM_S = 240.0
TOKENS = 12
"""Of each answer of the program that keeps them in shared memory."""
OUR_ID = re.compile(r"\d+\.\d+")
"""How a request that the sidecar passed on is called at the engine."""
NAMES = ("a00", "a01")


@dataclass
class House:
    """A server, a sidecar in front of it, and the adapters' files as a client without a sidecar needs them."""

    server: TritonServer
    served: Serving
    converted: Path

    async def directly(self, program: str, name: str = "") -> Any:
        return await told(program, self.server.grpc_address, str(self.converted / name) if name else "")

    async def through(self, program: str, name: str = "") -> Any:
        return await told(program, self.served.sidecar.data_address, name)

    def outcomes(self) -> Counter[str]:
        return Counter(settle.outcome.value for settle in self.served.recorder.of(Settle))

    def output_tokens(self) -> int:
        return sum(settle.output_tokens for settle in self.served.recorder.of(Settle))


@asynccontextmanager
async def house(folder: Path, decoupled: bool, **options: Any) -> AsyncIterator[House]:
    """Serve two adapters whose answers differ from each other's and from the base model's."""
    write_adapters(folder / "loras", len(NAMES), size=0.4)
    for name in NAMES:
        convert(folder / "loras" / name, folder / "converted" / name)
    async with (
        servers(folder, decoupled=decoupled, texts=True, **options) as (server,),
        serving([server], folder / "loras") as served,
    ):
        yield House(server, served, folder / "converted")


async def told(program: str, address: str, adapter: str = "") -> Any:
    """Run a program of `clients` in a process of its own and return what it printed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, CLIENTS / f"{program}.py", address, *([adapter] if adapter else []),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(PROGRAM_S):
            out, err = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    assert process.returncode == 0, err.decode()
    return json.loads(out)


@pytest.mark.parametrize(
    ("program", "decoupled", "requests"),
    [
        ("blocking", False, 22),
        pytest.param("with_asyncio", True, 29, marks=pytest.mark.nightly),
        ("callbacks", True, 9),
        ("shared_memory", True, 3),
        pytest.param("shared_memory", False, 3, marks=pytest.mark.nightly),
    ],
    ids=["blocking", "with_asyncio", "callbacks", "shared_memory-decoupled", "shared_memory-whole"],
)
async def test_a_program_is_told_the_same(tmp_path: Path, program: str, decoupled: bool, requests: int) -> None:
    """Base model and two adapters: by weights of the program's own directly, by name through the sidecar."""
    async with house(tmp_path, decoupled, engine={"compute": "llama"}) as here:
        directly = {"": await here.directly(program)}
        through = {"": await here.through(program)}
        for name in NAMES:
            through[name] = await here.through(program, name)
        for number, name in enumerate(NAMES):
            if number:
                await here.server.stop()  # the program's own id means another adapter from here on
                await here.server.start()
            directly[name] = await here.directly(program, name)
        assert through == directly
        answers = [json.dumps(answer) for answer in through.values()]
        assert len(set(answers)) == 3, "the adapters change nothing, so that equal answers prove nothing"
        assert here.outcomes() == {"ok": 3 * requests}
        if program == "shared_memory":  # whose tokens no message has
            assert here.output_tokens() == 3 * requests * TOKENS


async def test_a_program_that_asks_what_there_is(tmp_path: Path) -> None:
    """Metadata, configuration, index, readiness, versions and statistics are the server's, errors too.

    The index has the base model and the adapters as well.
    """
    async with house(tmp_path, decoupled=True) as here:
        through, directly = [await ask("metadata") for ask in (here.through, here.directly)]
        models = through["index"]["models"]
        ours = ("base", *sorted(NAMES))
        through["index"]["models"] = [model for model in models if model["name"] not in ours]
        assert [model["name"] for model in models if model["name"] in ours] == list(ours)
        assert through == directly


@pytest.mark.nightly
@pytest.mark.parametrize("decoupled", [True, False], ids=["streaming", "unary"])
async def test_perf_analyzer_counts_what_we_count(tmp_path: Path, decoupled: bool) -> None:
    """At each level of load, directly and through the sidecar: as many answers as it asked for, all of them right."""
    tokens, asked = 8, 60
    streaming = ["--streaming"] if decoupled else []
    levels = (1, 4, 16)
    async with house(tmp_path, decoupled) as here:
        data = write_input(tmp_path / "input.json", tokens, decoupled)
        for level in levels:
            load = [*streaming, "--request-count", str(asked), "--concurrency-range", str(level)]
            directly = await perf_analyzer(here.server.grpc_address, data, *load)
            before = here.outcomes()
            through = await perf_analyzer(
                here.served.sidecar.data_address, data, *load, parameters=["lora_name:a00:string"]
            )
            for (measured,), name in ((directly, ""), (through, "a00")):
                assert measured.concurrency == level
                assert measured.answers == (tuple(here.served.expected(name, tokens)),) * asked
                assert measured.responses == (tokens if decoupled else 1,) * asked
            assert here.outcomes() - before == {"ok": asked}
        ours = [run for run in endings([here.server]) if OUR_ID.fullmatch(run["request_id"])]
        assert len({run["request_id"] for run in ours}) == len(ours) == asked * len(levels)


@pytest.mark.nightly
async def test_perf_analyzer_sweeps(tmp_path: Path) -> None:
    """Levels of load one after another in one run, with windows of its own: no error, and no request is left over."""
    sweep = ["--streaming", "--concurrency-range", "1:9:4", "--measurement-mode", "count_windows"]
    steady = ["--measurement-request-count", "20", "--stability-percentage", "999", "--max-trials", "3"]
    async with house(tmp_path, decoupled=True) as here:
        data = write_input(tmp_path / "input.json", 8, True)
        address = here.served.sidecar.data_address
        measured = await perf_analyzer(address, data, *sweep, *steady, parameters=["lora_name:a01:string"])
        assert [level.concurrency for level in measured] == [1, 5, 9]
        counted = sum(len(level.answers) for level in measured)
        for level in measured:
            assert len(level.answers) >= 20
            assert set(level.answers) == {tuple(here.served.expected("a01", 8))}
        outcomes = here.outcomes()
        assert outcomes["ok"] >= counted
        assert set(outcomes) <= {"ok", "cancelled"}
        assert not here.served.sidecar.gateway.tickets
