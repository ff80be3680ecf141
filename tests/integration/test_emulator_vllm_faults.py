"""How the emulated vLLM fails, and its process: death by deleted files, crashes, freezes, starts on the same port."""

from __future__ import annotations

import asyncio
import shutil
import ssl
from pathlib import Path

import httpx
import pytest

from sidecar.errors import Misused
from sidecar.lab.engine.openai import VllmOptions
from sidecar.lab.engine.openai.options import vllm_spec_of
from sidecar.lab.engine.vllm import ENGINE_DIED
from tests.kit.authority import NEEDS_OPENSSL, Authority
from tests.kit.emulated import read_served
from tests.kit.peft_files import write_adapter
from tests.kit.serving import until
from tests.kit.vllm_emulated import BASE, DONE, Client, VllmProcess, expected, running_vllm, start_vllm

DUMMY = {"compute": "none", "max_seq_tokens": 1_000_000, "kv_blocks": 10_000}
DUMMY_FLAGS = ("--compute", "none", "--max-model-len", "1000000", "--kv-blocks", "10000")
DEAD = {"error": {"message": ENGINE_DIED, "type": "InternalServerError", "param": None, "code": 500}}


async def deleted_files(client: Client, folder: Path) -> None:
    """Load three adapters where there is room for two, and delete the files of the first."""
    for name in ("a", "b", "c"):
        write_adapter(folder / name, seed=ord(name))
        assert (await client.load(name, folder / name)).status_code == 200
    shutil.rmtree(folder / "a")


async def test_deleted_files_kill_the_engine(tmp_path: Path) -> None:
    """Streams end with an event, health says 503; with the first client that is told by a 500 the server ends."""
    server = await start_vllm(**DUMMY, max_loras=2)
    async with Client(server.http_address) as client:
        await deleted_files(client, tmp_path)
        others = [asyncio.create_task(client.completion_events(model, tokens=900_000)) for model in ("b", BASE)]
        await until(lambda: server.engine.counters.active == 2)
        for events in (await client.completion_events("a"), *await asyncio.gather(*others)):
            assert events[-2:] == [DEAD, DONE]
        assert (await client.http.get("/health")).status_code == 503
        told = await client.complete(BASE)
        assert (told.status_code, told.json()) == (500, DEAD)
        async with asyncio.timeout(60):
            with pytest.raises(RuntimeError, match="adapter a was to be read again"):
                await server.failed()
        with pytest.raises(httpx.ConnectError):
            await client.http.get("/health")
    await server.stop()


async def test_the_process_ends_with_its_engine_and_starts_again(tmp_path: Path) -> None:
    """Who was in it gets 500. Status 0, as vLLM's; on the same port there is a new one then, without adapters."""
    async with VllmProcess(*DUMMY_FLAGS, "--max-loras", "2") as engine:
        async with Client(engine.http_address) as client:
            await deleted_files(client, tmp_path)
            running = asyncio.create_task(client.complete("b", tokens=900_000))
            async with asyncio.timeout(60):
                while not await client.sample("vllm:num_requests_running"):
                    await asyncio.sleep(0.01)
            for answer in await asyncio.gather(client.complete("a"), running):
                assert (answer.status_code, answer.json()) == (500, DEAD)
        assert await engine.wait() == 0
        address = engine.http_address
        await engine.start()
        assert engine.http_address == address
        async with Client(address) as client:
            assert list(await client.models()) == [BASE]
            assert await client.tokens(BASE) == expected("", None, 4)
        assert await engine.stop() == 0
        with pytest.raises(RuntimeError, match="ended with 2"):
            await VllmProcess("--max-lora-rank", "12").start()


async def test_it_crashes_on_a_load(tmp_path: Path) -> None:
    """The process aborts when the named adapter is loaded; the load call gets no answer."""
    path = write_adapter(tmp_path / "a")
    async with VllmProcess(*DUMMY_FLAGS, "--crash-on-load", "bad") as engine, Client(engine.http_address) as client:
        assert (await client.load("good", path)).status_code == 200
        with pytest.raises(httpx.TransportError):
            await client.load("bad", path)
        assert await engine.wait() == 134


async def test_a_load_fails_and_the_engine_is_well(tmp_path: Path) -> None:
    """A 500 for the named adapter, again and again, and for nobody else."""
    path = write_adapter(tmp_path / "a")
    async with running_vllm(**DUMMY, fail_load=("bad",)) as (_, client):
        for _ in range(2):
            failed = await client.load("bad", path)
            assert failed.status_code == 500
            assert "Worker failed with error 'CUDA out of memory.'" in failed.json()["error"]["message"]
        assert (await client.load("good", path)).status_code == 200
        assert (await client.http.get("/health")).status_code == 200


