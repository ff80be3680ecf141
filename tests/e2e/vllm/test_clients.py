"""Programs that were written for OpenAI's API or for vLLM itself, unmodified, through the sidecar."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from sidecar.core.effects import Settle
from tests.e2e.vllm.fronted import in_front
from tests.e2e.vllm.installed import VllmInstalled
from tests.e2e.vllm.server import VllmServer
from tests.e2e.vllm.toy import BASE_MODEL, NAMES, Toy
from tests.kit.emulated import running_engine
from tests.kit.serving import Serving, serving, write_adapters

TOKENS = 12
TEXT = "def parse(line):\n    return"
USER: Any = [{"role": "user", "content": "import os"}]
EXACT: Any = {"temperature": 0, "extra_body": {"ignore_eos": True, "return_token_ids": True}}
BENCHED = 48


async def test_the_asynchronous_client(either: VllmServer, toy: Toy, tmp_path: Path) -> None:
    """Completions and chats, whole and streamed; the models with their parent, and a model that there is not."""
    async with in_front(either, toy.adapters, tmp_path) as front:
        url = f"http://{front.served.sidecar.http_address}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            for name in NAMES[:3]:
                whole = await client.completions.create(model=name, prompt=TEXT, max_tokens=TOKENS, **EXACT)
                choice: Any = whole.choices[0]
                right = toy.greedy(toy.adapters / name, choice.prompt_token_ids, TOKENS)
                assert (whole.model, choice.token_ids, choice.finish_reason) == (name, right, "length")
                stream = await client.completions.create(
                    model=name, prompt=TEXT, max_tokens=TOKENS, stream=True, **EXACT
                )
                parts = [chunk.choices[0] async for chunk in stream]
                assert "".join(part.text for part in parts) == choice.text
                assert [token for part in parts for token in part.token_ids] == right
                assert await chats_agree(client, name)
            models = {model.id: model async for model in client.models.list()}
            assert set(models) >= {BASE_MODEL, *NAMES}
            assert models[BASE_MODEL].parent is None
            assert {models[name].parent for name in NAMES} == {BASE_MODEL}
            with pytest.raises(openai.NotFoundError) as missing:
                await client.completions.create(model="nobody", prompt=TEXT)
            error: Any = missing.value  # its code is a number, as vLLM's is
            assert (error.code, error.body["reason"]) == (404, "model_not_found")


async def chats_agree(client: openai.AsyncOpenAI, name: str) -> bool:
    """Whether a chat says the same whole and in events."""
    whole = await client.chat.completions.create(model=name, messages=USER, max_tokens=TOKENS, **EXACT)
    stream = await client.chat.completions.create(model=name, messages=USER, max_tokens=TOKENS, stream=True, **EXACT)
    parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert whole.choices[0].message.content
    return whole.choices[0].message.content == "".join(parts)


async def test_the_synchronous_client(server: VllmServer, toy: Toy, tmp_path: Path) -> None:
    """In a thread of its own."""
    async with in_front(server, toy.adapters, tmp_path) as front:
        url = f"http://{front.served.sidecar.http_address}/v1"

        def ask(name: str) -> tuple[list[int], list[int], str, str]:
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
                whole = client.completions.create(model=name, prompt=TEXT, max_tokens=TOKENS, **EXACT)
                choice: Any = whole.choices[0]
                stream = client.completions.create(model=name, prompt=TEXT, max_tokens=TOKENS, stream=True, **EXACT)
                streamed = "".join(chunk.choices[0].text for chunk in stream)
                return choice.prompt_token_ids, choice.token_ids, choice.text, streamed

        for name in NAMES[3:5]:
            asked, tokens, text, streamed = await asyncio.to_thread(ask, name)
            assert tokens == toy.greedy(toy.adapters / name, asked, TOKENS)
            assert text == streamed


@asynccontextmanager
async def behind(
    kind: str, request: pytest.FixtureRequest, toy: Toy, scratch: Path
) -> AsyncIterator[tuple[Serving, list[str]]]:
    """Run a sidecar in front of a vLLM, or of a Triton; returns the names that there are."""
    if kind == "vllm":
        server: VllmServer = request.getfixturevalue("server")
        async with in_front(server, toy.adapters, scratch) as front:
            yield front.served, NAMES[:6]
        return
    names = write_adapters(scratch / "adapters", 6)
    async with running_engine(compute="none") as engine, serving([engine], scratch / "adapters") as served:
        yield served, names


@pytest.fixture(params=["vllm", "triton"])
def kind(request: pytest.FixtureRequest) -> str:
    """What stands behind the sidecar. The shared server is made ready before there is an event loop."""
    if request.param == "vllm":
        request.getfixturevalue("server")
    return str(request.param)


@pytest.mark.nightly
async def test_vllms_own_benchmark(kind: str, request: pytest.FixtureRequest, toy: Toy, tmp_path: Path) -> None:
    """`vllm bench serve --lora-modules …`: all its requests succeed, over all the adapters that it was given."""
    async with behind(kind, request, toy, tmp_path) as (served, names):
        result = await benchmark(served.sidecar.http_address, toy, names, tmp_path / "result.json")
        settled = Counter(one.name for one in served.recorder.of(Settle) if one.outcome.value == "ok")
    assert (result["completed"], result["failed"]) == (BENCHED, 0)
    assert result["errors"] == [""] * BENCHED
    assert all(result["generated_texts"])
    assert set(settled) - {""} == set(names)
    assert settled.total() >= BENCHED
    print(
        f"\n{kind}: {result['request_throughput']:.1f} requests/s, {result['median_ttft_ms']:.0f} ms to the first token"
    )


async def benchmark(address: str, toy: Toy, names: list[str], result: Path, count: int = BENCHED) -> dict[str, Any]:
    """Run vLLM's benchmark, of so many requests, against an address and return its result."""
    installed = VllmInstalled.find()
    command = installed.script(
        "bench_serve.py", "--backend=openai", f"--base-url=http://{address}", f"--model={BASE_MODEL}",
        f"--tokenizer={toy.model}", "--dataset-name=random", "--random-input-len=16", "--random-output-len=16",
        f"--num-prompts={count}", "--max-concurrency=16", "--temperature=0", "--save-result", "--save-detailed",
        f"--result-dir={result.parent}", f"--result-filename={result.name}", "--lora-modules", *names,
    )  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        *command, env=installed.environment(), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()[-4000:]
    return dict(json.loads(await asyncio.to_thread(result.read_text)))
