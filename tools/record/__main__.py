"""`python -m tools.record URL`: see the package."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import difflib
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

from sidecar.lab.engine.trtllm import TrtllmOptions, serve_trtllm
from tools.record.copies import Copies
from tools.record.deadly import DEEDS, what_becomes_of
from tools.record.questions import questions_for
from tools.record.server import Server

Record = dict[str, Any]


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.record", description=__doc__)
    add = parser.add_argument
    add("url", help="where your trtllm-serve is, as http://host:8000")
    add("--adapter", type=Path, help="a PEFT folder that your server can load; without it there are fewer questions")
    add("--scratch", type=Path, help="a folder for copies of it that your server sees by the same path")
    add("--model-config", help="config.json of your base model, for adapters of its size")
    add("--max-lora-rank", type=int, default=64, help="as your server was started")
    add("--max-loras", type=int, help="as your server was started")
    add("--max-cpu-loras", type=int, help="as your server was started")
    add("--lora-modules", help="lora_target_modules of your server, by commas; '' if LoRA is off")
    add("--deadly", choices=sorted(DEEDS), help="ask this alone, which ends your server")
    add("--patience", type=float, default=20.0, help="seconds without a word that count as hanging")
    add("--write", type=Path, help="write what your server said, as JSON")
    return parser


async def compare(asked: argparse.Namespace) -> tuple[Record, Record]:
    """Return what a server and the emulated one said to the same questions."""
    below = asked.scratch or (asked.adapter.parent if asked.adapter else None)
    with tempfile.TemporaryDirectory(dir=below) as scratch:
        # The server may run as another user.
        os.chmod(scratch, 0o755)  # noqa: PTH101 - async
        copies = Copies(asked.adapter, Path(scratch)) if asked.adapter else None
        async with _server(asked.url, copies, asked) as real:
            options = await _settings_of(real, asked)
            said = await _record(real, asked.deadly)
        emulator = await serve_trtllm(options)
        try:
            async with _server(f"http://{emulator.http_address}", copies, asked) as emulated:
                emulated.era = real.era
                return said, await _record(emulated, asked.deadly)
        finally:
            await emulator.stop()


def differences(real: Record, emulated: Record) -> list[str]:
    """Return the questions with other answers, each with the lines that differ: - the server's, + the emulator's."""
    lines = []
    for name in real:
        if real[name] != emulated[name]:
            lines += [name, *(f"    {line}" for line in _changed_lines(real[name], emulated[name]))]
    return lines


def _changed_lines(real: Any, emulated: Any) -> list[str]:
    pair = [json.dumps(each, indent=1, ensure_ascii=False).splitlines() for each in (real, emulated)]
    return [line for line in difflib.unified_diff(*pair, n=2, lineterm="") if not line.startswith(("@@", "---", "+++"))]


@contextlib.asynccontextmanager
async def _server(url: str, copies: Copies | None, asked: argparse.Namespace) -> AsyncIterator[Server]:
    server = Server(url, copies, asked.patience, asked.max_lora_rank, asked.max_loras or 8)
    try:
        yield server
    finally:
        await server.close()


async def _settings_of(server: Server, asked: argparse.Namespace) -> TrtllmOptions:
    """Return the emulator's options: what the command line says, and what the server shows of itself."""
    version = (await server.get("/version")).json()["version"]
    server.era = "1.2" if version.startswith("1.2") else "main"
    await server.complete()
    given: dict[str, Any] = {"max_loras": asked.max_loras, "max_cpu_loras": asked.max_cpu_loras}
    if asked.model_config:
        given |= {"shape": asked.model_config, "compute": "none"}
    if asked.lora_modules is not None:
        given["lora_modules"] = tuple(name for name in asked.lora_modules.split(",") if name)
    return TrtllmOptions(
        era=server.era,
        time_scale=0.0,
        max_seq_tokens=1 << 17,
        kv_blocks=1 << 16,
        max_lora_rank=asked.max_lora_rank,
        iteration_stats=bool((await server.get("/metrics")).json()),
        perf_metrics=(await server.get("/prometheus/metrics")).status_code == httpx.codes.OK,
        **given,
    )


async def _record(server: Server, deadly: str | None) -> Record:
    if deadly is not None:
        return {deadly: await what_becomes_of(server, DEEDS[deadly])}
    return {question.__name__: await _asked(server, question) for question in questions_for(server)}


async def _asked(server: Server, question: Any) -> Any:
    """Return the answer to a question; a server that does not keep to HTTP or JSON is an answer too."""
    try:
        return json.loads(json.dumps(await question(server)))
    except (httpx.HTTPError, ValueError, LookupError) as error:
        return f"{type(error).__name__}: {error}"


def main(arguments_given: list[str] | None = None) -> int:
    """Run the command; return 0 if both say the same, 1 if not."""
    asked = arguments().parse_args(arguments_given)
    if asked.deadly and asked.adapter is None:
        print("--deadly needs --adapter", file=sys.stderr)
        return 2
    real, emulated = asyncio.run(compare(asked))
    if asked.write:
        asked.write.write_text(json.dumps(real, indent=1, ensure_ascii=False) + "\n")
    found = differences(real, emulated)
    print(*found, sep="\n") if found else None
    same = sum(real[name] == emulated[name] for name in real)
    print(f"{same} of {len(real)} questions are answered alike")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
