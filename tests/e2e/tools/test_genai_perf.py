"""genai-perf and perf_analyzer, as they are: chats, and Triton's own protocol without a flag for our sake."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.tools.house import TRITON, House
from tests.e2e.tools.house import house as house_of
from tests.e2e.tools.installed import Load, Tools

TOOLS = Load
COUNT = 40
INPUTS: dict[str, dict[str, Any]] = {
    "ensemble": {"text_input": ["hello"], "max_tokens": [12], "stream": [True]},
    "tensorrt_llm": {
        "input_ids": {"content": [256, 1, 2], "shape": [3]}, "input_lengths": [3], "request_output_len": [12],
        "streaming": [True],
    },
}  # fmt: skip
"""What perf_analyzer sends to each model."""


async def genai_perf(
    tools: Tools, folder: Path, house: House, *arguments: str, passed: tuple[str, ...] = ()
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return its report, and its requests; `passed` are arguments of the perf_analyzer that it runs."""
    await tools.run(
        folder, "genai-perf", "profile", *arguments, "--streaming", "--tokenizer", house.tokenizer, "--isl", "40",
        "--osl", "12", "--request-count", str(COUNT), "--concurrency", "4", "--artifact-dir", "report",
        *(("--", *passed) if passed else ()),
    )  # fmt: skip
    (folder,) = (folder / "report").iterdir()
    (level,) = json.loads((folder / "profile_export.json").read_text())["experiments"]
    return json.loads((folder / "profile_export_genai_perf.json").read_text()), level["requests"]


def well(report: dict[str, Any], requests: list[dict[str, Any]]) -> None:
    """Fail unless every request was answered in full, a token at a time."""
    assert report["request_count"]["avg"] == len(requests) == COUNT
    for length, tokens in (("input_sequence_length", 40), ("output_sequence_length", 12)):
        assert (report[length]["min"], report[length]["max"]) == (tokens, tokens)


async def test_genai_perf_by_chats(tools: Tools, tmp_path: Path, house: House) -> None:
    """Every answer has its tokens, and none is an error."""
    report, requests = await genai_perf(tools, tmp_path, house, "-m", "a00", "--endpoint-type", "chat", "-u", house.url)
    well(report, requests)
    assert "error" not in json.dumps([request["response_outputs"] for request in requests])


async def test_genai_perf_by_kserve(tools: Tools, tmp_path: Path) -> None:
    """The ensemble is asked for an adapter by a parameter of the request."""
    async with house_of(tmp_path / "house", TRITON) as house:
        kserve = ("--endpoint-type", "kserve", "--backend", "tensorrtllm", "-u", house.grpc)
        named = ("--request-parameter", "lora_name:a00:string")
        report, requests = await genai_perf(tools, tmp_path, house, "-m", "ensemble", *kserve, passed=named)
        expected = house.served.expected("a00", 12)
    well(report, requests)
    for request in requests:
        assert "".join(output["text_output"] for output in request["response_outputs"]) == bytes(expected).decode()


@pytest.mark.parametrize("model", INPUTS)
async def test_perf_analyzer(tools: Tools, tmp_path: Path, model: str) -> None:
    """It measures each of Triton's models by its statistics: its own, and those of an ensemble's steps."""
    (tmp_path / "input.json").write_text(json.dumps({"data": [INPUTS[model]]}))
    async with house_of(tmp_path / "house", TRITON) as house:
        said = await tools.run(
            tmp_path, "perf_analyzer", "-m", model, "-i", "grpc", "-u", house.grpc, "--streaming",
            "--input-data", "input.json", "--concurrency-range", "4", "--request-count", str(COUNT),
            "--request-parameter", "lora_name:a00:string", "--profile-export-file", "report.json",
        )  # fmt: skip
        expected = house.served.expected("a00", 12)
    (level,) = json.loads((tmp_path / "report.json").read_text())["experiments"]
    assert len(level["requests"]) == COUNT
    for request in level["requests"]:
        outputs = request["response_outputs"]
        if model == "ensemble":
            assert "".join(output["text_output"] for output in outputs) == bytes(expected).decode()
        else:
            assert [output["output_ids"] for output in outputs] == expected
    assert ("Composing models" in said) == (model == "ensemble")
    # The engine's model also counts the loads of the adapter.
    counts = [int(count) for count in re.findall(r"Successful request count: (\d+)", said)]
    assert len(counts) == (4 if model == "ensemble" else 1)
    assert min(counts) >= COUNT
