"""The OpenAI API before a pool of Tritons in which there is no engine at the moment: requests wait, as by Generate."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from sidecar.fronts.openai.large import LARGE_BYTES
from tests.integration.test_openai_triton import (
    CHAT,
    COMPLETIONS,
    ESTIMATED,
    TEMPLATE,
    USER,
    client_of,
    events_of,
    text_of,
)
from tests.kit.found_engines import Pool, pool_of, served, up
from tests.kit.peft_files import BASE_MODEL
from tests.kit.serving import Serving, until, write_adapters
from tests.kit.vllm_emulated import running_vllm


@asynccontextmanager
async def emptied(
    folder: Path, template: str = "", was_there: bool = True, **options: Any
) -> AsyncIterator[tuple[Serving, Pool, Any, str]]:
    """Serve two adapters before a pool whose one engine is not found, or not any more; its address comes last."""
    write_adapters(folder / "adapters", 2)
    base: dict[str, Any] = {"name": BASE_MODEL}
    if template:
        (folder / "chat.jinja").write_text(template)
        base["chat_template"] = str(folder / "chat.jinja")
    async with pool_of(1, **options) as pool:
        config = pool.config(folder / "adapters", discover={"empty_s": 0.0})
        config["backends"][0]["base_model"] = base
        (address,) = pool.names.addresses
        if not was_there:
            pool.unname(address)
        async with served(pool, config) as serving, client_of(serving) as client:
            if was_there:
                await until(lambda: up(serving) == {address})
                pool.unname(address)
                await until(lambda: not serving.state.backends)
            yield serving, pool, client, address


async def waiting_for(serving: Serving, *asks: Any) -> list[asyncio.Task[httpx.Response]]:
    """Begin to ask, and return when all of it waits."""
    asked = [asyncio.create_task(ask) for ask in asks]
    await until(lambda: len(serving.state.unrouted) == len(asked) or any(one.done() for one in asked))
    assert not any(one.done() for one in asked), [one.result().text for one in asked if one.done()]
    return asked


@pytest.mark.parametrize("was_there", [False, True])
async def test_requests_wait_for_the_next_engine_of_an_empty_pool(tmp_path: Path, was_there: bool) -> None:
    """Of an adapter and of the base model, short and long, as events and as one object; with their tokens counted."""
    async with emptied(tmp_path, was_there=was_there) as (serving, pool, client, address):
        body = {"model": "a00", "prompt": "hi", "max_tokens": 4}
        asked = await waiting_for(
            serving,
            client.post(COMPLETIONS, json=body),
            client.post(COMPLETIONS, json=body | {"stream": True}),
            client.post(COMPLETIONS, json=body | {"model": BASE_MODEL}),
            client.post(COMPLETIONS, json=body | {"metadata": {"padding": "x" * LARGE_BYTES}}),
        )
        pool.names.addresses.append(address)
        whole, events, base, large = await asyncio.gather(*asked)
        for response, name in ((whole, "a00"), (base, ""), (large, "a00")):
            assert response.json()["choices"][0]["text"] == text_of(serving, name, 4)
            assert response.json()["usage"] == ESTIMATED | {"completion_tokens": 4, "total_tokens": 5}
        chunks = events_of(events.text)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text_of(serving, "a00", 4)
        assert len(chunks) == 5


async def test_a_chat_waits_where_its_pool_has_a_template(tmp_path: Path) -> None:
    async with emptied(tmp_path, TEMPLATE) as (serving, pool, client, address):
        (asked,) = await waiting_for(
            serving, client.post(CHAT, json={"model": "a00", "messages": USER, "max_tokens": 3})
        )
        pool.names.addresses.append(address)
        assert (await asked).json()["choices"][0]["message"]["content"] == text_of(serving, "a00", 3)


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (CHAT, {"messages": USER}, "gpu takes text only and no chat template is configured for it"),
        (COMPLETIONS, {"prompt": "hi", "echo": True}, "TensorRT-LLM by Triton"),
        (COMPLETIONS, {"prompt": "hi", "model": "nobody"}, "nobody"),
    ],
)
async def test_what_no_engine_of_the_pool_could_answer_is_refused_at_once(
    tmp_path: Path, path: str, body: dict[str, Any], words: str
) -> None:
    async with emptied(tmp_path) as (_, _, client, _):
        response = await client.post(path, json={"model": "a00", "max_tokens": 3} | body)
        assert response.status_code in (400, 404), response.text
        assert words in response.text


async def test_engines_that_did_not_stream_are_not_asked_to_when_they_come_back(tmp_path: Path) -> None:
    """They would refuse; so what the last one did is believed of the next."""
    async with emptied(tmp_path, decoupled=False) as (serving, pool, client, address):
        body = {"model": "a00", "prompt": "hi", "max_tokens": 4}
        asked = await waiting_for(serving, client.post(COMPLETIONS, json=body))
        pool.names.addresses.append(address)
        response = await asked[0]
        assert response.json()["choices"][0]["text"] == text_of(serving, "a00", 4)


async def test_a_vllm_beside_an_empty_pool_answers_what_only_it_can(tmp_path: Path) -> None:
    """What both could goes to it, too, as it is there."""
    names = write_adapters(tmp_path / "adapters", 2)
    base, shared = {"name": BASE_MODEL}, tmp_path / "shared"
    shared.mkdir()
    async with pool_of(1) as pool, running_vllm(compute="none", max_loras=2, max_cpu_loras=4) as (vllm, _):
        config = pool.config(tmp_path / "adapters")
        pool.names.addresses.clear()
        url = f"vllm://{vllm.http_address}"
        config["backends"].append({"url": url, "id": "vllm", "base_model": base, "adapters_dir": str(shared)})
        async with served(pool, config) as serving, client_of(serving) as client:
            await until(lambda: any(backend.takes_requests for backend in serving.state.backends.values()))
            for more in ({}, {"n": 2}):
                body = {"model": names[0], "prompt": "hi", "max_tokens": 3} | more
                response = await client.post(COMPLETIONS, json=body)
                assert response.status_code == 200, response.text
                assert response.headers["x-lora-backend"] == "vllm"
