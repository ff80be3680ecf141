"""A vLLM that was started otherwise than the sidecar's configuration says."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.e2e.vllm.fronted import ask, in_front
from tests.e2e.vllm.server import VllmServer
from tests.e2e.vllm.toy import Toy, prompt

PROMPT, TOKENS = prompt(4, 20), 6
MORE = {"device_pages": 8, "host_pages": 16, "rank_max": 64}


async def test_the_slots_that_it_tells_are_used(
    server: VllmServer, toy: Toy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are in its metrics from the first answer on, for which it is asked at the connect."""
    async with in_front(server, toy.adapters, tmp_path, {"engine": MORE}) as front:
        assert front.served.state.backends["vllm-0"].facts.device_pages == server.max_loras
        assert [record for record in caplog.records if "the smaller number is used" in record.getMessage()]
        told = await ask(front.client, "a00", PROMPT, TOKENS)
        assert told.status == 200, told.error


@pytest.mark.nightly
async def test_in_development_mode_it_tells_the_rank_too(toy: Toy, tmp_path: Path) -> None:
    async with (
        VllmServer(tmp_path / "vllm", toy.model, dev_mode=True) as server,
        in_front(server, toy.adapters, tmp_path, {"engine": MORE}) as front,
    ):
        facts = front.served.state.backends["vllm-0"].facts
        found = facts.device_pages, facts.host_pages, facts.rank_max
        assert found == (server.max_loras, server.max_cpu_loras, server.max_lora_rank)


@pytest.mark.nightly
@pytest.mark.parametrize("dev_mode", [False, True], ids=["by a load", "in development mode"])
async def test_without_lora_it_serves_its_base_model(
    toy: Toy, tmp_path: Path, caplog: pytest.LogCaptureFixture, dev_mode: bool
) -> None:
    caplog.set_level(logging.WARNING)
    async with (
        VllmServer(tmp_path / "vllm", toy.model, dev_mode=dev_mode, more=("--no-enable-lora",)) as server,
        in_front(server, toy.adapters, tmp_path) as front,
    ):
        assert front.served.state.backends["vllm-0"].facts.base_only
        assert (await ask(front.client, "base", PROMPT, TOKENS)).status == 200
        refused = await ask(front.client, "a00", PROMPT, TOKENS)
        assert (refused.status, "--enable-lora" in refused.error) == (503, True)
        assert [record for record in caplog.records if "takes no adapters" in record.getMessage()]
