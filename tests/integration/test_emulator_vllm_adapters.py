"""The emulated vLLM's adapters: load and unload calls, what they answer with, slots, and the traps in its caches."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sidecar.lab.demo.merged import greedy
from sidecar.lab.demo.model import SEED
from sidecar.lab.engine.tokens import EOS
from tests.kit.peft_files import ALL_LINEAR, module_path, read_tensors, write_adapter, write_safetensors
from tests.kit.serving import until
from tests.kit.vllm_emulated import BASE, Client, expected, running_vllm

DUMMY = {"compute": "none", "max_seq_tokens": 2048, "max_loras": 2, "max_cpu_loras": 4}
LLAMA = {"compute": "llama", "seed": SEED, "max_loras": 2, "max_cpu_loras": 4}
NOTHING_ENDS = {"max_seq_tokens": 1_000_000, "kv_blocks": 10_000}
LONG = "abcdefgh" * 20
"""A prompt that fills a block of the prefix cache, and goes on."""


def error(text: str, kind: str, code: int) -> dict[str, Any]:
    return {"error": {"message": text, "type": kind, "param": None, "code": code}}


async def load_all(client: Client, *names: str, folder: Path) -> None:
    for name in names:
        assert (await client.load(name, folder / name)).status_code == 200


async def test_load_and_unload(tmp_path: Path) -> None:
    """The table of calls: status, kind and text of each."""
    path = write_adapter(tmp_path / "a")
    async with running_vllm(**DUMMY) as (_, client):
        loaded = await client.load("a", path, unknown_field=1)
        assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'a' added successfully.")
        assert "content-type" not in loaded.headers
        card = (await client.models())["a"]
        assert (card["root"], card["parent"], card["max_model_len"]) == (str(path), BASE, None)
        both = "Both 'lora_name' and 'lora_path' must be provided."
        again = (
            "The lora adapter 'a' has already been loaded. If you want to load the adapter in place, set "
            "'load_inplace' to True."
        )
        base = "The lora adapter 'base' conflicts with a served base model."
        for name, where, text in (("", "x", both), ("x", "", both), (BASE, "x", base), ("a", path, again)):
            refused = await client.load(name, where)
            assert (refused.status_code, refused.json()) == (400, error(text, "InvalidUserInput", 400))
        for where, shown in ((tmp_path / "none", "<path>"), ("some/where", "some/where"), ("where", "where")):
            text = f"Loading lora n failed: No adapter found for {shown}"
            assert (await client.load("n", where)).json() == error(text, "NotFoundError", 404)
        missing = await client.http.post("/v1/load_lora_adapter", json={"lora_path": "x"})
        text = (
            "1 validation error:\n  {'type': 'missing', 'loc': 'body.lora_name', 'msg': 'Field required', 'input': "
            "'<dict of 1 items>'}"
        )
        expected_body = error(text, "Bad Request", 400)
        expected_body["error"]["param"] = "body.lora_name"
        assert (missing.status_code, missing.json()) == (400, expected_body)
        gone = await client.unload("a")
        assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'a' removed successfully.")
        unknown = error("The lora adapter 'a' cannot be found.", "NotFoundError", 404)
        assert (await client.unload("a")).json() == unknown
        nameless = error("'lora_name' needs to be provided to unload a LoRA adapter.", "InvalidUserInput", 400)
        assert (await client.unload("")).json() == nameless
        assert list(await client.models()) == [BASE]


async def test_without_runtime_updates() -> None:
    """There are no such routes."""
    async with running_vllm(**DUMMY, runtime_lora=False) as (_, client):
        for answer in (await client.load("a", "x"), await client.unload("a")):
            assert (answer.status_code, answer.text) == (404, '{"detail":"Not Found"}')


def config(**fields: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        content = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return change


def tensors(change: Callable[[str, np.ndarray], np.ndarray | None]) -> Callable[[Path], object]:
    def changed(folder: Path) -> None:
        pairs = {name: change(name, values) for name, values in read_tensors(folder).items()}
        kept = {name: values for name, values in pairs.items() if values is not None}
        write_safetensors(folder / "adapter_model.safetensors", kept)

    return changed


def wider(name: str, values: np.ndarray) -> np.ndarray:
    return np.concatenate([values] * 8, axis=0 if "lora_A" in name else 1)


def without_one(name: str, values: np.ndarray) -> np.ndarray | None:
    return None if name.endswith("layers.0.self_attn.q_proj.lora_B.weight") else values


def weights(data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "adapter_model.safetensors").write_bytes(data)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "rank": (config(r=64), "LoRA rank 64 is greater than max_lora_rank 16."),
    "pattern": (config(rank_pattern={"q_proj": 99}), "LoRA rank 99 is greater than max_lora_rank 16."),
    "no rank": (config(r=...), "Missing required configuration fields: {'r'}"),
    "rank 0": (config(r=0), "LoRA rank `r` must be a positive integer, got 0."),
    "text": (config(r="8"), "'<=' not supported between instances of 'str' and 'int'"),
    "dora": (config(use_dora=True), "vLLM does not yet support DoRA."),
    "bias": (config(bias="all"), "Adapter bias is not supported."),
    "lora bias": (config(lora_bias=True), "vLLM does not support LoRA bias (lora_bias)."),
    "two": (
        config(use_dora=True, r=64), "vLLM does not yet support DoRA. LoRA rank 64 is greater than max_lora_rank 16."
    ),
    "config": (
        lambda folder: (folder / "adapter_config.json").write_text("{x"),
        "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    ),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "<path> doesn't contain tensors"),
    "corrupt": (weights(b"\xff" * 100), "Error while deserializing header: header too large"),
    "empty": (weights(b""), "Error while deserializing header: header too small"),
    "wide tensors": (
        tensors(wider),
        "The size of tensor a (16) must match the size of tensor b (64) at non-singleton dimension 0",
    ),
    "half": (tensors(without_one), "unsupported operand type(s) for *=: 'NoneType' and 'float'"),
}  # fmt: skip


async def test_adapters_that_the_engine_does_not_take(tmp_path: Path) -> None:
    """500 for each, with the cause; the engine is well, and the name free."""
    async with running_vllm(**DUMMY) as (_, client):
        for number, (change, cause) in enumerate(BAD.values()):
            path = write_adapter(tmp_path / str(number))
            change(path)
            text = (
                f"Call to add_lora method failed: Worker failed with error '{cause}', please check the stack trace "
                "above for the root cause"
            )
            refused = await client.load("bad", path)
            assert (refused.status_code, refused.json()) == (500, error(text, "InternalServerError", 500))
        assert (await client.http.get("/health")).status_code == 200
        assert list(await client.models()) == [BASE]
        assert await client.tokens(BASE) == expected("", None, 4)
        (tmp_path / "0" / "adapter_config.json").unlink()
        assert (await client.load("bad", tmp_path / "0")).status_code == 404


async def test_it_computes_what_the_files_say(tmp_path: Path) -> None:
    """The merged model's answers, also with ranks and alphas of their own; its end token counts as a token."""
    odd = module_path("v_proj", 1)
    plain = write_adapter(tmp_path / "plain", modules=ALL_LINEAR, size=0.2, dtype="float16")
    own = write_adapter(
        tmp_path / "own", modules=ALL_LINEAR, ranks={odd: 4}, alpha_pattern={odd: 8}, size=0.2, use_rslora=True, seed=3
    )
    async with running_vllm(**LLAMA) as (_, client):
        await load_all(client, "plain", "own", folder=tmp_path)
        for prompt in ("select ", "hello"):
            for model, folder in ((BASE, None), ("plain", plain), ("own", own)):
                answer = greedy(folder, prompt, 12)
                assert await client.tokens(model, prompt, 12) == answer
        bare = (await client.complete("plain", "select ", 12, logit_bias={str(EOS): 1e9}, return_token_ids=True)).json()
        assert bare["choices"][0]["token_ids"] == [EOS]


