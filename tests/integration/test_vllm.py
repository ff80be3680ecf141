"""The vLLM backend in front of emulated vLLMs: names and folders, their life, and what goes wrong."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from copy import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc.aio
import pytest

from sidecar.core.effects import Heal, Load
from sidecar.proto import admin_pb2
from tests.kit.emulated import running_engine
from tests.kit.peft_files import write_adapter
from tests.kit.picker_house import picker_house, response_body, response_head
from tests.kit.quick_engine import event
from tests.kit.serving import Serving, serving, until, until_async, write_adapters
from tests.kit.sidecar_process import sidecar_process
from tests.kit.vllm_emulated import BASE, Client, VllmProcess, expected, running_vllm

DUMMY: dict[str, Any] = {"compute": "none"}
ENGINE = {"device_pages": 2, "host_pages": 4, "seats": 32}


@asynccontextmanager
async def fronted(engines: Sequence[Any], folder: Path, **record: Any) -> AsyncIterator[Serving]:
    """Run a sidecar in front of vLLMs that read from `folder / "shared"`; `folder / "adapters"` is served."""
    backend = {"adapters_dir": str(folder / "shared"), "engine": ENGINE} | record.pop("backend", {})
    roots = record.pop("roots", [folder])
    async with serving(engines, folder / "adapters", roots, backend=backend, **record) as served:
        yield served


def engine_name(served: Serving, name: str) -> str:
    """Return what an engine calls the version that a name stands for."""
    return f"{name}@{served.state.names[name].digest[:12]}"


def answer_of(served: Serving, folder: Path, name: str, tokens: int = 4) -> list[int]:
    return expected(engine_name(served, name), folder / "adapters" / name, tokens)


def staged(folder: Path) -> set[str]:
    return {path.name for path in (folder / "shared").iterdir() if not path.name.startswith(".")}


async def test_adapters_answer_by_name_and_their_files_stay_while_they_are_registered(tmp_path: Path) -> None:
    """A dropped version is unloaded first and its folder goes second; at the end the server knows none of ours."""
    names = write_adapters(tmp_path / "adapters", 3)
    async with running_vllm(**DUMMY, max_loras=2, max_cpu_loras=4) as (engine, client):
        async with fronted([engine], tmp_path) as served:
            for name in names:
                assert (await served.ask(name)).tokens == answer_of(served, tmp_path, name)
            assert (await served.ask("")).tokens == expected("", None, 4)
            registered = await client.models()
            places = [Path(card["root"]) for card in registered.values() if card["parent"]]
            assert set(registered) - {BASE} == {engine_name(served, name) for name in names}
            assert {place.name for place in places} == staged(tmp_path)
            backend: Any = served.sidecar.gateway.backends["vllm-0"]
            seen: list[tuple[str, bool]] = []
            dialect = backend._dialect

            async def watched(server: Any, name: str, timeout_s: float) -> Any:
                seen.append((name, all(map(Path.is_dir, places))))
                return await dialect.unload(server, name, timeout_s)

            backend._dialect = copy(dialect)
            backend._dialect.unload = watched
            await served.adapters.Evict(admin_pb2.AdapterRequest(name=names[0]))
            await until(lambda: len(staged(tmp_path)) == 2)
            assert seen == [(engine_name(served, names[0]), True)]
            assert engine_name(served, names[0]) not in await client.models()
            assert (await served.ask(names[0])).tokens == answer_of(served, tmp_path, names[0])
        assert set(await client.models()) == {BASE}


async def test_many_adapters_over_few_slots(tmp_path: Path) -> None:
    """Sixteen adapters, two slots, four in the host cache: all right, and never more than two at a time."""
    names = write_adapters(tmp_path / "adapters", 16)
    async with (
        running_vllm(**DUMMY, max_loras=2, max_cpu_loras=4) as (engine, _),
        fronted([engine], tmp_path) as served,
    ):
        asked = [names[number % 16] for number in range(160)]
        answers = await asyncio.gather(*(served.ask(name) for name in asked))
        for name, answer in zip(asked, answers, strict=True):
            assert answer.tokens == answer_of(served, tmp_path, name)
            assert len(answer.origins) == 1
        assert served.recorder.count(Heal) == 0


async def test_an_update_under_load_is_one_version_or_the_other(tmp_path: Path) -> None:
    """Ten switches of a name while it is asked for: no failure, and every answer is exactly one version's."""
    for seed in range(10):
        write_adapter(tmp_path / "versions" / f"{seed}", seed=seed)
    write_adapter(tmp_path / "adapters" / "other", seed=99)
    async with (
        running_vllm(**DUMMY, max_loras=2, max_cpu_loras=4) as (engine, _),
        fronted([engine], tmp_path) as served,
    ):
        answers: list[Any] = []
        done = asyncio.Event()

        async def keep_asking() -> None:
            while not done.is_set():
                answers.append(await served.ask("sql", prompt=140))

        await register(served, tmp_path, 0)
        asking = [asyncio.create_task(keep_asking()) for _ in range(4)]
        right = [version_answer(served, tmp_path, 0)]
        for seed in range(1, 10):
            before = len(answers)
            await register(served, tmp_path, seed)
            right.append(version_answer(served, tmp_path, seed))
            await until(lambda before=before: len(answers) > before + 4)  # type: ignore[misc]
        done.set()
        await asyncio.gather(*asking)
        assert len(set(map(tuple, right))) == 10
        for answer in answers:
            assert answer.tokens in right
        assert (await served.ask("sql", prompt=140)).tokens == right[-1]


