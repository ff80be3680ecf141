"""How the emulated trtllm-serve dies: each cause that its source shows, what clients see of it, and its process."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import ml_dtypes
import numpy as np
import pytest

from sidecar.lab.engine.trtllm import TrtllmOptions, TrtllmServer
from sidecar.lab.engine.trtllm.options import trtllm_spec_of
from tests.kit.emulated import read_served
from tests.kit.peft_files import read_tensors, write_adapter, write_raw_safetensors, write_safetensors
from tests.kit.serving import until
from tests.kit.trtllm_emulated import Client, TrtllmProcess, body_of, expected, running_trtllm, start_trtllm

DUMMY = {"compute": "none", "max_seq_tokens": 1_000_000, "kv_blocks": 200_000, "max_loras": 2, "max_cpu_loras": 4}
DUMMY_FLAGS = ("--compute", "none", "--max-model-len", "1000000", "--kv-blocks", "200000")
MLP = ("mlp_h_to_4h", "mlp_gate", "mlp_4h_to_h")
ENDLESS = 900_000
UNAVAILABLE = "LLM is unavailable. Please check the server logs for more details."
ERAS = pytest.mark.parametrize("era", ["main", "1.2"])

Kill = Callable[[TrtllmServer, Client, Path], Awaitable[Any]]


def change_tensors(folder: Path, change: Callable[[str, np.ndarray], np.ndarray]) -> Path:
    tensors = {name: change(name, values) for name, values in read_tensors(folder).items()}
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    return folder


def asks(client: Client, number: int, folder: Path) -> asyncio.Task[httpx.Response]:
    return asyncio.create_task(client.complete(number, folder))


async def too_high_a_rank(server: TrtllmServer, client: Client, folder: Path) -> Any:
    return asks(client, 1, write_adapter(folder / "a", rank=128))


async def a_layer_too_many(server: TrtllmServer, client: Client, folder: Path) -> Any:
    return asks(client, 1, write_adapter(folder / "a", layers=(0, 2)))


async def matrices_that_are_too_short(server: TrtllmServer, client: Client, folder: Path) -> Any:
    path = write_adapter(folder / "a", modules=("q_proj",))
    return asks(client, 1, change_tensors(path, lambda name, values: values if "lora_A" in name else values[:32]))


async def no_room_for_two_of_them(server: TrtllmServer, client: Client, folder: Path) -> Any:
    """The device has pages for two, the host for one: the second is put while the first one runs."""
    names = ("gate_proj", "up_proj", "down_proj")
    first, second = (write_adapter(folder / str(n), seed=n, modules=names, rank=64) for n in (1, 2))
    running = asyncio.create_task(client.complete(1, first, tokens=ENDLESS))
    await until(lambda: server.engine.counters.generation == 2)
    return asyncio.gather(running, asks(client, 2, second))


async def files_gone_before_the_loop_reads(server: TrtllmServer, client: Client, folder: Path) -> Any:
    """They are there for the submit thread; then the seats are taken for a while."""
    path = write_adapter(folder / "a")
    waiting = asyncio.create_task(client.complete(None, "", tokens=ENDLESS))
    await until(lambda: server.engine.counters.active == 2)
    asked = asks(client, 1, path)
    await until(lambda: server.engine.counters.waiting == 1)
    shutil.rmtree(path)
    waiting.cancel()
    return asked


async def files_changed_before_the_loop_reads(server: TrtllmServer, client: Client, folder: Path) -> Any:
    """Another number of rows than the submit thread has seen."""
    path = write_adapter(folder / "a")
    waiting = asyncio.create_task(client.complete(None, "", tokens=ENDLESS))
    await until(lambda: server.engine.counters.active == 2)
    asked = asks(client, 1, path)
    await until(lambda: server.engine.counters.waiting == 1)
    write_adapter(path, modules=("q_proj",))
    waiting.cancel()
    return asked


async def another_type_than_the_caches(server: TrtllmServer, client: Client, folder: Path) -> Any:
    """An fp8 adapter first, which makes both caches fp8, and then one of the model's type."""
    path = write_adapter(folder / "fp8", dtype="float16")
    header, data = {}, b""
    for name, values in read_tensors(path).items():
        raw = values.astype(ml_dtypes.float8_e4m3fn).tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "F8_E4M3", "shape": list(values.shape), "data_offsets": offsets}
        data += raw
    write_raw_safetensors(path / "adapter_model.safetensors", json.dumps(header).encode(), data)
    assert (await client.complete(1, path)).status_code == 200
    return asks(client, 2, write_adapter(folder / "a"))