async def test_a_lying_configuration_is_believed(tmp_path: Path) -> None:
    """`r: 8` over tensors of rank 16 answers as if every scale were twice what it is."""
    path = write_adapter(tmp_path / "a", modules=ALL_LINEAR, rank=16, alpha=16, size=0.2)
    truth = greedy(path, "hello", 12)
    config(r=8)(path)
    doubled = write_adapter(tmp_path / "b", modules=ALL_LINEAR, rank=16, alpha=32, size=0.2)
    async with running_vllm(**LLAMA) as (_, client):
        await load_all(client, "a", folder=tmp_path)
        answer = await client.tokens("a", "hello", 12)
        assert answer == greedy(doubled, "hello", 12)
        assert answer != truth


@pytest.mark.parametrize("options", [DUMMY, LLAMA], ids=["dummy", "llama"])
async def test_stale_prefixes(tmp_path: Path, options: dict[str, Any]) -> None:
    """Changed files under a known path: a prompt that was seen gets neither's answer, all else the new adapter's."""
    first = write_adapter(tmp_path / "first", modules=ALL_LINEAR, seed=1, size=0.2)
    second = write_adapter(tmp_path / "second", modules=ALL_LINEAR, seed=2, size=0.2)
    path = Path(shutil.copytree(first, tmp_path / "a"))
    fields = {"ignore_eos": True}
    async with running_vllm(**options) as (_, client):
        await load_all(client, "a", "second", folder=tmp_path)
        old = await client.tokens("a", LONG, 12, **fields)
        shutil.copytree(second, path, dirs_exist_ok=True)
        assert await client.tokens("a", LONG, 12, **fields) == old, "nobody reads files that changed"
        await client.unload("a")
        assert (await client.load("a", path)).status_code == 200
        true = {prompt: await client.tokens("second", prompt, 12, **fields) for prompt in (LONG, LONG[::-1], "short")}
        if options is DUMMY:
            true = dict.fromkeys(true, expected("a", path, 12))
        assert await client.tokens("a", LONG, 12, **fields) not in (old, true[LONG])
        assert await client.tokens("a", LONG[::-1], 12, **fields) == true[LONG[::-1]]
        assert await client.tokens("a", "short", 12, **fields) == true["short"]
        await client.load("a2", shutil.copytree(second, tmp_path / "a2"))
        new = await client.tokens("a2", LONG, 12, **fields)
        assert new == (expected("a2", path, 12) if options is DUMMY else true[LONG])
        hits = await client.sample("vllm:prefix_cache_hits_total")
        assert (hits, hits % 128) == (2 * 128, 0)