async def register(served: Serving, folder: Path, seed: int) -> None:
    await served.adapters.Register(admin_pb2.RegisterRequest(name="sql", path=str(folder / "versions" / f"{seed}")))


def version_answer(served: Serving, folder: Path, seed: int) -> list[int]:
    return expected(engine_name(served, "sql"), folder / "versions" / f"{seed}", 4)


async def test_an_engine_that_was_killed_is_loaded_on_demand_when_it_is_back(tmp_path: Path) -> None:
    names = write_adapters(tmp_path / "adapters", 3)
    async with (
        VllmProcess("--compute", "none", "--max-loras", "2", "--max-cpu-loras", "4") as engine,
        fronted([engine], tmp_path) as served,
    ):
        for name in names:
            await served.ask(name)
        asking = [asyncio.create_task(served.ask(names[number % 3])) for number in range(30)]
        await engine.kill()
        await engine.start()
        for number, answer in enumerate(await asyncio.gather(*asking, return_exceptions=True)):
            if isinstance(answer, BaseException):  # its answer had begun
                assert isinstance(answer, grpc.aio.AioRpcError)
                assert "not found" not in (answer.details() or "")
                assert "does not exist" not in (answer.details() or "")
            else:
                assert answer.tokens == answer_of(served, tmp_path, names[number % 3])
        for name in names:
            assert (await served.ask(name)).tokens == answer_of(served, tmp_path, name)


async def test_names_that_the_engine_forgot_are_loaded_again(tmp_path: Path) -> None:
    """Somebody unloads all of ours: each is one heal, and no client hears of it."""
    names = write_adapters(tmp_path / "adapters", 2)
    async with (
        running_vllm(**DUMMY, max_loras=2, max_cpu_loras=4) as (engine, client),
        fronted([engine], tmp_path) as served,
    ):
        for name in names:
            await served.ask(name)
            await client.unload(engine_name(served, name))
        for name in names:
            assert (await served.ask(name)).tokens == answer_of(served, tmp_path, name)
        assert [heal.reason for heal in served.recorder.of(Heal)] == ["engine_miss"] * 2
        assert served.recorder.count(Load) == 4


async def test_adapters_of_others_are_left_alone(tmp_path: Path) -> None:
    names = write_adapters(tmp_path / "adapters", 1)
    other = write_adapter(tmp_path / "elsewhere" / "other", seed=9)
    async with running_vllm(**DUMMY, max_loras=2, max_cpu_loras=4) as (engine, client):
        assert (await client.load("theirs", other)).status_code == 200
        async with fronted([engine], tmp_path) as served:
            assert (await served.ask(names[0])).tokens == answer_of(served, tmp_path, names[0])
            assert "1 adapters that others loaded are left alone" in served.sidecar.gateway.backends["vllm-0"].detail()
        assert set(await client.models()) == {BASE, "theirs"}


