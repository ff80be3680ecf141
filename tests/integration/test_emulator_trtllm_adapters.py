"""The emulated trtllm-serve's adapters: identity by number, what is silently another one, memory, slots."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sidecar.lab.demo.merged import greedy
from sidecar.lab.demo.model import SEED
from tests.kit.peft_files import ALL_LINEAR, module_path, read_tensors, write_adapter, write_safetensors
from tests.kit.serving import until
from tests.kit.trtllm_emulated import BASE, Client, body_of, expected, lora, running_trtllm

DUMMY = {"compute": "none", "max_seq_tokens": 2048, "max_loras": 2, "max_cpu_loras": 4}
LLAMA = {"compute": "llama", "seed": SEED, "max_loras": 2, "max_cpu_loras": 4}
NOTHING_ENDS = {"max_seq_tokens": 1_000_000, "kv_blocks": 200_000}
ENDLESS = 900_000
ERAS = pytest.mark.parametrize("era", ["main", "1.2"])
MLP = ("gate_proj", "up_proj", "down_proj")
TIGHT = DUMMY | {"lora_modules": ("mlp_h_to_4h", "mlp_gate", "mlp_4h_to_h")}
"""Modules of one size, so that exactly max_loras of the largest adapters fit."""


def largest(folder: Path, seed: int) -> Path:
    """Write an adapter of the largest rank on all targets of `TIGHT`."""
    return write_adapter(folder, seed=seed, modules=MLP, rank=64)


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


async def endless(client: Client, number: int | None, folder: Path | str = "") -> asyncio.Task[Any]:
    """Begin a request that does not end."""
    return asyncio.create_task(client.complete(number, folder, tokens=ENDLESS))


async def end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@ERAS
async def test_it_computes_what_the_files_say(tmp_path: Path, era: str) -> None:
    """The merged model's answers: with plain scales, with rsLoRA, and with a rank of its own for one projection."""
    odd = module_path("v_proj", 1)
    adapters = {
        11: write_adapter(tmp_path / "plain", modules=ALL_LINEAR, size=0.2, dtype="float16"),
        12: write_adapter(tmp_path / "own", modules=ALL_LINEAR, ranks={odd: 4}, size=0.2, use_rslora=True, seed=3),
    }
    async with running_trtllm(**LLAMA, era=era) as (_, client):
        for prompt in ("select ", "hello"):
            assert await client.tokens(None, "", prompt, 12) == greedy(None, prompt, 12)
            for number, folder in adapters.items():
                assert await client.tokens(number, folder, prompt, 12) == greedy(folder, prompt, 12)


@ERAS
async def test_a_number_is_its_first_content_for_ever(tmp_path: Path, era: str) -> None:
    """Changed files, another path, another name, eviction: the same tokens; a new number has the new ones."""
    folder, other = largest(tmp_path / "a", 1), largest(tmp_path / "b", 2)
    first = expected(folder, 4)
    async with running_trtllm(**TIGHT, era=era) as (server, client):
        assert await client.tokens(7, folder) == first
        assert await client.tokens(7, other) == first
        largest(folder, 3)
        assert await client.tokens(7, folder) == first
        assert await client.tokens(8, folder) == expected(folder, 4) != first
        assert await client.tokens(lora_request=lora(7, other, name="another")) == first
        for number in range(20, 26):
            await client.tokens(number, other)
        assert not server.engine.has_adapter(7)
        assert await client.tokens(7, other) == first


@ERAS
async def test_files_that_change_between_the_reads(tmp_path: Path, era: str) -> None:
    """Main's loop reads for itself, so its copy is a later one than the submit thread's; in 1.2 there is one read."""
    folder = write_adapter(tmp_path / "a", seed=1)
    before = expected(folder, 4)
    async with running_trtllm(**DUMMY | NOTHING_ENDS, era=era, seats=1) as (server, client):
        seated = await endless(client, None)
        await until(lambda: server.engine.counters.active == 1)
        asked = asyncio.create_task(client.tokens(7, folder))
        await until(lambda: server.engine.counters.waiting == 1)
        write_adapter(folder, seed=2)
        await end(seated)
        assert await asked == (expected(folder, 4) if era == "main" else before)