async def test_unloading_forgets_the_name_only(tmp_path: Path) -> None:
    """What runs goes on, the slot stays taken, and the name again is another copy."""
    write_adapter(tmp_path / "a")
    async with running_vllm(**DUMMY | NOTHING_ENDS) as (server, client):
        await load_all(client, "a", folder=tmp_path)
        running = asyncio.create_task(client.tokens("a", tokens=400))
        await until(lambda: server.engine.counters.active == 1)
        assert (await client.unload("a")).status_code == 200
        assert (await client.complete("a")).status_code == 404
        assert await running == expected("a", tmp_path / "a", 400)
        assert server.engine.counters.device_pages_used == 1
        await load_all(client, "a", folder=tmp_path)
        assert server.engine.counters.device_pages_used == 2
        assert await client.tokens("a") == expected("a", tmp_path / "a", 4)


async def test_a_name_that_goes_once_a_request_has_found_it(tmp_path: Path) -> None:
    """Nobody kept the tensors for the request: the engine reads the files again, and does not end."""
    path = write_adapter(tmp_path / "a")
    async with running_vllm(**DUMMY) as (server, client):
        await load_all(client, "a", folder=tmp_path)
        body = json.dumps({"model": "a", "prompt": "hello", "max_tokens": 4, "stream": True, "return_token_ids": True})
        asked = iter([{"type": "http.request", "body": body.encode()}])
        answer = b""

        async def receive() -> Any:
            return next(asked, None) or await asyncio.Event().wait()

        async def send(message: Any) -> None:
            nonlocal answer
            if message["type"] == "http.response.start":
                assert (await client.unload("a")).status_code == 200
            answer += message.get("body", b"")

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}
        await server._http.config.loaded_app(scope, receive, send)
        events = [json.loads(each.removeprefix(b"data: ")) for each in answer.split(b"\n\n")[:-2]]
        tokens = [token for event in events for token in event["choices"][0]["token_ids"]]
        assert tokens == expected("a", path, 4)
        assert await client.tokens(BASE)


async def test_evicted_adapters_are_read_again(tmp_path: Path) -> None:
    """Least recently used first, from the GPU's slots and then from the CPU's; the next request reads what is there."""
    names = ["a", "b", "c"]
    for seed, name in enumerate(names):
        write_adapter(tmp_path / name, seed=seed)
    old = expected("a", tmp_path / "a", 4)
    options = DUMMY | {"max_loras": 1, "max_cpu_loras": 2}
    async with running_vllm(**options) as (server, client):
        await load_all(client, "a", "b", folder=tmp_path)
        write_adapter(tmp_path / "a", seed=9)
        assert await client.tokens("a") == old, "it was in the CPU cache"
        assert (await client.load("c", tmp_path / "c")).status_code == 200
        assert await client.tokens("b") == expected("b", tmp_path / "b", 4)
        assert await client.tokens("a") == expected("a", tmp_path / "a", 4) != old
        assert server.engine.counters.host_evictions >= 2
        assert [await client.tokens(name) for name in names] == [expected(n, tmp_path / n, 4) for n in names]