async def test_requests_of_others_take_seats_until_they_end(tmp_path: Path) -> None:
    """They are counted when the engine is reached, and fewer as they end; our own are never counted among them."""
    (tmp_path / "adapters").mkdir()
    async with (
        running_vllm(**DUMMY, seats=6, time_scale=1.0) as (engine, _),
        Client(engine.http_address, patience_s=600) as client,
    ):
        body = {"model": BASE, "prompt": "hello", "max_tokens": 8000, "ignore_eos": True}
        others = [asyncio.create_task(client.http.post("/v1/completions", json=body)) for _ in range(3)]
        await until(lambda: engine.engine.counters.active == 3)
        async with fronted([engine], tmp_path, backend={"engine": ENGINE | {"seats": 6}}) as served:
            state = served.state
            backend = state.backends["vllm-0"]
            assert backend.others == 3
            ours = [asyncio.create_task(served.ask("", tokens=3000)) for _ in range(8)]
            await until(lambda: len(backend.running) == 3)
            others.pop().cancel()
            await until(lambda: backend.others == 2 and len(backend.running) == 4)
            for task in others:
                task.cancel()
            await until(lambda: backend.others == 0 and len(backend.running) == 6)
            for task in ours:
                task.cancel()
            await asyncio.gather(*ours, *others, return_exceptions=True)


async def test_what_a_life_before_left_is_unloaded_if_its_files_have_gone(tmp_path: Path) -> None:
    """A request for it would end the engine."""
    names = write_adapters(tmp_path / "adapters", 1)
    gone = tmp_path / "shared" / "0123.files.p1.g0"
    shutil.copytree(tmp_path / "adapters" / names[0], gone)
    async with running_vllm(**DUMMY, max_loras=2, max_cpu_loras=4) as (engine, client):
        await client.load("old@0123", gone)
        shutil.rmtree(gone)
        async with fronted([engine], tmp_path) as served:
            assert "old@0123" not in await client.models()
            assert (await served.ask(names[0])).tokens == answer_of(served, tmp_path, names[0])


async def test_an_old_version_is_refused_unless_the_configuration_insists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidecar.backends.openai.vllm.OLDEST", (9, 0))
    (name,) = write_adapters(tmp_path / "adapters", 1)
    async with running_vllm(**DUMMY) as (engine, _):
        insisting = {"old_versions": True}
        async with fronted([engine], tmp_path, backend=insisting) as served:
            assert (await served.ask(name)).tokens == answer_of(served, tmp_path, name)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0), fronted([engine], tmp_path) as served:
                pass


async def test_a_pool_of_both_kinds_answers_by_name_from_both(tmp_path: Path) -> None:
    """An adapter goes where it can be served, and either kind's answer is right."""
    names = write_adapters(tmp_path / "adapters", 6)
    async with (
        running_engine(compute="none", shape="tiny") as triton,
        running_vllm(**DUMMY, max_loras=2, max_cpu_loras=4) as (vllm, _),
        fronted([triton, vllm], tmp_path, queue={"routing": "round_robin"}) as served,
    ):
        answers = await asyncio.gather(*(served.ask(name) for name in names * 6))
        by = {"trt-0": 0, "vllm-1": 0}
        for name, answer in zip(names * 6, answers, strict=True):
            backend = answer.origins[0].backend
            by[backend] += 1
            right = served.expected(name, 4) if backend == "trt-0" else answer_of(served, tmp_path, name)
            assert answer.tokens == right
        assert min(by.values()) > 0


async def test_an_engine_without_room_for_the_base_model_beside_adapters(tmp_path: Path) -> None:
    """Where mixing breaks the base model's answers they take turns, and both are right."""
    names = write_adapters(tmp_path / "adapters", 3)
    apart = {"engine": ENGINE | {"base_apart": True}}
    async with (
        running_vllm(**DUMMY, max_loras=2, max_cpu_loras=4, mixing_breaks_base=True) as (engine, _),
        fronted([engine], tmp_path, backend=apart) as served,
    ):
        asked = ["", *names] * 12
        answers = await asyncio.gather(*(served.ask(name, tokens=6) for name in asked))
        for name, answer in zip(asked, answers, strict=True):
            right = answer_of(served, tmp_path, name, 6) if name else expected("", None, 6)
            assert answer.tokens == right


