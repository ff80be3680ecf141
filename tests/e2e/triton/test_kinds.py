"""Real Tritons of several kinds, in any order of starts, and models that change under load: no client notices."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.e2e.triton.crowd import Clients, expected_as
from tests.e2e.triton.loads import (
    ENGINE,
    at_once,
    back,
    detail_has,
    outcomes,
    reload,
    repeated_if_triton_aborts,
    servers,
    verb,
)
from tests.e2e.triton.repository import Repository
from tests.e2e.triton.server import TritonServer
from tests.integration.test_llmapi import answer_of, told
from tests.kit.faults import assert_nothing_left, assert_right, attempt, heals
from tests.kit.peft_files import write_adapter
from tests.kit.serving import serving, until, write_adapters

CORE = "tensorrt_llm"
SLOW = {"time_scale": 0.5}
"""An answer of 30 tokens takes some tenths of a second: there are always some under way."""
FP16, BF16 = "float16", "bfloat16"
TYPES = ("data type", "data-type", "dtype")
"""How Triton and the engine speak of weights of a type that is not theirs."""


@pytest.mark.nightly
async def test_the_sidecar_is_there_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It says that the server does not answer, and takes it when it comes; so after each restart while nothing runs."""
    names = write_adapters(tmp_path / "loras", 2)
    async with servers(tmp_path) as (server,):
        await server.stop()

        async def start_later() -> None:
            await until(lambda: "does not answer" in caplog.text)
            await server.start()

        starting = asyncio.create_task(start_later())
        async with serving([server], tmp_path / "loras") as served:
            await starting
            for stop in (server.stop, server.kill):
                for name in names:
                    assert_right(served, await attempt(served, name))
                await stop()
                await detail_has(served, "does not answer")
                asked = asyncio.create_task(attempt(served, names[0]))
                await server.start()
                assert_right(served, await asked)
            assert set(outcomes([server])) <= {"done", "error"}
            await assert_nothing_left(served)
        async with serving([server], tmp_path / "loras") as another:
            for name in names:
                assert_right(another, await attempt(another, name))


@pytest.mark.parametrize("transport", ["shared_memory", pytest.param("grpc", marks=pytest.mark.nightly)])
@pytest.mark.parametrize(
    "decoupled", [True, pytest.param(False, marks=pytest.mark.nightly)], ids=["decoupled", "whole"]
)
@repeated_if_triton_aborts
async def test_a_model_is_reloaded_under_load(tmp_path: Path, decoupled: bool, transport: str) -> None:
    """What runs ends, what waits is answered by the model that comes: not one fails, three times."""
    names = write_adapters(tmp_path / "loras", 6)
    async with (
        servers(tmp_path, control="explicit", engine=SLOW, decoupled=decoupled) as (server,),
        serving([server], tmp_path / "loras", backend={"weights_transport": transport}) as served,
        Clients(served, names) as clients,
    ):
        for _ in range(3):
            await clients.answers(30)
            await reload(server)
        await clients.answers(30)
        failed = await clients.finish()
        assert [one.words for one in failed] == []
        outcomes([server])
        await assert_nothing_left(served)


async def unload_and_load(server: TritonServer, write: Callable[[], None]) -> None:
    await verb(server, "Unload")
    write()
    await verb(server, "Load")


async def load_over(server: TritonServer, write: Callable[[], None]) -> None:
    """Triton starts the new model beside the old one, and lets the requests of the old one end."""
    write()
    await verb(server, "Load")


@pytest.mark.nightly
@pytest.mark.parametrize("change", [unload_and_load, load_over])
@repeated_if_triton_aborts
async def test_a_model_changes_its_type_and_its_cache_under_load(
    tmp_path: Path, change: Callable[[TritonServer, Callable[[], None]], Awaitable[None]]
) -> None:
    """Adapters are packed anew for what the model is now; its engine never sees weights of another type."""
    names = write_adapters(tmp_path / "loras", 6)
    async with (
        servers(tmp_path, control="explicit", engine=SLOW) as (server,),
        serving([server], tmp_path / "loras") as served,
        Clients(served, names, dtypes=(FP16, BF16)) as clients,
    ):
        for dtype, pages in ((BF16, 3), (FP16, 8), (BF16, 5)):
            await clients.answers(30)
            options = {"dtype": dtype, "lora_host_pages": pages, "lora_host_bytes": pages << 20}

            def write(options: dict[str, object] = options) -> None:
                server.repository.write_core(server.models_folder, CORE, server.served_path, **options)

            await change(server, write)
            await until(lambda dtype=dtype: served.state.backends["trt-0"].facts.dtype == dtype)
            await back(served)
            assert served.state.backends["trt-0"].facts.host_bytes == pages << 20
        await clients.answers(30)
        failed = await clients.finish()
        assert [one.words for one in failed] == []
        assert types_refused([server]) == []
        for name in names:
            assert (await attempt(served, name)).tokens == expected_as(served, name, 4, BF16)
        await assert_nothing_left(served)