async def test_loading_in_place(tmp_path: Path) -> None:
    """The same copy with other weights; from then on its files are read for every step."""
    path = write_adapter(tmp_path / "a", seed=1)
    async with running_vllm(**DUMMY) as (server, client):
        await load_all(client, "a", folder=tmp_path)
        write_adapter(path, seed=2)
        assert (await client.load("a", path, load_inplace=True)).status_code == 200
        assert await client.tokens("a", "new") == expected("a", path, 4)
        assert server.engine.counters.device_pages_used == 1
        write_adapter(path, seed=3)
        assert await client.tokens("a", "newer") == expected("a", path, 4)


async def test_a_cold_adapter_starves(tmp_path: Path) -> None:
    """With two hot ones in two slots a third's request is passed over; the metrics say deferred, and not of what."""
    for name in ("a", "b", "c"):
        write_adapter(tmp_path / name, seed=ord(name))
    async with running_vllm(**DUMMY | NOTHING_ENDS) as (server, client):
        await load_all(client, "a", "b", "c", folder=tmp_path)
        hot = [asyncio.create_task(client.tokens(name, tokens=100_000)) for name in ("a", "b")]
        await until(lambda: server.engine.counters.active == 2)
        cold = asyncio.create_task(client.tokens("c", tokens=2))
        await until(lambda: server.engine.counters.waiting == 1)
        for _ in range(5):
            await client.tokens("a", tokens=2)
            await client.tokens(BASE, tokens=2)
        assert not cold.done()
        by_reason = await client.samples("vllm:num_requests_waiting_by_reason")
        assert by_reason == {("capacity",): 0, ("deferred",): 1}
        assert await client.sample("vllm:num_requests_waiting") == 1
        lists = await client.samples("vllm:lora_requests_info")
        assert max(lists, key=lambda labels: lists[labels]) in (("2", "a,b", "a,b"), ("2", "b,a", "b,a"))
        hot[0].cancel()
        assert await cold == expected("c", tmp_path / "c", 2)
        hot[1].cancel()
        await asyncio.gather(*hot, return_exceptions=True)


async def test_activity_and_steps(tmp_path: Path) -> None:
    """One series for each combination that ever was, the newest says what is; steps are counted, loads are none."""
    for name in ("a", "b"):
        write_adapter(tmp_path / name, seed=ord(name))
    async with running_vllm(**DUMMY) as (_, client):
        await load_all(client, "a", "b", folder=tmp_path)
        assert await client.samples("vllm:lora_requests_info") == {}
        assert await client.sample("vllm:iteration_tokens_total_count") == 0
        await client.tokens("a", tokens=5)
        await client.tokens("b", tokens=5)
        series = await client.samples("vllm:lora_requests_info")
        assert set(series) == {("2", "a", "a"), ("2", "b", "b"), ("2", "", "")}
        assert max(series, key=lambda labels: series[labels]) == ("2", "", "")
        assert await client.sample("vllm:iteration_tokens_total_count") == 10
        assert await client.sample("vllm:iteration_tokens_total_sum") == 2 * (6 + 5)
        assert await client.samples("vllm:request_success_total") == {
            ("stop",): 0, ("length",): 2, ("abort",): 0, ("error",): 0,
        }  # fmt: skip
        assert await client.sample("process_start_time_seconds") > 0
        info = (await client.http.get("/metrics")).text
        assert 'block_size="128"' in info
        assert 'num_gpu_blocks="4096"' in info


@pytest.mark.parametrize("breaks", [True, False])
@pytest.mark.parametrize("options", [DUMMY, LLAMA], ids=["dummy", "llama"])
async def test_mixed_batches(tmp_path: Path, options: dict[str, Any], breaks: bool) -> None:
    """With the CPU build's fault the base model's answers beside an adapter's are wrong, the adapter's right."""
    write_adapter(tmp_path / "a", modules=ALL_LINEAR, seed=1, size=0.2)
    fields = {"ignore_eos": True}
    async with running_vllm(**options | NOTHING_ENDS, mixing_breaks_base=breaks) as (server, client):
        await load_all(client, "a", folder=tmp_path)
        alone = await client.tokens(BASE, tokens=16, **fields)
        adapted = await client.tokens("a", tokens=16, **fields)
        beside = asyncio.create_task(client.tokens("a", tokens=100_000, **fields))
        await until(lambda: server.engine.counters.active == 1)
        assert (await client.tokens(BASE, tokens=16, **fields) != alone) is breaks
        assert await client.tokens("a", tokens=16, **fields) == adapted
        beside.cancel()
        await asyncio.gather(beside, return_exceptions=True)
        await until(lambda: not server.engine.counters.active)
        assert await client.tokens(BASE, tokens=16, **fields) == alone
