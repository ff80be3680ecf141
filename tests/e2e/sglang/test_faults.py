"""What goes wrong: adapters that would end the server, its death, its restart, a name that it has dropped."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from sidecar.core.effects import Heal
from sidecar.proto import admin_pb2
from tests.e2e.sglang.fronted import SIZES, in_front, load
from tests.e2e.sglang.server import SglangServer
from tests.e2e.vllm.direct import completion, http_client, registered
from tests.e2e.vllm.fronted import Told, ask, ask_into
from tests.e2e.vllm.toy import DIMS, NAMES, Toy, prompt, write_version
from tests.kit.peft_files import module_path
from tests.kit.serving import until

PROMPT = prompt(3, 12)
TOKENS = 8
DEADLY: dict[str, dict[str, Any]] = {
    "up_proj without gate_proj": {"modules": ("k_proj", "up_proj"), "shape": SIZES},
    "sizes of another model": {"shape": DIMS},
    "more layers than the model has": {"shape": replace(SIZES, layers=6)},
    "q_proj without v_proj": {"modules": ("q_proj",), "shape": SIZES},
    "a rank above its largest": {"rank": 32, "shape": SIZES},
}
FATAL: list[dict[str, Any]] = [
    {"prompt": [5, 99_999]}, {"prompt": [-1, 3]}, {"logprobs": 100_000}, {"top_k": 3_000_000_000, "temperature": 1.0},
]  # fmt: skip
FOLDED: dict[str, dict[str, Any]] = {
    "rsLoRA": {"use_rslora": True},
    "ranks that differ": {"ranks": {module_path("q_proj", 1): 4, module_path("down_proj", 2): 2}},
    "scales that differ": {"alpha_pattern": {"v_proj": 4.0, "o_proj": 32.0}},
}


@pytest.mark.parametrize("what", DEADLY)
async def test_an_adapter_that_would_end_it_is_refused(
    server: SglangServer, toy: Toy, tmp_path: Path, what: str
) -> None:
    """The server is not asked; it lives, and answers for others."""
    bad = write_version(tmp_path / "bad", seed=9, **DEADLY[what])
    async with in_front(server, toy, tmp_path) as front:
        try:
            await front.served.adapters.Register(admin_pb2.RegisterRequest(name="bad", path=str(bad)))
        except grpc.aio.AioRpcError as error:
            assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)  # noqa: PT017
        else:
            told = await ask(front.client, "bad", PROMPT, TOKENS)
            assert told.status in (httpx.codes.BAD_REQUEST, httpx.codes.UNPROCESSABLE_ENTITY), told
        assert (await ask(front.client, "a00", PROMPT, TOKENS)).tokens == toy.greedy(
            toy.adapters / "a00", PROMPT, TOKENS
        )
    assert server.is_running


@pytest.mark.parametrize("body", [*FATAL, {"seed": 1 << 70}], ids=str)
async def test_a_request_that_would_end_it_is_refused(
    server: SglangServer, toy: Toy, tmp_path: Path, body: dict[str, Any]
) -> None:
    async with in_front(server, toy, tmp_path) as front:
        reply = await front.client.post("/v1/completions", json={"model": "a00", "prompt": "x", "max_tokens": 2} | body)
        assert (reply.status_code, "/sglang/" in reply.text) == (httpx.codes.BAD_REQUEST, False), reply.text
        assert (await ask(front.client, "a00", PROMPT, TOKENS)).tokens == toy.greedy(
            toy.adapters / "a00", PROMPT, TOKENS
        )
    assert server.is_running


@pytest.mark.parametrize("way", ["sent", "read from files"])
async def test_what_it_ignores_is_folded_into_the_weights(
    server: SglangServer, toy: Toy, tmp_path: Path, way: str
) -> None:
    """It knows one rank and one scale an adapter, and ignores patterns and rsLoRA; the answers are PEFT's."""
    made = {
        f"f{number}": write_version(
            tmp_path / f"made{number}",
            70 + number,
            shape=SIZES,
            dtype="float16",
            rank=16 if "use_rslora" in more else 8,
            **more,
        )
        for number, more in enumerate(FOLDED.values())
    }
    fields = {} if way == "sent" else {"adapters_dir": str(tmp_path / "shared")}
    async with in_front(server, toy, tmp_path, **fields) as front:
        for name, path in made.items():
            await front.served.adapters.Register(admin_pb2.RegisterRequest(name=name, path=str(path)))
            assert (await ask(front.client, name, PROMPT, TOKENS)).tokens == toy.greedy(path, PROMPT, TOKENS), name