async def test_a_step_that_fails_is_the_end(tmp_path: Path) -> None:
    """The step after the load of a named adapter kills the engine; somebody has to need it."""
    path = write_adapter(tmp_path / "a")
    server = await start_vllm(**DUMMY, fail_step_on_load=("bad",))
    async with Client(server.http_address) as client:
        running = asyncio.create_task(client.complete(BASE, tokens=900_000))
        await until(lambda: server.engine.counters.active == 1)
        assert (await client.load("bad", path)).json() == DEAD
        assert (await running).json() == DEAD
        with pytest.raises(RuntimeError, match="can't move"):
            await server.failed()
    await server.stop()


async def test_a_frozen_engine_is_silent(tmp_path: Path) -> None:
    """It takes requests and says nothing more, while health and models are as ever; nor does it load."""
    path = write_adapter(tmp_path / "a")
    async with running_vllm(**DUMMY, freeze_after=3) as (_, client):
        said = []

        async def listen() -> None:
            async for event in client.stream("/v1/completions", model=BASE, prompt="hello", max_tokens=9):
                said.append(event)  # noqa: PERF401 - what has come so far is looked at while it comes

        listening = asyncio.create_task(listen())
        await until(lambda: len(said) == 3)
        loading = asyncio.create_task(client.load("a", path))
        assert (await client.http.get("/health")).status_code == 200
        assert await client.sample("vllm:num_requests_running") == 1
        assert await client.sample("vllm:iteration_tokens_total_count") == 3
        assert not loading.done()
        assert len(said) == 3
        for task in (listening, loading):
            task.cancel()
        await asyncio.gather(listening, loading, return_exceptions=True)


async def test_the_served_log(tmp_path: Path) -> None:
    """A line for each request and for each load call, with the adapter's name."""
    write_adapter(tmp_path / "a")
    log = tmp_path / "served.jsonl"
    async with running_vllm(**DUMMY, served_log=log) as (_, client):
        await client.load("a", tmp_path / "a")
        await client.tokens("a")
        await client.tokens(BASE)
    lines = read_served(log)
    assert [(line["model"], line["tokens"], line["weights"], line["outcome"]) for line in lines] == [
        ("a", 0, True, "done"), ("a", 4, False, "done"), (BASE, 4, False, "done"),
    ]  # fmt: skip


async def test_slowness() -> None:
    """A step takes its modelled time, and so many times that."""
    async with running_vllm(**DUMMY, time_scale=0.01, slow_factor=20.0) as (server, client):
        await client.tokens(BASE, tokens=5)
        (served,) = server.served
        assert (served.tokens, served.outcome) == (5, "done")
        seconds = await client.sample("vllm:e2e_request_latency_seconds_sum")
        assert seconds > 5 * 0.011 * 0.01 * 20 / 2


@NEEDS_OPENSSL
async def test_tls(tmp_path: Path) -> None:
    """With a key it speaks TLS only, and asks for certificates if it was told whose."""
    authority = Authority(tmp_path)
    await authority.found()
    key, certificate = await authority.sign("engine", "IP:127.0.0.1")
    own_key, own_certificate = await authority.sign("client")
    options = {"tls_key": key, "tls_certificate": certificate, "tls_client_ca": authority.ca}
    async with running_vllm(**DUMMY, **options) as (server, _):
        context = ssl.create_default_context(cafile=str(authority.ca))
        context.load_cert_chain(own_certificate, own_key)
        async with httpx.AsyncClient(verify=context) as known:
            assert (await known.get(f"https://{server.http_address}/version")).json() == {"version": "0.32.0"}
        stranger = ssl.create_default_context(cafile=str(authority.ca))
        async with httpx.AsyncClient(verify=stranger) as unknown:
            with pytest.raises(httpx.TransportError):
                await unknown.get(f"https://{server.http_address}/version")


async def test_options_that_make_no_sense(tmp_path: Path) -> None:
    """Ranks that vLLM does not take, a CPU cache that is too small, options of other engines; a port that is taken."""
    with pytest.raises(ValueError, match="max_lora_rank 12"):
        VllmOptions(max_lora_rank=12)
    with pytest.raises(ValueError, match="not 4 and 2"):
        vllm_spec_of(VllmOptions(max_loras=4, max_cpu_loras=2))
    for field in ({"instances": 2}, {"write_config": tmp_path / "v.yaml"}, {"ignore_lora": True}):
        flag = f"--{next(iter(field)).replace('_', '-')}"
        with pytest.raises(ValueError, match=f"^{flag} is an option of the engine behind Triton"):
            VllmOptions(**field)  # type: ignore[arg-type]
    async with running_vllm(**DUMMY) as (server, _):
        with pytest.raises(Misused, match="another process has the port"):
            await start_vllm(**DUMMY, http_port=int(server.http_address.rsplit(":", 1)[1]))
