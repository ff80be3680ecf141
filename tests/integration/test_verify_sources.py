"""A probe.jsonl comes along with an adapter from wherever it is registered, and never keeps one from being served."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sidecar.lab.demo.model import ADAPTERS, SEED
from sidecar.lab.demo.run import LEARNED, PROMPTS
from sidecar.proto import admin_pb2 as pb
from tests.kit.cli_runs import Ended, runner
from tests.kit.emulated import running_engine
from tests.kit.faulty_http import Fault, FaultyServer, faulty_server
from tests.kit.serving import Serving, serving


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with faulty_server() as running:
        yield running


@pytest.fixture
def sidecar(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    return runner(capfd)


def with_probes(folder: Path, *expected: str) -> Path:
    """Write the demo's pirate, and what it is to answer to the first prompts."""
    if not folder.exists():
        shutil.copytree(ADAPTERS / "pirate", folder)
    lines = [json.dumps({"prompt": p, "expect": e}) for p, e in zip(PROMPTS, expected, strict=False)]
    (folder / "probe.jsonl").write_text("\n".join(lines))
    return folder


async def expectations(served: Serving, name: str = "pirate") -> tuple[str, str]:
    """Return the result and the sentence of what a verification says about known answers."""
    found = ("", "")
    async for message in served.adapters.Verify(pb.VerifyRequest(name=name, prompts=[pb.VerifyPrompt(text="Hello")])):
        if message.HasField("check") and message.check.check == "expectations":
            found = (message.check.result, message.check.sentence)
    return found


async def test_from_a_web_server(server: FaultyServer, tmp_path: Path) -> None:
    """It is brought with the weights, and again when the spool has lost them."""
    server.serve("pirate", with_probes(tmp_path / "origin", *LEARNED["pirate"]))
    origins = {"origins": {"allow": [server.url("")]}, "data_directory": str(tmp_path / "data")}
    async with running_engine(seed=SEED) as engine, serving([engine], **origins) as served:
        answer = await served.adapters.Register(pb.RegisterRequest(name="pirate", path=server.url("pirate")))
        assert await expectations(served) == ("passed", "4 of 4 lines of probe.jsonl match on trt-0")
        shutil.rmtree(tmp_path / "data" / "sources" / answer.adapter.digest)
        assert await expectations(served) == ("passed", "4 of 4 lines of probe.jsonl match on trt-0")


@pytest.mark.parametrize("status", [403, 404])
async def test_an_origin_that_does_not_give_it(status: int, server: FaultyServer, tmp_path: Path) -> None:
    """Missing, or refused as some stores refuse what is not there: the adapter is registered without."""
    server.serve("pirate", with_probes(tmp_path / "origin", *LEARNED["pirate"]))
    server.always["probe.jsonl"] = Fault(status=status)
    origins = {"origins": {"allow": [server.url("")]}, "data_directory": str(tmp_path / "data")}
    async with running_engine(seed=SEED) as engine, serving([engine], **origins) as served:
        await served.adapters.Register(pb.RegisterRequest(name="pirate", path=server.url("pirate")))
        assert await expectations(served) == (
            "skipped", "pirate ships no probe.jsonl, so no answer is known to be right",
        )  # fmt: skip


async def test_pushed_by_a_client(tmp_path: Path, sidecar: Callable[..., Ended]) -> None:
    """It is sent with the weights; the same weights with other known answers are the same version with these."""
    folder = with_probes(tmp_path / "pirate", "Ahoy there", LEARNED["pirate"][1])
    async with running_engine(seed=SEED) as engine, serving([engine]) as served:
        push = ("adapters", "register", "pirate", str(folder), "--push", "--admin", served.sidecar.admin_address)
        assert (await asyncio.to_thread(sidecar, *push)).code == 0
        result, sentence = await expectations(served)
        assert result == "failed"
        assert sentence.startswith("1 of 2 lines of probe.jsonl match on trt-0; ")
        with_probes(folder, *LEARNED["pirate"][:3])
        assert "was registered already" in (await asyncio.to_thread(sidecar, *push)).out
        assert await expectations(served) == ("passed", "3 of 3 lines of probe.jsonl match on trt-0")