DEATHS: dict[str, tuple[Kill, dict[str, Any], str]] = {
    "rank": (too_high_a_rank, {}, "Invalid low_rank (128). low_rank must be smaller than mMaxLowRank (64)"),
    "layer": (a_layer_too_many, {}, "Expected layerId to be in the range [0, numModelLayers)"),
    "size": (matrices_that_are_too_short, {}, "lora_weights has to few values for attn_q"),
    "full": (
        no_room_for_two_of_them,
        {"max_cpu_loras": 1, "lora_modules": MLP},
        "in PEFT cache -- Cache is full. There are no done tasks to evict",
    ),
    "type": (another_type_than_the_caches, {"native_fp8": True}, "cache is fp8 but received float16"),
}
IN_LOOP: dict[str, tuple[Kill, dict[str, Any], str]] = {
    "gone": (files_gone_before_the_loop_reads, {"seats": 2}, "[Errno 2] No such file or directory"),
    "changed": (files_changed_before_the_loop_reads, {"seats": 2}, "lora_weights and lora_keys to have the same size"),
}
"""In 1.2 the weights go with the request, so the loop reads no files here."""


@asynccontextmanager
async def doomed(**options: Any) -> AsyncIterator[tuple[TrtllmServer, Client, asyncio.Task[httpx.Response]]]:
    """Run a server, a client, and a request that would run for a long time."""
    async with running_trtllm(**DUMMY | options) as (server, client):
        running = asyncio.create_task(client.complete(None, "", tokens=ENDLESS))
        await until(lambda: server.engine.counters.generation == 1)
        yield server, client, running
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.mark.parametrize(
    ("case", "era"),
    [(case, era) for case in DEATHS for era in ("main", "1.2")] + [(case, "main") for case in IN_LOOP],
)
async def test_what_kills_the_loop(tmp_path: Path, case: str, era: str) -> None:
    """Nobody is told: neither who brought it, nor who was running, nor who comes; health tells in main only."""
    kill, options, text = (DEATHS | IN_LOOP)[case]
    async with doomed(**options, era=era) as (server, client, running):
        asked = await kill(server, client, tmp_path)
        await until(lambda: server.died is not None)
        assert text in str(server.died)
        async with client.http.stream("POST", "/v1/completions", json=body_of(None, "") | {"stream": True}) as later:
            reading = asyncio.create_task(anext(later.aiter_raw()))
            health = await client.http.get("/health")
            if era == "main":
                assert (health.status_code, health.text) == (503, UNAVAILABLE)
            else:
                assert (health.status_code, (await client.http.get("/health")).status_code) == (200, 200)
                assert (await client.state())["died"] == server.died
            for task in (asked, running, reading):
                assert not task.done()
            for task in (asked, reading):
                task.cancel()
            await asyncio.gather(asked, reading, return_exceptions=True)


@pytest.mark.parametrize("case", IN_LOOP)
async def test_what_the_loop_of_1_2_does_not_read(tmp_path: Path, case: str) -> None:
    """The same comes to nothing there: the request has its weights with it."""
    kill, options, _ = IN_LOOP[case]
    async with doomed(**options, era="1.2") as (server, client, _):
        asked = await kill(server, client, tmp_path)
        assert (await asked).status_code == 200
        assert server.died is None