async def test_a_death_in_mid_stream_and_what_a_restart_has_forgotten(
    server: SglangServer, toy: Toy, tmp_path: Path
) -> None:
    """A stream that had begun ends with the reason; afterwards every adapter is sent again."""
    async with in_front(server, toy, tmp_path, progress_timeout_s=10.0) as front:
        right = {name: toy.greedy(toy.adapters / name, PROMPT, TOKENS) for name in NAMES[:3]}
        for name, tokens in right.items():
            assert (await ask(front.client, name, PROMPT, TOKENS)).tokens == tokens
        begun = Told("a00", 0)
        telling = asyncio.create_task(ask_into(begun, front.client, PROMPT, 900, stream=True))
        await until(lambda: len(begun.tokens) > 2)
        await server.kill()
        await telling
        assert not begun.whole
        assert "an answer that has begun is never repeated" in begun.error
        await until(lambda: not front.served.state.backends["sglang-0"].takes_requests)
        waiting = [asyncio.create_task(ask(front.client, name, PROMPT, TOKENS)) for name in right]
        await server.start()
        for told, tokens in zip(await asyncio.gather(*waiting), right.values(), strict=True):
            assert (told.error, told.tokens) == ("", tokens)


async def test_a_name_that_somebody_has_unloaded_is_sent_again(server: SglangServer, toy: Toy, tmp_path: Path) -> None:
    """Sent weights do not come back by themselves: the request is a miss, and is healed."""
    async with in_front(server, toy, tmp_path) as front, http_client(server.http_address) as direct:
        right = toy.greedy(toy.adapters / "a00", PROMPT, TOKENS)
        assert (await ask(front.client, "a00", PROMPT, TOKENS)).tokens == right
        for name in await registered(direct):
            (await direct.post("/unload_lora_adapter", json={"lora_name": name})).raise_for_status()
        assert (await ask(front.client, "a00", PROMPT, TOKENS)).tokens == right
        assert front.served.recorder.count(Heal) == 1


async def test_a_client_that_leaves_frees_the_engine(server: SglangServer, toy: Toy, tmp_path: Path) -> None:
    """A whole answer, of which SGLang would notice a closed connection after four seconds, is aborted at once."""
    async with in_front(server, toy, tmp_path) as front, http_client(server.http_address) as direct:
        body = completion("a00", PROMPT, 1900)
        asking = asyncio.create_task(front.client.post("/v1/completions", json=body))
        await until_running(direct, 1)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        async with asyncio.timeout(3.0):
            await until_running(direct, 0)


async def until_running(direct: httpx.AsyncClient, count: int) -> None:
    while (await direct.get("/v1/loads?include=all")).json()["loads"][0]["num_running_reqs"] != count:
        await asyncio.sleep(0.02)


async def test_what_is_refused_here_does_end_it(server: SglangServer, tmp_path: Path) -> None:
    """Asked directly it loads such an adapter with 200, and ends by its first request."""
    path = write_version(tmp_path / "bad", seed=9, **DEADLY["up_proj without gate_proj"])
    async with http_client(server.http_address) as direct:
        await load(direct, "bad", path)
        with pytest.raises(httpx.HTTPError):
            await direct.post("/v1/completions", json=completion("base:bad", PROMPT, 2))
    await server.ended()


@pytest.mark.nightly
@pytest.mark.parametrize("body", FATAL, ids=str)
async def test_and_so_does_such_a_request(server: SglangServer, toy: Toy, body: dict[str, Any]) -> None:
    async with http_client(server.http_address) as direct:
        await load(direct, "a00", toy.adapters / "a00")
        with pytest.raises(httpx.HTTPError):
            await direct.post("/v1/completions", json=completion("base:a00", PROMPT, 2) | body)
    await server.ended()
