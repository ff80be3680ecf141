"""An engine that stands still is sent nothing new long before it is lost, and loses nothing when it goes on."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from sidecar.core import stalls
from sidecar.core.events import BackendLost, BackendProbed
from tests.integration.test_faults_lost import SLOW, events
from tests.integration.test_vllm import ENGINE, answer_of, fronted
from tests.kit.emulated import EngineProcess
from tests.kit.faults import assert_nothing_left, assert_right, attempt
from tests.kit.serving import serving, until, write_adapters
from tests.kit.vllm_emulated import VllmProcess, running_vllm

COST = "llama-3.1-8b/a100_sxm/trtllm"
TOKENS = 100


@pytest.fixture(autouse=True)
def _sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here rests on how long the least silence is."""
    monkeypatch.setattr(stalls, "LEAST_NS", 1_000_000_000)


@pytest.mark.parametrize("record", [{}, {"metrics": None}], ids=["by its steps", "by a token"])
async def test_an_engine_that_is_frozen_and_thawed(tmp_path: Path, record: dict[str, Any]) -> None:
    """While it is only suspected, whoever comes is answered by the other engine; then it serves again."""
    write_adapters(tmp_path, 1)
    backend = {"engine": {"cost": COST}} | record
    async with (
        EngineProcess(*SLOW, time_scale=1.0) as first,
        EngineProcess(*SLOW, time_scale=1.0) as second,
        serving([first, second], tmp_path, backend=backend) as served,
    ):
        state = served.state
        begun = asyncio.create_task(attempt(served, "a00", TOKENS))
        await until(lambda: any(request.first_token for request in state.requests.values()))
        (request,) = state.requests.values()
        frozen = request.backend or ""
        engine, other = (first, "trt-1") if frozen == "trt-0" else (second, "trt-0")
        engine.signal(signal.SIGSTOP)
        await until(lambda: not state.backends[frozen].takes_requests)
        for _ in range(3):
            tried = await attempt(served, "a00")
            assert_right(served, tried)
            assert tried.origins[0].backend == other
        await until(
            lambda: BackendProbed(frozen, False, state.backends[frozen].silence.found) in served.recorder.events
        )
        assert not begun.done()
        assert not state.backends[frozen].takes_requests
        engine.signal(signal.SIGCONT)
        await until(lambda: state.backends[frozen].takes_requests)
        served.sidecar.gateway.set_drain(other, True)
        again = await attempt(served, "a00")
        assert_right(served, again)
        assert again.origins[0].backend == frozen
        assert_right(served, await begun, TOKENS)
        assert not events(served, BackendLost)
        await assert_nothing_left(served)


async def test_a_vllm_that_is_frozen_and_thawed(tmp_path: Path) -> None:
    """Where there is no other, whoever comes waits for it, and is answered once it goes on."""
    (name,) = write_adapters(tmp_path / "adapters", 1)
    backend = {"engine": ENGINE | {"cost": "llama-3.1-8b/a100_sxm/vllm"}}
    async with (
        VllmProcess("--compute", "none", time_scale=1.0) as engine,
        fronted([engine], tmp_path, backend=backend) as served,
    ):
        state = served.state.backends["vllm-0"]
        begun = asyncio.create_task(served.ask(name, TOKENS))
        await until(lambda: any(request.first_token for request in served.state.requests.values()))
        engine.signal(signal.SIGSTOP)
        await until(lambda: bool(state.silence.found))
        later = asyncio.create_task(served.ask(name))
        await until(lambda: len(state.queued) == 1)
        engine.signal(signal.SIGCONT)
        assert (await begun).tokens == answer_of(served, tmp_path, name, TOKENS)
        assert (await later).tokens == answer_of(served, tmp_path, name)
        assert not events(served, BackendLost)


async def test_the_first_request_after_a_long_pause_finds_an_engine_that_is_trusted(tmp_path: Path) -> None:
    """Its silence counts from the request on: a first token that is later than the next look makes no loss."""
    write_adapters(tmp_path / "adapters", 1)
    (tmp_path / "shared").mkdir()
    async with (
        running_vllm(compute="none", max_loras=2, max_cpu_loras=4, time_scale=100.0) as (engine, _),
        fronted([engine], tmp_path) as served,
    ):
        backend: Any = served.sidecar.gateway.backends["vllm-0"]
        assert len((await served.ask("", 1)).tokens) == 1
        await asyncio.sleep(2 * backend._look_s)  # so that the last look has seen the last step
        backend.pulse._heard_at_s = backend.pulse._moved_at_s = monotonic() - 1000
        assert len((await served.ask("", 1)).tokens) == 1
        assert not events(served, BackendLost)
