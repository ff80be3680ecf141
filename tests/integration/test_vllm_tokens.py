"""Tokens of a vLLM's answers are counted by what its events say, several to an event."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sidecar.core.events import RunEnded
from tests.integration.test_openai_triton import CHAT, COMPLETIONS, client_of
from tests.integration.test_vllm import fronted
from tests.kit.serving import Serving
from tests.kit.vllm_emulated import running_vllm

TOKENS, INTERVAL, EVENTS = 12, 4, 4
"""The first token comes alone, then come four, four and three."""
USER = {"role": "user", "content": 'a "token_ids":[1,2] b'}
USAGE = {"stream_options": {"include_usage": True}}
ALWAYS = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
CHOICES = {"n": 2, "temperature": 1}


def counted(served: Serving) -> list[int]:
    """Return the tokens of each run that has ended."""
    return [event.output_tokens for event in served.recorder.events if isinstance(event, RunEnded)]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("more", "tokens"),
    [
        ({}, EVENTS),
        ({"return_token_ids": True}, TOKENS),
        (USAGE, TOKENS),
        (ALWAYS, TOKENS),
        ({"return_token_ids": True, **CHOICES}, 2 * TOKENS),
        (ALWAYS | CHOICES, 2 * TOKENS),
        (CHOICES, 2 * EVENTS),
        ({"stream": False}, TOKENS),
    ],
)
async def test_tokens_that_come_together(tmp_path: Path, path: str, more: dict[str, Any], tokens: int) -> None:
    """By their ids, else by the usage, which may come at the end only; where there is neither an event is one."""
    (tmp_path / "adapters").mkdir()
    async with (
        running_vllm(compute="none", stream_interval=INTERVAL) as (engine, _),
        fronted([engine], tmp_path) as served,
        client_of(served) as client,
    ):
        asked = {"prompt": USER["content"]} if path == COMPLETIONS else {"messages": [USER]}
        body = {"model": "base", "max_tokens": TOKENS, "stream": True, "ignore_eos": True, **asked, **more}
        answer = await client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        assert counted(served) == [tokens]