async def test_without_a_shared_folder_it_serves_its_base_model_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An adapter is refused with the way out, and the sidecar goes on: 0.1 ended with exit code 70."""
    write_adapters(tmp_path / "adapters", 1)
    caplog.set_level(logging.ERROR, "sidecar.serve.served_folders")
    async with (
        running_vllm(**DUMMY) as (engine, _),
        fronted([engine], tmp_path, backend={"adapters_dir": None}) as served,
    ):
        (refused,) = (record.getMessage() for record in caplog.records)
        assert "serves its base model only; name a folder that both see with backends[].adapters_dir" in refused
        assert (await served.ask("")).tokens == expected("", None, 4)


async def test_an_engine_that_a_reload_adds_reads_from_its_own_folder(tmp_path: Path) -> None:
    """What was staged before is staged there, too, before the engine is told to load it."""
    [name] = write_adapters(tmp_path / "adapters", 1)
    file = tmp_path / "config.json"
    options = {**DUMMY, "max_loras": 2, "max_cpu_loras": 4}
    async with (
        running_vllm(**options) as (one, _),
        running_vllm(**options) as (two, client),
        fronted([one], tmp_path, file=file) as served,
    ):
        assert (await served.ask(name)).tokens == answer_of(served, tmp_path, name)
        record = json.loads(file.read_text())
        [backend] = record["backends"]
        folder = {"adapters_dir": str(tmp_path / "other")}
        record["backends"] = [backend | folder | {"id": "two", "url": f"vllm://{two.http_address}"}]
        file.write_text(json.dumps(record))
        await served.configuration.Reload(admin_pb2.ReloadRequest())
        await until(lambda: list(served.state.backends) == ["two"])
        assert (await served.ask(name)).tokens == answer_of(served, tmp_path, name)
        [place] = [card["root"] for card in (await client.models()).values() if card["parent"]]
        assert Path(place).parent == tmp_path / "other"


async def test_files_stay_for_answers_that_outlive_a_killed_process(tmp_path: Path) -> None:
    """A proxy carries such an answer on, and the engine may read its adapter again. Then files and name go."""
    write_adapter(tmp_path / "former" / "sql", seed=7)
    write_adapters(tmp_path / "adapters", 1)
    shared = str(tmp_path / "shared")
    async with running_vllm(**DUMMY, time_scale=1.0, max_loras=2, max_cpu_loras=4) as (engine, client):
        place = {"url": f"vllm://{engine.http_address}", "id": "vllm-0", "adapters_dir": shared}
        async with sidecar_process(SimpleNamespace(grpc_address=""), tmp_path / "former", **place) as former:
            await former.ask("sql")
            [name] = set(await client.models()) - {BASE}
            carried = client.stream("/v1/completions", model=name, prompt="hello", max_tokens=8000)
            await anext(carried)
            await former.kill()
        [key] = staged(tmp_path)
        async with fronted([engine], tmp_path) as served:
            assert served.state.backends["vllm-0"].others == 1
            assert (await served.ask("a00")).tokens == answer_of(served, tmp_path, "a00")
            assert key in staged(tmp_path)
            assert name in await client.models()
            await carried.aclose()  # type: ignore[attr-defined]
            await until(lambda: key not in staged(tmp_path))
            assert len(staged(tmp_path)) == 1
            await until_async(lambda: lacks(client, name))
            assert (await served.ask("a00")).tokens == answer_of(served, tmp_path, "a00")
        assert staged(tmp_path) == set()


async def lacks(client: Client, name: str) -> bool:
    return name not in await client.models()


async def test_files_stay_for_an_answer_that_outlives_a_stop(tmp_path: Path) -> None:
    """A stop at once, as at a second signal: what a proxy carries goes on. The next process removes the files."""
    async with picker_house(tmp_path) as house:
        raw = await house.routed("a00")
        await raw.send(response_head(), response_body(event("x")))
        await until(lambda: any(request.unseen for request in house.served.state.requests.values()))
        [key] = staged(tmp_path)
    assert staged(tmp_path) == {key}
    async with picker_house(tmp_path, adapters=0):
        await until(lambda: not staged(tmp_path))