async def test_the_loop_of_1_2_reads_what_left_the_cache_meanwhile(tmp_path: Path) -> None:
    """Cached when it was submitted, evicted before it ran, and the files are gone by then."""
    names = ("gate_proj", "up_proj", "down_proj")
    folders = [write_adapter(tmp_path / str(n), seed=n, modules=names, rank=64) for n in range(2)]
    options = {"era": "1.2", "lora_modules": MLP, "max_loras": 1, "max_cpu_loras": 1, "seats": 2}
    async with doomed(**options) as (server, client, _):
        await client.tokens(0, folders[0])
        seated = asyncio.create_task(client.complete(tokens=ENDLESS))
        await until(lambda: server.engine.counters.active == 2)
        evicting = asks(client, 1, folders[1])
        await until(lambda: server.engine.counters.waiting == 1)
        waiting = asks(client, 0, folders[0])
        await until(lambda: server.engine.counters.waiting == 2)
        shutil.rmtree(folders[0])
        seated.cancel()
        assert (await evicting).status_code == 200
        await until(lambda: server.died is not None)
        assert "[Errno 2]" in str(server.died)
        assert not waiting.done()
        waiting.cancel()
        await asyncio.gather(seated, waiting, return_exceptions=True)


async def is_let_in(client: Client) -> bool:
    """Return whether a new connection is taken."""
    try:
        await client.http.get("/version", headers={"connection": "close"})
    except httpx.TransportError:
        return False
    return True


async def test_main_leaves_after_it_was_asked(tmp_path: Path) -> None:
    """The first 503 is also the end: nobody is let in any more, and the server has ended when its clients have gone."""
    server = await start_trtllm(**DUMMY)
    async with Client(server.http_address) as client:
        hanging = asks(client, 1, write_adapter(tmp_path / "a", rank=128))
        await until(lambda: server.died is not None)
        assert (await client.http.get("/health")).status_code == 503
        async with asyncio.timeout(60):
            while await is_let_in(client):
                await asyncio.sleep(0.01)
        assert not hanging.done()
        hanging.cancel()
        await asyncio.gather(hanging, return_exceptions=True)
    async with asyncio.timeout(60):
        with pytest.raises(RuntimeError, match="Invalid low_rank"):
            await server.failed()
    await server.stop()


@pytest.mark.parametrize("number", [1, -1])
async def test_in_1_2_a_load_that_fails_takes_the_server_along(tmp_path: Path, number: int) -> None:
    """Whatever runs there loses its connection."""
    server = await start_trtllm(**DUMMY, era="1.2")
    folder = write_adapter(tmp_path / "a")
    if number > 0:
        (folder / "adapter_config.json").unlink()
    async with Client(server.http_address) as client:
        running = asyncio.create_task(client.complete(tokens=ENDLESS))
        await until(lambda: server.engine.counters.active == 1)
        for asked in (client.complete(number, folder), running):
            with pytest.raises(httpx.TransportError):
                await asked
        with pytest.raises(RuntimeError):
            await server.failed()
        with pytest.raises(httpx.ConnectError):
            await client.http.get("/health")
    await server.stop()


async def test_steps_that_fail_again_and_again_end_the_loop(tmp_path: Path) -> None:
    """Each tells all active requests; after the last one the loop has ended."""
    folders = [write_adapter(tmp_path / str(n), seed=n) for n in range(3)]
    async with running_trtllm(**DUMMY, step_errors_max=2) as (server, client):
        for _ in range(2):
            assert server.died is None
            asked = (client.complete(number, folder, tokens=ENDLESS) for number, folder in enumerate(folders))
            answers = await asyncio.gather(*asked)
            assert {answer.status_code for answer in answers} == {400}
        await until(lambda: server.died is not None)
        assert str(server.died).startswith("Fatal error: 2 steps have failed")


async def test_what_may_be_said_by_a_dead_loop(tmp_path: Path) -> None:
    """The option's text, for requests that come later."""
    async with running_trtllm(**DUMMY, dead_text="Event loop terminated") as (server, client):
        asked = asks(client, 1, write_adapter(tmp_path / "a", rank=128))
        await until(lambda: server.died is not None)
        refused = await client.complete()
        assert (refused.status_code, refused.json()["message"]) == (400, "Event loop terminated")
        assert not asked.done()
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)