@ERAS
async def test_without_lora_everything_is_the_base_model(tmp_path: Path, era: str) -> None:
    """200 and the base model's answer, also for what could never be loaded; only the path is looked at."""
    folder = write_adapter(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    async with running_trtllm(**DUMMY, era=era, lora_modules=()) as (server, client):
        assert await client.tokens(7, folder) == expected(None, 4)
        assert await client.tokens(8, tmp_path / "empty") == expected(None, 4)
        assert (await client.complete(9, tmp_path / "none")).status_code == 400
        assert (await client.state())["ids"] == 0
        assert server.died is None


async def test_what_is_silently_another_adapter(tmp_path: Path) -> None:
    """alpha_pattern, modules_to_save and modules that are no targets: 200, and an answer without them."""
    plain = write_adapter(tmp_path / "plain", modules=ALL_LINEAR, size=0.2)
    patterned = Path(shutil.copytree(plain, tmp_path / "patterned"))
    change_config(patterned, alpha_pattern={"q_proj": 64})
    head = {"base_model.model.lm_head.weight": np.zeros((259, 64), np.float32)}
    saved = write_adapter(
        tmp_path / "saved", modules=ALL_LINEAR, size=0.2, extra_tensors=head, modules_to_save=["lm_head"]
    )
    narrow = write_adapter(tmp_path / "narrow", modules=("q_proj", "k_proj", "v_proj"), size=0.2, seed=4)
    wide = Path(shutil.copytree(narrow, tmp_path / "wide"))
    more = read_tensors(write_adapter(tmp_path / "more", modules=("o_proj", "up_proj"), size=0.2, seed=5))
    write_safetensors(wide / "adapter_model.safetensors", read_tensors(narrow) | more)
    async with running_trtllm(**LLAMA) as (_, client):
        for number, folder in ((1, plain), (2, patterned), (3, saved)):
            assert await client.tokens(number, folder, tokens=12) == greedy(plain, "hello", 12)
    async with running_trtllm(**LLAMA, lora_modules=("attn_q", "attn_v")) as (_, client):
        assert await client.tokens(4, wide, tokens=12) == greedy(narrow, "hello", 12) != greedy(wide, "hello", 12)


async def test_the_path_is_looked_at_for_each_request(tmp_path: Path) -> None:
    """Also for a number that is known; since TL#17138 at the load only, whose text says the file that is missing."""
    folder = write_adapter(tmp_path / "a")
    kept = expected(folder, 4)
    for late in (False, True):
        async with running_trtllm(**DUMMY, late_path_check=late) as (_, client):
            assert await client.tokens(7, folder) == kept
            moved = folder.rename(tmp_path / "moved")
            known, unknown = await client.complete(7, folder), await client.complete(8, folder)
            moved.rename(folder)
            assert unknown.status_code == 400
            if late:
                assert known.status_code == 200
                message = unknown.json()["message"]
                assert message.startswith("Failed to load LoRA adapter: [Errno 2] No such file or directory")
                assert (await client.complete(nothing=1)).json() == {"error": "Request validation error"}
            else:
                assert known.status_code == 400
                for answer in (known, unknown):
                    assert f"lora_path ({folder}) does not exist." in answer.json()["error"]


def without(name: str) -> Any:
    def change(folder: Path) -> None:
        (folder / name).unlink()

    return change


def with_tensor(name: str) -> Any:
    def change(folder: Path) -> None:
        tensors = read_tensors(folder) | {name: np.zeros((4, 4), np.float32)}
        write_safetensors(folder / "adapter_model.safetensors", tensors)

    return change


def without_tensor(part: str) -> Any:
    def change(folder: Path) -> None:
        tensors = {name: values for name, values in read_tensors(folder).items() if part not in name}
        write_safetensors(folder / "adapter_model.safetensors", tensors)

    return change


def weights(data: bytes) -> Any:
    return lambda folder: (folder / "adapter_model.safetensors").write_bytes(data)


def config(text: str) -> Any:
    return lambda folder: (folder / "adapter_config.json").write_text(text)


UNREADABLE: dict[str, tuple[Any, str]] = {
    "no configuration": (without("adapter_config.json"), "[Errno 2] No such file or directory"),
    "no weights": (without("adapter_model.safetensors"), "expected str, bytes or os.PathLike object, not NoneType"),
    "corrupt weights": (weights(b"\x80" * 64), "Error while deserializing header: header too large"),
    "corrupt configuration": (config("{"), "Expecting property name"),
    "no rank": (lambda folder: change_config(folder, r=None), "'r'"),
    "no alpha": (lambda folder: change_config(folder, lora_alpha=None), "'lora_alpha'"),
    "a bias": (with_tensor("base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias"), "unsupported key base_mod"),
    "a saved layer": (with_tensor("base_model.model.model.norm.weight"), "unsupported key base_model.model.model.norm"),
    "only A": (without_tensor("layers.1.self_attn.q_proj.lora_B"), "Layer 1 is missing required 'out' matrix"),
    "no target": (without_tensor("layers"), "max() iterable argument is empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREADABLE)
async def test_loads_that_fail(tmp_path: Path, case: str) -> None:
    """In main: 400 with the cause for that request, again at each, and nothing else is hurt."""
    change, text = UNREADABLE[case]
    folder, good = write_adapter(tmp_path / "a", seed=1), write_adapter(tmp_path / "b", seed=2)
    change(folder)
    async with running_trtllm(**DUMMY | NOTHING_ENDS) as (server, client):
        running = await endless(client, 2, good)
        await until(lambda: server.engine.counters.active == 1)
        for _ in range(2):
            failed = await client.complete(1, folder)
            assert failed.status_code == 400
            assert failed.json()["message"].startswith("Failed to load LoRA adapter: ")
            assert text in failed.json()["message"]
        assert await client.tokens(2, good) == expected(good, 4)
        assert not running.done()
        await end(running)


async def test_numbers_that_the_executor_has_no_room_for(tmp_path: Path) -> None:
    """HTTP takes them, the executor does not; the largest that it takes is 2^64 - 1."""
    folder = write_adapter(tmp_path / "a")
    async with running_trtllm(**DUMMY) as (_, client):
        for number in (-1, 2**64, 2**70):
            refused = await client.complete(number, folder)
            assert (refused.status_code, refused.json()["type"]) == (400, "BadRequestError")
            assert refused.json()["message"].startswith("Failed to load LoRA adapter: ")
        for number in (1, 2**63 - 1, 2**64 - 1):
            assert await client.tokens(number, folder) == expected(folder, 4)


async def test_streams_have_their_status_before_the_load(tmp_path: Path) -> None:
    """Then main ends a completion with an event and two end marks; a chat, and whatever fails in 1.2, breaks."""
    folder = tmp_path / "empty"
    folder.mkdir()
    async with running_trtllm(**DUMMY) as (_, client):
        told = await client.http.post("/v1/completions", json=body_of(7, folder) | {"stream": True})
        assert told.status_code == 200
        error, *marks = told.text.split("\n\n")
        assert json.loads(error.removeprefix("data: ")) == {
            "error": {
                "message": "Failed to load LoRA adapter: [Errno 2] No such file or directory: "
                f"'{folder}/adapter_config.json'",
                "type": "server_error",
                "code": None,
                "param": None,
            }
        }
        assert marks == ["data: [DONE]", "data: [DONE]", ""]
        chat = {"model": BASE, "messages": [{"role": "user", "content": "hi"}], "stream": True}
        await broken(client, "/v1/chat/completions", chat | {"lora_request": lora(7, folder)})
        await broken(client, "/v1/chat/completions", chat | {"prompt_token_ids": [999]})
    async with running_trtllm(**DUMMY, era="1.2") as (_, client):
        await broken(client, "/v1/completions", body_of(None, "", [999]) | {"stream": True})


async def broken(client: Client, path: str, body: dict[str, Any]) -> None:
    """Expect a stream whose connection breaks after the status, without an event."""
    said = b""
    with pytest.raises(Exception, match="peer closed connection"):  # noqa: PT012 - it breaks while it is read
        async with client.http.stream("POST", path, json=body) as answer:
            assert answer.status_code == 200
            async for data in answer.aiter_raw():
                said += data
    assert said == b""


async def test_memory_grows_with_each_number(tmp_path: Path) -> None:
    """Main keeps two copies of each adapter; 1.2 sends the first one, and reads a second when the caches lose it."""
    folders = [largest(tmp_path / str(number), number) for number in range(8)]
    one = 2 * 3 * 64 * (64 + 160) * 2
    found: dict[str, list[int]] = {}
    for era in ("main", "1.2"):
        async with running_trtllm(**TIGHT, era=era) as (server, client):
            found[era] = []
            for number, folder in enumerate(folders):
                await client.tokens(number, folder)
                found[era].append((await client.state())["host_bytes"])
            assert server.engine.counters.host_evictions > 0, "the C++ caches have lost some, Python none"
            again = [await client.tokens(number, folder) for number, folder in enumerate(folders)]
            assert again == [expected(folder, 4) for folder in folders]
            assert (await client.state())["host_bytes"] == found[era][-1]
            assert (await client.state())["ids"] == len(folders)
    assert found["main"] == [2 * one * count for count in range(1, 9)]
    assert found["1.2"] == [one * count for count in range(1, 9)]


async def test_what_the_caches_lost_comes_from_memory(tmp_path: Path) -> None:
    """In main the files are read twice, and never again: the folder may be empty by then."""
    folders = [largest(tmp_path / str(number), number) for number in range(8)]
    first = expected(folders[0], 4)
    async with running_trtllm(**TIGHT) as (server, client):
        for number, folder in enumerate(folders):
            await client.tokens(number, folder)
        for file in folders[0].iterdir():
            file.unlink()
        assert not server.engine.has_adapter(0)
        assert await client.tokens(0, folders[0]) == first


async def test_more_adapters_than_slots(tmp_path: Path) -> None:
    """Low ranks take few pages: three adapters meet where graphs have two slots, and every active request fails."""
    folders = {number: write_adapter(tmp_path / str(number), seed=number) for number in (1, 2, 3)}
    async with running_trtllm(**DUMMY | NOTHING_ENDS) as (server, client):
        two = [await endless(client, number, folders[number]) for number in (1, 2)]
        base = await endless(client, None)
        await until(lambda: server.engine.counters.generation == 3)
        third = await client.complete(3, folders[3], tokens=ENDLESS)
        for answer in (third, *await asyncio.gather(*two, base)):
            assert answer.status_code == 400
            assert "more LoRA task ID than loRA slot size" in answer.json()["message"]
        assert server.died is None
        assert await client.tokens(3, folders[3]) == expected(folders[3], 4)
        one_token = [client.tokens(number, folder, tokens=1) for number, folder in folders.items()]
        assert await asyncio.gather(*one_token) == [expected(folder, 1) for folder in folders.values()]
    async with running_trtllm(**DUMMY, cuda_graphs=False) as (_, client):
        together = [client.tokens(number, folder, tokens=200) for number, folder in folders.items()]
        assert await asyncio.gather(*together) == [expected(folder, 200) for folder in folders.values()]


async def test_a_seat_is_held_while_an_adapter_does_not_fit(tmp_path: Path) -> None:
    """Two of the largest adapters fill the pages: the third holds a seat without running, so the base model waits."""
    folders = [largest(tmp_path / str(number), number) for number in range(4)]
    options = TIGHT | NOTHING_ENDS | {"seats": 3, "iteration_stats": True}
    async with running_trtllm(**options) as (server, client):
        two = [await endless(client, number, folders[number]) for number in (1, 2)]
        await until(lambda: server.engine.counters.generation == 2)
        third = asyncio.create_task(client.tokens(3, folders[3], tokens=3))
        await until(lambda: server.engine.counters.active == 3)
        waiting = asyncio.create_task(client.tokens(tokens=2))
        await until(lambda: server.engine.counters.waiting == 1)
        await client.http.get("/metrics")
        told = (await client.http.get("/metrics")).json()[-1]
        assert (told["numActiveRequests"], told["numQueuedRequests"], told["maxNumActiveRequests"]) == (3, 1, 3)
        assert told["inflightBatchingStats"]["numScheduledRequests"] == 2
        assert not third.done()
        await end(two[0])
        assert await third == expected(folders[3], 3)
        assert await waiting == expected(None, 2)
        await end(two[1])


async def test_a_read_in_the_loop_stops_all_streams(tmp_path: Path) -> None:
    """The iteration that reads takes as long as that, and whoever decodes is in it."""
    folder = write_adapter(tmp_path / "a")
    slow = DUMMY | NOTHING_ENDS | {"iteration_stats": True, "load_ms": 50, "time_scale": 1.0}
    async with running_trtllm(**slow) as (server, client):
        running = await endless(client, None)
        await until(lambda: server.engine.counters.generation == 1)
        told: list[dict[str, Any]] = []
        asked = asyncio.create_task(client.tokens(7, folder, tokens=1))
        while not asked.done():
            told += (await client.http.get("/metrics")).json()
        told += (await client.http.get("/metrics")).json()
        await end(running)
    (reading,) = [entry for entry in told if entry["inflightBatchingStats"]["numContextRequests"]][-1:]
    assert reading["iterLatencyMS"] >= 50
    assert reading["inflightBatchingStats"]["numGenRequests"] == 1


async def test_a_step_that_is_told_to_fail(tmp_path: Path) -> None:
    """An injected fault fails all that is active, once, and the loop goes on."""
    folder = write_adapter(tmp_path / "a")
    async with running_trtllm(**DUMMY | NOTHING_ENDS, fail_step_on_load=("adapter",)) as (server, client):
        running = await endless(client, None)
        await until(lambda: server.engine.counters.generation == 1)
        for answer in (await client.complete(7, folder), await running):
            assert answer.status_code == 400
            assert answer.json()["message"] == "can't move a processing task taskId=7"
        assert await client.tokens(7, folder) == expected(folder, 4)
        assert server.died is None