def types_refused(made: list[TritonServer]) -> list[str]:
    """Return what the engines said of weights whose type is not theirs."""
    texts = [one["error"] for server in made for one in server.served if one["error"]]
    return [text for text in texts if any(part in text for part in TYPES)]


@pytest.mark.nightly
async def test_fp16_and_bf16_in_one_pool(tmp_path: Path) -> None:
    """Each adapter is there in both types, and each engine is sent its own."""
    names = write_adapters(tmp_path / "loras", 16)
    cache = {"lora_host_pages": 4, "lora_device_pages": 4}
    made = [
        TritonServer(tmp_path / dtype, Repository(engine=ENGINE | cache | {"dtype": dtype})) for dtype in (FP16, BF16)
    ]
    order = random.Random(5).choices(names, k=400)
    async with made[0], made[1], serving(made, tmp_path / "loras") as served:
        assert [served.state.backends[f"trt-{n}"].facts.dtype for n in (0, 1)] == [FP16, BF16]
        answers = await at_once(32, order, lambda name: served.ask(name, 4))
        for name, answer in zip(order, answers, strict=True):
            dtype = {"trt-0": FP16, "trt-1": BF16}[answer.origins[0].backend]
            assert answer.tokens == expected_as(served, name, 4, dtype)
        assert set(Counter(answer.origins[0].backend for answer in answers)) == {"trt-0", "trt-1"}
        assert types_refused(made) == []
        assert set(heals(served)) <= {"engine_miss", "load_cache_full"}
        assert outcomes(made)["done"] == 400
        await assert_nothing_left(served)


async def test_two_models_of_one_server(tmp_path: Path) -> None:
    """Two backends with one address: each adapter goes to the model of its base, and the other is never asked."""
    bases = {"one": "org/one", "two": "org/two"}
    names = {model: [f"{model}-{number}" for number in range(8)] for model in bases}
    for seed, model in enumerate(bases):
        for number, name in enumerate(names[model]):
            write_adapter(tmp_path / "loras" / name, seed=100 * seed + number, base_model_name_or_path=bases[model])
    async with servers(tmp_path, cores=tuple(bases), engine={"lora_host_pages": 4}) as (server,):
        metrics = f"http://{server.metrics_address}/metrics"
        url = f"triton://{server.grpc_address}"
        backends = [
            {"url": url, "id": f"trt-{model}", "model": model, "base_model": base, "metrics": metrics}
            for model, base in bases.items()
        ]
        async with serving([server], tmp_path / "loras", backends=backends) as served:
            order = random.Random(5).choices([name for both in names.values() for name in both], k=300)
            answers = await at_once(32, order, lambda name: served.ask(name, 4))
            for name, answer in zip(order, answers, strict=True):
                assert answer.tokens == served.expected(name, 4)
                assert answer.origins[0].backend == f"trt-{name.partition('-')[0]}"
            for model in bases:
                ran = {one["task_id"] for one in server.served if one["model"] == model}
                assert ran == {served.task_id(name) for name in names[model]}
            assert outcomes([server])["done"] == 300
            await assert_nothing_left(served)


LLMAPI = ENGINE | {
    "protocol": "llmapi",
    "lora_modules": ("attn_q", "attn_v"),
    "max_lora_rank": 8,
    "lora_max_rank_cached": 8,
    "lora_host_pages": 16,
    "lora_device_pages": 16,
}
"""Loads what it is asked for by itself, and has room for some of the adapters that 32 clients want."""


@pytest.mark.nightly
@pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "whole"])
async def test_llmapi_through_restarts(tmp_path: Path, decoupled: bool) -> None:
    """64 adapters on two servers, one of them killed twice: whoever had no token yet is answered all the same."""
    names = write_adapters(tmp_path / "loras", 64)
    backend = {"adapters_dir": str(tmp_path / "shared"), "progress_timeout_s": 2.0}
    async with (
        servers(tmp_path, 2, engine=LLMAPI | SLOW, decoupled=decoupled) as made,
        serving(made, tmp_path / "loras", backend=backend) as served,
    ):
        chosen, answers, going = random.Random(7), 0, True

        async def client() -> None:
            nonlocal answers
            while going:
                name = chosen.choice(names)
                text, messages = await told(served, name, 4, stream=False)
                assert text == answer_of(served, name, 4)
                assert sum(message.HasField("origin") for message in messages) == 1
                answers += 1

        async def restarts() -> None:
            nonlocal going
            for _ in range(2):
                before = answers
                await until(lambda: answers >= before + 150)  # noqa: B023
                await made[0].kill()
                await detail_has(served, "does not answer")
                await made[0].start()
                await back(served)
            before = answers
            await until(lambda: answers >= before + 150)
            going = False

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(restarts())
            for _ in range(32):
                tasks.create_task(client())
        outcomes(made)
        await assert_nothing_left(served)
