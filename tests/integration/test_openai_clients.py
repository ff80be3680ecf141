"""OpenAI's own SDK, unmodified, in front of a vLLM, of a Triton, and of both; and `Generate` from a vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest

from sidecar.proto import gateway_pb2
from tests.kit.emulated import running_engine
from tests.kit.peft_files import BASE_MODEL
from tests.kit.serving import PATIENCE_S, Serving, serving, until, write_adapters
from tests.kit.vllm_emulated import Client, VllmProcess, expected, running_vllm

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
USER: Any = [{"role": "user", "content": "hi"}]
KINDS = ("vllm", "triton")


@asynccontextmanager
async def in_front(tmp_path: Path, kinds: tuple[str, ...]) -> AsyncIterator[tuple[Serving, dict[str, Any]]]:
    """Serve two adapters from emulated engines of some kinds; the second value is the engines, by kind."""
    write_adapters(tmp_path / "adapters", 2)
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    (tmp_path / "shared").mkdir()
    backends: list[dict[str, Any]] = []
    base = {"name": BASE_MODEL, "chat_template": str(tmp_path / "chat.jinja")}
    async with (
        running_vllm(compute="none", max_loras=2, max_cpu_loras=4, max_seq_tokens=256) as (vllm, _),
        running_engine(compute="none") as triton,
    ):
        if "vllm" in kinds:
            url = f"vllm://{vllm.http_address}"
            backends.append({"url": url, "id": "vllm", "base_model": base, "adapters_dir": str(tmp_path / "shared")})
        if "triton" in kinds:
            backends.append({"url": f"triton://{triton.grpc_address}", "id": "triton", "base_model": base})
        async with serving([], tmp_path / "adapters", backends=backends) as served:
            yield served, {"vllm": vllm, "triton": triton}


def answer_of(served: Serving, kind: str, name: str, tokens: int) -> str:
    """Return what an engine of a kind says with an adapter."""
    return bytes(ids_of(served, kind, name, tokens)).decode()


def ids_of(served: Serving, kind: str, name: str, tokens: int) -> list[int]:
    if kind == "triton":
        return served.expected(name, tokens)
    digest = served.state.names[name].digest
    folder = served.state.versions[digest].origin
    return expected(f"{name}@{digest[:12]}", Path(folder), tokens)


def asynchronous(served: Serving) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"http://{served.sidecar.http_address}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("kind", KINDS)
async def test_the_asynchronous_client(tmp_path: Path, kind: str) -> None:
    """Completions and chats, whole and streamed, by an adapter's name and by a version's."""
    async with in_front(tmp_path, (kind,)) as (served, _), asynchronous(served) as client:
        for name in ("a00", "a01", "a00@v1"):
            text = answer_of(served, kind, name.partition("@")[0], 5)
            whole = await client.completions.create(model=name, prompt="hi", max_tokens=5)
            assert (whole.model, whole.choices[0].text, whole.choices[0].finish_reason) == (name, text, "length")
            assert whole.usage is not None
            assert whole.usage.completion_tokens == 5
            assert whole.usage.total_tokens == whole.usage.prompt_tokens + 5 > 5
            stream = await client.completions.create(model=name, prompt="hi", max_tokens=5, stream=True)
            assert "".join([chunk.choices[0].text async for chunk in stream]) == text
            chat = await client.chat.completions.create(model=name, messages=USER, max_completion_tokens=5)
            assert (chat.choices[0].message.content, chat.choices[0].message.role) == (text, "assistant")
            parts = await client.chat.completions.create(
                model=name, messages=USER, max_tokens=5, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in parts]
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.completion_tokens == 5
            assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + 5 > 5


@pytest.mark.parametrize("kind", KINDS)
async def test_the_synchronous_client(tmp_path: Path, kind: str) -> None:
    """In a thread of its own, as most programs have it."""
    async with in_front(tmp_path, (kind,)) as (served, _):
        text = answer_of(served, kind, "a01", 4)

        def ask() -> tuple[str, str, str, list[str]]:
            url = f"http://{served.sidecar.http_address}/v1"
            with openai.OpenAI(base_url=url, api_key="none") as client:
                whole = client.completions.create(model="a01", prompt="hi", max_tokens=4).choices[0].text
                chat = client.chat.completions.create(model="a01", messages=USER, max_tokens=4)
                stream = client.chat.completions.create(model="a01", messages=USER, max_tokens=4, stream=True)
                streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
                models = [model.id for model in client.models.list()]
                return whole, str(chat.choices[0].message.content), streamed, models

        assert await asyncio.to_thread(ask) == (text, text, text, [BASE_MODEL, "a00", "a01"])


@pytest.mark.parametrize("kind", KINDS)
async def test_errors_are_the_clients_own_kinds(tmp_path: Path, kind: str) -> None:
    """By their status; the headers of an answer can be read, too."""
    async with in_front(tmp_path, (kind,)) as (served, _), asynchronous(served) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            await client.completions.create(model="a0", prompt="hi")
        body: Any = missing.value.body
        assert (body["code"], body["reason"]) == (404, "model_not_found")
        assert "did you mean a0" in missing.value.message
        with pytest.raises(openai.BadRequestError):
            await client.completions.create(model="a00", prompt="hi", max_tokens=-1)
        raw = await client.completions.with_raw_response.create(
            model="a00", prompt="hi", max_tokens=2, extra_headers={"x-lora-tenant": "red", "x-request-id": "mine"}
        )
        assert (raw.headers["x-lora-version"], raw.headers["x-lora-backend"]) == ("a00@v1", kind)
        assert raw.headers["x-request-id"] == "mine"


async def test_an_engines_own_words_through_the_client(tmp_path: Path) -> None:
    """vLLM's error is vLLM's, but for the name that the client knows."""
    async with in_front(tmp_path, ("vllm",)) as (served, _), asynchronous(served) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.completions.create(model="a00", prompt=[1] * 300, max_tokens=4)
        assert "maximum context length" in caught.value.message
        assert served.state.names["a00"].digest[:12] not in caught.value.message


async def test_a_mixed_pool(tmp_path: Path) -> None:
    """What any engine understands goes to both; what only vLLM can do goes there, chats and token ids too."""
    async with in_front(tmp_path, KINDS) as (served, _), asynchronous(served) as client:
        seen = set()
        for number in range(24):
            name = f"a0{number % 2}"
            raw = await client.completions.with_raw_response.create(model=name, prompt="hi", max_tokens=4)
            kind = raw.headers["x-lora-backend"]
            seen.add(kind)
            assert raw.parse().choices[0].text == answer_of(served, kind, name, 4)
        for more in ({"n": 2}, {"prompt": [1, 2, 3]}, {"prompt": ["a", "b"]}):
            fields: Any = {"model": "a00", "prompt": "hi", "max_tokens": 3} | more
            raw = await client.completions.with_raw_response.create(**fields)
            assert raw.headers["x-lora-backend"] == "vllm", more
            seen.add("vllm")
        tokens = await served.ask("a00", 4)
        assert tokens.origins[0].backend in KINDS
        assert tokens.tokens == ids_of(served, tokens.origins[0].backend, "a00", 4)
        assert "vllm" in seen


async def test_a_client_that_leaves_a_vllm(tmp_path: Path) -> None:
    """Closing a stream is how the SDK's users stop: the engine's seat is free at once, long before the answer's end."""
    async with (
        VllmProcess("--compute", "none", "--served-model-name", "base", time_scale=1.0) as engine,
        Client(engine.http_address) as metrics,
        serving([engine]) as served,
        asynchronous(served) as client,
    ):
        stream = await client.completions.create(model="base", prompt="hi", max_tokens=2000, stream=True)
        async for _ in stream:
            break
        assert await metrics.sample("vllm:num_requests_running") == 1
        await stream.close()
        async with asyncio.timeout(PATIENCE_S):
            while await metrics.sample("vllm:num_requests_running"):
                await asyncio.sleep(0.01)
        await until(lambda: not served.state.requests and not served.sidecar.gateway.tickets)