@ERAS
async def test_the_process_is_killed_and_starts_again(tmp_path: Path, era: str) -> None:
    """On the same port, without adapters: a number has another first content then."""
    first, second = write_adapter(tmp_path / "a", seed=1), write_adapter(tmp_path / "b", seed=2)
    async with TrtllmProcess(*DUMMY_FLAGS, "--era", era) as engine:
        async with Client(engine.http_address) as client:
            assert await client.tokens(7, first) == expected(first, 4)
            assert await client.tokens(7, second) == expected(first, 4)
            assert (await client.state())["ids"] == 1
            running = asyncio.create_task(client.complete(tokens=ENDLESS))
            async with asyncio.timeout(60):
                while not (await client.state())["active"]:
                    await asyncio.sleep(0.01)
            await engine.kill()
            with pytest.raises(httpx.TransportError):
                await running
        await engine.start()
        async with Client(engine.http_address) as client:
            assert (await client.state())["ids"] == 0
            assert await client.tokens(7, second) == expected(second, 4)
        assert await engine.stop() == 0
        with pytest.raises(RuntimeError, match="ended with 2"):
            await TrtllmProcess("--era", "0.9").start()


async def test_the_process_ends_with_its_loop(tmp_path: Path) -> None:
    """In main once somebody has asked for its health and the clients have gone."""
    async with TrtllmProcess(*DUMMY_FLAGS) as engine:
        async with Client(engine.http_address) as client:
            hanging = asks(client, 1, write_adapter(tmp_path / "a", rank=128))
            async with asyncio.timeout(60):
                while (await client.http.get("/health")).status_code == 200:
                    await asyncio.sleep(0.01)
            hanging.cancel()
            await asyncio.gather(hanging, return_exceptions=True)
        assert await engine.wait() == 0


async def test_it_crashes_on_a_load(tmp_path: Path) -> None:
    """The process aborts when the named adapter comes."""
    folder = write_adapter(tmp_path / "a")
    async with TrtllmProcess(*DUMMY_FLAGS, "--crash-on-load", "bad") as engine, Client(engine.http_address) as client:
        assert (await client.complete(1, folder)).status_code == 200
        named = {"lora_name": "bad", "lora_int_id": 2, "lora_path": str(folder)}
        with pytest.raises(httpx.TransportError):
            await client.complete(lora_request=named)
        assert await engine.wait() == 134


async def test_a_frozen_loop_is_silent() -> None:
    """Requests are taken and nothing comes, while health is as ever."""
    async with running_trtllm(**DUMMY, freeze_after=3) as (server, client):
        asked = asyncio.create_task(client.complete(tokens=9))
        await until(lambda: server.engine.counters.iteration_counter == 3)
        assert (await client.http.get("/health")).status_code == 200
        assert not asked.done()
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)


async def test_the_served_log(tmp_path: Path) -> None:
    """A line for each request that ended, with its adapter's number, name and path; the first one of each brings it."""
    folder, log = write_adapter(tmp_path / "a"), tmp_path / "served.jsonl"
    async with running_trtllm(**DUMMY, served_log=log) as (_, client):
        for number in (7, 7, None):
            await client.tokens(number, folder)
    lines = read_served(log)
    assert [(line["task_id"], line["tokens"], line["weights"], line["outcome"]) for line in lines] == [
        (7, 4, True, "done"), (7, 4, False, "done"), (None, 4, False, "done"),
    ]  # fmt: skip
    assert lines[0]["parameters"] == {"lora_name": "adapter", "lora_path": str(folder)}


async def test_options_that_make_no_sense() -> None:
    """Unknown eras, too few adapters, options of other engines."""
    with pytest.raises(ValueError, match=r"unknown era '1\.1'"):
        TrtllmOptions(era="1.1")
    with pytest.raises(ValueError, match="max_loras 0"):
        TrtllmOptions(max_loras=0)
    with pytest.raises(ValueError, match=r"^--max-queue is an option of the engine behind Triton; trtllm has"):
        TrtllmOptions(max_queue=3)
    with pytest.raises(ValueError, match="load_ms -1"):
        TrtllmOptions(load_ms=-1)
    with pytest.raises(ValueError, match=r"no shape can be read from .*nix\.json"):
        TrtllmOptions(shape="nix.json")
    assert trtllm_spec_of(TrtllmOptions(lora_modules=("attn_q",))).lora_modules == ("attn_q", "attn_k", "attn_v")
    assert trtllm_spec_of(TrtllmOptions()).lora_slots == 8
