"""aiperf, as it is: chats with four adapters in turn."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.tools.house import House
from tests.e2e.tools.installed import Load, Tools

TOOLS = Load
COUNT = 40


async def test_chats_with_adapters_in_turn(tools: Tools, tmp_path: Path, house: House) -> None:
    """No request fails, prompts and answers have the tokens that the server says."""
    await tools.run(
        tmp_path, "aiperf", "profile", "-m", ",".join(house.names[:4]), "--model-selection-strategy", "round_robin",
        "--endpoint-type", "chat", "--streaming", "-u", house.url, "--tokenizer", house.tokenizer,
        "--isl", "40", "--isl-stddev", "5", "--osl", "12", "--request-count", str(COUNT), "--concurrency", "4",
        "--extra-inputs", "ignore_eos:true", "--extra-inputs", "min_tokens:12", "--use-server-token-count",
        "--ui", "none", "--artifact-dir", "report",
    )  # fmt: skip
    report, asked = (
        json.loads((tmp_path / "report" / f"{name}.json").read_text()) for name in ("profile_export_aiperf", "inputs")
    )
    assert (report["request_count"]["avg"], report["error_summary"]) == (COUNT, [])
    prompts = [payload["messages"][0]["content"] for one in asked["data"] for payload in one["payloads"]]
    assert len(prompts) == COUNT
    assert report["total_usage_prompt_tokens"]["avg"] == sum(map(house.chat_tokens, prompts))
    assert report["total_usage_completion_tokens"]["avg"] == COUNT * 12
    assert report["osl_mismatch_count"]["avg"] == 0
