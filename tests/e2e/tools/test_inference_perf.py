"""inference-perf, as it is: a constant rate over eight adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.tools.house import House
from tests.e2e.tools.installed import InferencePerf, Tools
from tests.kit.peft_files import BASE_MODEL

TOOLS = InferencePerf
LENGTHS = {"mean": 45, "min": 30, "max": 60, "std_dev": 5, "total_count": 50}
OUTPUTS = {"mean": 12, "min": 12, "max": 12, "std_dev": 0, "total_count": 50}
DATA = {
    "completion": {"type": "random", "input_distribution": LENGTHS, "output_distribution": OUTPUTS},
    "chat": {"type": "mock"},
}
"""What it asks; of the data that it makes itself, chats are `mock` only."""


@pytest.mark.parametrize("api", DATA)
async def test_a_constant_rate(tools: Tools, tmp_path: Path, house: House, api: str) -> None:
    """No request fails, every adapter has a report, and no token count is the tool's own."""
    settings = {
        "api": {"type": api, "streaming": True},
        "data": DATA[api],
        "load": {
            "type": "constant",
            "stages": [{"rate": 20, "duration": 2}],
            "num_workers": 1,
            "lora_traffic_split": [{"name": name, "split": 1 / len(house.names)} for name in house.names],
        },
        "server": {"type": "vllm", "model_name": BASE_MODEL, "base_url": house.url, "ignore_eos": True},
        "tokenizer": {"pretrained_model_name_or_path": str(house.tokenizer)},
        "report": {"request_lifecycle": {"summary": True, "per_request": True, "per_adapter": True}},
        "storage": {"local_storage": {"path": str(tmp_path / "report")}},
    }
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    await tools.run(tmp_path, "inference-perf", "-c", "settings.json")
    reports = {path.name.removesuffix("_lifecycle_metrics.json"): path for path in (tmp_path / "report").glob("*.json")}
    summary, requests = (json.loads(reports[name].read_text()) for name in ("summary", "per_request"))
    good, count = summary["successes"], summary["load_summary"]["count"]
    assert (good["count"], summary["failures"]["count"], len(requests)) == (count, 0, count)
    assert count > 20
    assert good["client_fallback_requests"] == {"prompt": 0, "output": 0}
    assert good["token_count_mismatches"] == 0
    for request in requests:
        asked, used = json.loads(request["request"]), request["info"]["response_metrics"]["server_usage"]
        tokens = asked["max_tokens"]
        prompt = (
            house.prompt_tokens(asked["prompt"])
            if api == "completion"
            else house.chat_tokens(asked["messages"][0]["content"])
        )
        assert used == {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
    assert {f"adapter_{request['info']['lora_adapter']}" for request in requests} <= set(reports)