@pytest.mark.parametrize("stream", [True, False])
async def test_generate_from_a_vllm(tmp_path: Path, stream: bool) -> None:
    """Text for text, token ids for token ids, as from any other engine; the counts are the engine's."""
    async with in_front(tmp_path, ("vllm",)) as (served, _):
        ids = await served.ask("a01", 6, stream=stream)
        assert ids.tokens == ids_of(served, "vllm", "a01", 6)
        assert (len(ids.origins), ids.origins[0].version, ids.origins[0].output_tokens) == (1, "a01@v1", 6)
        sampling = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 7, "repetition_penalty": 1.2}
        request = gateway_pb2.GenerateRequest(adapter="a01", text="hi", max_tokens=6, stream=stream, **sampling)
        messages = [message async for message in served.gateway.Generate(request)]
        assert "".join(message.text for message in messages) == answer_of(served, "vllm", "a01", 6)
        assert not any(message.token_ids for message in messages)
        assert messages[-1].origin.output_tokens == 6
        base = await served.ask("", 3, stream=stream)
        assert base.tokens == expected("", None, 3)


async def test_generate_and_stop_words(tmp_path: Path) -> None:
    """vLLM has the tokenizer, so it stops at a text even where it was asked with token ids."""
    async with in_front(tmp_path, ("vllm",)) as (served, _):
        text = answer_of(served, "vllm", "a00", 12)
        answer = await served.ask("a00", 12, stop_words=[text[4:6]])
        assert 0 < len(answer.tokens) < 12


async def test_generate_and_an_engines_error(tmp_path: Path) -> None:
    """As a gRPC status, with the engine's words."""
    async with in_front(tmp_path, ("vllm",)) as (served, _):
        with pytest.raises(grpc.aio.AioRpcError, match="maximum context length") as caught:
            await served.ask("a00", 4, prompt=300)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (await served.ask("a00", 3)).tokens == ids_of(served, "vllm", "a00", 3)
