"""The OpenAI SDK, as it is."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.tools.house import TRITON, House
from tests.e2e.tools.house import house as house_of
from tests.e2e.tools.installed import Short, Tools

TOOLS = Short
PROGRAMS = Path(__file__).parent / "programs"


async def test_what_an_application_asks(tools: Tools, tmp_path: Path, house: House) -> None:
    """Models, chats, completions, streams, several prompts and choices: with their tokens, in every answer."""
    told = json.loads(await tools.run(tmp_path, "python", PROGRAMS / "with_openai.py", house.url, "a00"))
    assert set(told.pop("models")) >= set(house.names)
    unknown = told.pop("of nobody")
    text, chat = house.prompt_tokens("hello"), house.chat_tokens("hello")
    one = {"completion": 12, "choices": 1}
    at_once = {"prompt": chat, **one, "total": chat + 12}
    assert told == {
        "chat": at_once,
        "newer chat": at_once,
        "streamed chat": {"prompt": chat, "completion": 12, "total": chat + 12, "texts": 12},
        "completion": {"prompt": text, **one, "total": text + 12},
        "streamed completion": {"prompt": text, "completion": 12, "total": text + 12, "texts": 12},
        "prompts": {"prompt": 2 * text + 1, "completion": 24, "total": 2 * text + 25, "choices": 2},
        "choices": {"prompt": text, "completion": 24, "total": text + 24, "choices": 2},
        "at least": {"prompt": text, **one, "total": text + 12},
        "at once": [at_once] * 40,
    }
    assert (unknown["status"], unknown["code"]) == (404, 404)


async def test_log_probabilities(tools: Tools, tmp_path: Path) -> None:
    """Each token of an answer has one, from an ensemble that gives them; the emulated vLLM has none."""
    async with house_of(tmp_path / "house", TRITON, adapters=1, compute="llama", time_scale=0.0) as house:
        program = PROGRAMS / "with_openai_log_probs.py"
        told = json.loads(await tools.run(tmp_path, "python", program, house.url, "a00"))
    for log_probs in told.values():
        assert len(log_probs) == 12
        assert all(-100 < one <= 0 for one in log_probs)
