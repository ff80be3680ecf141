"""NVIDIA's perf_analyzer, run as it is, and what it counted and was told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.triton.installed import TritonInstalled

RUN_S = 240.0


@dataclass(frozen=True)
class Measured:
    """One level of load: its requests, each with the tokens of its responses, in order."""

    concurrency: int
    answers: tuple[tuple[int, ...], ...]
    responses: tuple[int, ...]


def binary() -> Path:
    """Return the program itself: the wheel's own command does not pass its exit status on."""
    found = sorted(TritonInstalled.find().venv.glob("lib/python3*/site-packages/perf_analyzer/bin/perf_analyzer"))
    assert found, "the environment has no perf-analyzer: make .venv-triton"
    return found[-1]


def write_input(path: Path, tokens: int, streaming: bool, **more: Any) -> Path:
    """Write the input of all requests: a prompt of three tokens for the core model."""
    step = {
        "input_ids": [256, 1, 2],
        "input_lengths": [3],
        "request_output_len": [tokens],
        "streaming": [streaming],
        "exclude_input_in_output": [True],
        **more,
    }
    path.write_text(json.dumps({"data": [step]}))
    return path


async def perf_analyzer(address: str, data: Path, *arguments: str, parameters: Sequence[str] = ()) -> list[Measured]:
    """Run it against a server; return its levels of load. Fails with its output when it fails."""
    export = data.with_name(f"{data.stem}.export.json")
    export.unlink(missing_ok=True)  # it does not write over another run's
    given = [part for parameter in parameters for part in ("--request-parameter", parameter)]
    process = await asyncio.create_subprocess_exec(
        binary(), "-m", "tensorrt_llm", "-i", "grpc", "-u", address, "--input-data", data, "--shape", "input_ids:3",
        "--profile-export-file", export, *arguments, *given,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        async with asyncio.timeout(RUN_S):
            said, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    assert process.returncode == 0, said.decode()[-2000:]  # after a wrong argument all its help comes first
    return [_measured(experiment) for experiment in json.loads(export.read_text())["experiments"]]


def _measured(experiment: dict[str, Any]) -> Measured:
    requests = experiment["requests"]
    return Measured(
        experiment["experiment"]["value"],
        tuple(tuple(_tokens(request)) for request in requests),
        tuple(len(request["response_timestamps"]) for request in requests),
    )


def _tokens(request: dict[str, Any]) -> list[int]:
    tokens: list[int] = []
    for outputs in request["response_outputs"]:
        ids = outputs.get("output_ids", [])
        tokens += ids if isinstance(ids, list) else [ids]
    return tokens
