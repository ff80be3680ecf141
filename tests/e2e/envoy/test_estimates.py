"""Tokens of answers that go past the sidecar, as they are estimated: near enough to be charged by and to plan with."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.events import RunEnded
from tests.e2e.envoy.house import house
from tests.e2e.envoy.test_lanes import quiet
from tests.kit.serving import until, write_adapters

TOKENS, OFF_MAX = 300, 0.05


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ((), {"return_token_ids": False}),
        ((), {"return_token_ids": True, "prompt": "hello " * 400}),
        pytest.param((), {"messages": [{"role": "user", "content": "hello"}]}),
    ],
    ids=["plain", "prompt's ids", "chat"],
)
async def test_an_estimate_is_near(tmp_path: Path, options: tuple[str, ...], fields: dict[str, Any]) -> None:
    """Within a twentieth of what the engine has made."""
    names = write_adapters(tmp_path / "adapters", 1)
    async with house(tmp_path, names, options=options, time_scale=0.3) as running:
        body = {"model": names[0], "max_tokens": TOKENS, "stream": True, "prompt": "hello"} | fields
        path = "/v1/completions"
        if "messages" in body:
            del body["prompt"]
            path = "/v1/chat/completions"
        answer = await running.http.post(path, json=body)
        assert answer.content.endswith(b"data: [DONE]\n\n"), answer.text[-300:]
        await quiet(running)
        ended = next(event for event in running.served.recorder.events if isinstance(event, RunEnded))
        assert ended.seen.value == "estimated"
        assert abs(ended.output_tokens - TOKENS) <= OFF_MAX * TOKENS, ended.output_tokens


async def test_events_of_several_tokens_are_counted_by_the_engines_own_counter(tmp_path: Path) -> None:
    """The first chunk has one token and the others eight, so the first answers are counted too low."""
    names = write_adapters(tmp_path / "adapters", 1)
    options = ("--stream-interval", "8")
    async with house(tmp_path, names, options=options, time_scale=0.3) as running:

        async def estimates() -> list[int]:
            before = len(running.served.recorder.events)
            fields = {"return_token_ids": False}
            answers = await asyncio.gather(*(running.stream(names[0], TOKENS, **fields) for _ in range(4)))
            assert all(answer.is_complete for answer in answers)
            await quiet(running)
            found = running.served.recorder.events[before:]
            return [event.output_tokens for event in found if isinstance(event, RunEnded)]

        assert max(await estimates()) < TOKENS / 4
        scale = running.served.sidecar.gateway.backends["vllm-0"].follower.scale
        await until(lambda: scale.factor > 1)
        assert await estimates() == pytest.approx([TOKENS] * 4, rel=OFF_MAX)
