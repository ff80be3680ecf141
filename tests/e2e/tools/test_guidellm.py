"""guidellm, as it is: it looks whether the server is well, then asks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.tools.house import House
from tests.e2e.tools.installed import GuideLlm, Tools

TOOLS = GuideLlm
COUNT = 30


@pytest.mark.parametrize("profile", ["kind=concurrent,streams=4", "kind=sweep,sweep_size=3"], ids=["level", "sweep"])
async def test_a_level_and_a_sweep(tools: Tools, tmp_path: Path, house: House, profile: str) -> None:
    """No request fails at any level of load, and the server says how long prompts and answers are."""
    await tools.run(
        tmp_path, "guidellm", "run", "--backend", f"kind=openai_http,target={house.url},model=a00",
        "--profile", profile, "--constraint", f"kind=max_requests,count={COUNT}",
        "--data", "kind=synthetic_text,prompt_tokens=40,output_tokens=12",
        "--tokenizer", f"kind=hf_auto,model={house.tokenizer}",
        "--output", "kind=json,path=report.json", "--disable-console-interactive",
    )  # fmt: skip
    levels = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    assert len(levels) == (1 if "concurrent" in profile else 3)
    for level in levels:
        totals, requests = level["metrics"]["request_totals"], level["requests"]["successful"]
        assert (totals["errored"], totals["successful"]) == (0, len(requests))
        assert requests
        for request in requests:
            (message,) = json.loads(request["request_args"])["body"]["messages"]
            prompt = house.chat_tokens(message["content"][0]["text"])
            assert request["input_metrics"]["text_tokens"] == prompt
            assert request["output_metrics"]["text_tokens"] == 12
