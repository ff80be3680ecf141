"""Load calls in front of a pool of two kinds: a version is on every engine before its name answers by it."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest

from sidecar.adapters.spool import digest_of_folder
from sidecar.core.effects import Load, Quarantine
from sidecar.core.events import AdapterRegistered, LoadDone
from sidecar.core.facts import Layout, packed_key, task_id_of
from sidecar.lab.engine.kserve.compute import dummy_token
from sidecar.lab.engine.trtllm import TrtllmServer
from sidecar.proto import admin_pb2
from tests.kit import trtllm_emulated
from tests.kit.emulated import running_engine
from tests.kit.peft_files import BASE_MODEL, write_adapter
from tests.kit.serving import Answer, Serving, place_of, serving, until
from tests.kit.trtllm_emulated import running_trtllm
from tests.kit.trtllm_served import entry_of
from tests.kit.vllm_emulated import BASE, Client, VllmProcess, expected, running_vllm

VLLM: dict[str, Any] = {"compute": "none", "max_loras": 4, "max_cpu_loras": 8}
TRTLLM: dict[str, Any] = {"compute": "none", "max_loras": 4, "max_cpu_loras": 8, "seats": 32}
ADDED = "Success: LoRA adapter 'grpo' added successfully."


@dataclass
class Trainer:
    """What a trainer has: a folder in which it writes its steps, and a client of one URL."""

    served: Serving
    client: Client
    folder: Path
    engines: list[Any] = field(default_factory=list)

    def write(self, step: int, name: str = "step", **options: Any) -> Path:
        return write_adapter(self.folder / f"{name}-{step}", seed=step, **options)

    async def load(self, path: Path, name: str = "grpo", in_place: bool = True, **fields: Any) -> Any:
        return await self.client.load(name, path, load_inplace=in_place, **fields)

    async def step(self, step: int) -> str:
        """Load a step in place, and return the version that it became."""
        reply = await self.load(self.write(step))
        assert (reply.status_code, reply.text) == (200, ADDED)
        return str(reply.headers["x-lora-version"])

    async def answers(self, count: int = 8, name: str = "grpo") -> list[Answer]:
        return list(await asyncio.gather(*(self.served.ask(name) for _ in range(count))))


@asynccontextmanager
async def pool(
    folder: Path, vllms: int = 2, tritons: int = 2, trtllms: int = 0, **record: Any
) -> AsyncIterator[Trainer]:
    async with AsyncExitStack() as stack:
        engines: list[Any] = [(await stack.enter_async_context(running_vllm(**VLLM)))[0] for _ in range(vllms)]
        engines += [await stack.enter_async_context(running_engine(compute="none")) for _ in range(tritons)]
        engines += [(await stack.enter_async_context(running_trtllm(**TRTLLM)))[0] for _ in range(trtllms)]
        trainer = await stack.enter_async_context(trained(engines, folder, **record))
        yield trainer


@asynccontextmanager
async def trained(engines: list[Any], folder: Path, **record: Any) -> AsyncIterator[Trainer]:
    shared, backend = {"adapters_dir": str(folder / "shared")}, record.pop("backend", {})
    (folder / "steps").mkdir(exist_ok=True)
    backends = [
        place_of(engine, number) | backend | (entry_of(folder, 4, 8) if isinstance(engine, TrtllmServer) else shared)
        for number, engine in enumerate(engines)
    ]
    openai = {"load_calls": True} | record.pop("openai", {})
    async with (
        serving(engines, None, [folder / "steps"], openai=openai, backends=backends, **record) as served,
        Client(served.sidecar.http_address) as client,
    ):
        yield Trainer(served, client, folder / "steps", engines)


def dying(*options: str) -> VllmProcess:
    """Return an engine that can be killed."""
    return VllmProcess("--compute", "none", *options)


@asynccontextmanager
async def both(
    first: VllmProcess, second: VllmProcess, folder: Path, **record: Any
) -> AsyncIterator[tuple[Trainer, VllmProcess, VllmProcess]]:
    async with first, second, trained([first, second], folder, **record) as trainer:
        yield trainer, first, second


async def test_a_step_is_on_every_engine_before_the_name_answers_by_it(tmp_path: Path) -> None:
    async with pool(tmp_path) as trainer:
        assert await trainer.step(1) == "grpo@v1"
        events = trainer.served.recorder.events
        loads = [number for number, event in enumerate(events) if isinstance(event, LoadDone)]
        seen = [n for n, e in enumerate(events) if isinstance(e, AdapterRegistered) and e.allow is None]
        assert len(loads) == 4
        assert max(loads) < min(seen)
        answers = await trainer.answers()
        assert {origin.version for answer in answers for origin in answer.origins} == {"grpo@v1"}


@pytest.mark.parametrize(
    ("steps", "kinds"),
    [
        pytest.param(5, (2, 2, 0), id="vllm-triton", marks=pytest.mark.slow),
        pytest.param(5, (2, 0, 2), id="vllm-trtllm", marks=pytest.mark.slow),
        pytest.param(5, (0, 2, 2), id="triton-trtllm"),
        pytest.param(200, (2, 0, 2), id="long", marks=pytest.mark.slow),
    ],
)
async def test_requests_before_a_step_are_answered_by_the_version_that_they_found(
    tmp_path: Path, steps: int, kinds: tuple[int, int, int]
) -> None:
    """16 requests are in flight over all engines during each step: each is answered by the version at its start."""
    async with pool(tmp_path, *kinds, queue={"routing": "least_in_flight"}) as trainer:
        await trainer.step(0)
        names, wrong, seen, done = trainer.served.state.names, [], set(), asyncio.Event()

        async def ask() -> None:
            while not done.is_set():
                before = names["grpo"].current
                answer = await trainer.served.ask("grpo", tokens=6)
                (origin,) = answer.origins
                seen.add(origin.backend)
                if not before <= int(origin.version.removeprefix("grpo@v")) <= names["grpo"].current:
                    wrong.append(f"{origin.version} between v{before} and v{names['grpo'].current}")
                if answer.tokens != tokens_of(trainer, origin):
                    wrong.append(f"{origin.version} on {origin.backend}: {answer.tokens}")

        asking = [asyncio.create_task(ask()) for _ in range(16)]
        for step in range(1, steps + 1):
            version = await trainer.step(step)
            assert {answer.origins[0].version for answer in await trainer.answers()} == {version}
        done.set()
        await asyncio.gather(*asking)
        assert wrong == []
        assert len(seen) == 4


def tokens_of(trainer: Trainer, origin: Any, count: int = 6) -> list[int]:
    """Return what an engine answers by the step that became a version; step n is version n + 1."""
    step = int(origin.version.removeprefix("grpo@v")) - 1
    return _tokens(trainer.folder / f"step-{step}", origin.backend.partition("-")[0], count)


@cache
def _tokens(folder: Path, kind: str, count: int) -> list[int]:
    if kind == "trtllm":
        return trtllm_emulated.expected(folder, count)
    digest = digest_of_folder(folder)
    if kind == "vllm":
        return expected(f"grpo@{digest[:12]}", folder, count)
    return [dummy_token(task_id_of(packed_key(digest, Layout("float16"))), position) for position in range(count)]


@pytest.mark.parametrize(
    ("body", "status", "kind", "text"),
    [
        ({"lora_path": "x"}, 400, "Bad Request", "1 validation error:\n  {'type': 'missing', 'loc': 'body.lora_name'"),
        ({"lora_name": "x"}, 400, "Bad Request", "1 validation error:\n  {'type': 'missing', 'loc': 'body.lora_path'"),
        ([], 400, "Bad Request", "1 validation error:\n  {'type': 'model_attributes_type', 'loc': 'body'"),
        (b"{", 400, "Bad Request", "1 validation error:\n  {'type': 'json_invalid', 'loc': 'body.1'"),
        (
            {"lora_name": "", "lora_path": "x"},
            400,
            "InvalidUserInput",
            "Both 'lora_name' and 'lora_path' must be provided.",
        ),
        (
            {"lora_name": "x", "lora_path": ""},
            400,
            "InvalidUserInput",
            "Both 'lora_name' and 'lora_path' must be provided.",
        ),
        (
            {"lora_name": BASE, "lora_path": "x"},
            400,
            "InvalidUserInput",
            "The lora adapter 'base' conflicts with a served base model.",
        ),
        (
            {"lora_name": "grpo", "lora_path": "{steps}/step-1"},
            400,
            "InvalidUserInput",
            "The lora adapter 'grpo' has already been loaded. If you want to load the adapter in place, set "
            "'load_inplace' to True.",
        ),
        (
            {"lora_name": "x", "lora_path": "{steps}/none"},
            404,
            "NotFoundError",
            "Loading lora x failed: No adapter found for {steps}/none",
        ),
        (
            {"lora_name": "x", "lora_path": "{steps}/rank"},
            500,
            "InternalServerError",
            "Call to add_lora method failed: Worker failed with error 'LoRA rank 64 is greater than max_lora_rank 16.",
        ),
        (
            {"lora_name": "x", "lora_path": "{steps}/dora"},
            500,
            "InternalServerError",
            "Call to add_lora method failed: Worker failed with error 'vLLM does not yet support DoRA.",
        ),
        (
            {"lora_name": "x", "lora_path": "{steps}/corrupt"},
            500,
            "InternalServerError",
            "Call to add_lora method failed: Worker failed with error '",
        ),
        (
            {"lora_name": "x y", "lora_path": "{steps}/step-1"},
            400,
            "InvalidUserInput",
            "adapter name 'x y' is not valid",
        ),
        ({"lora_name": "x", "lora_path": "/etc"}, 400, "InvalidUserInput", "x: '/etc' is outside the allowed roots ("),
        (
            {"lora_name": "x", "lora_path": "{steps}/../shared"},
            400,
            "InvalidUserInput",
            "x: '{steps}/../shared' is out",
        ),
        ({"lora_name": "x", "lora_path": "hf://a/b"}, 400, "InvalidUserInput", "'hf://a/b' is not an absolute path"),
        ({"lora_name": "x", "lora_path": "step-1"}, 400, "InvalidUserInput", "'step-1' is not an absolute path"),
        (
            b'{"lora_name": "x", "lora_path": "{steps}/step-1", "lora_name": "y"}',
            400,
            "Bad Request",
            "1 validation error:\n  {'type': 'value_error', 'loc': 'body.lora_name', 'msg': 'Value error, it is given",
        ),
    ],
)
async def test_what_cannot_be_loaded_is_refused_as_vllm_does_and_leaves_nothing_behind(
    tmp_path: Path, body: Any, status: int, kind: str, text: str
) -> None:
    async with pool(tmp_path, 1, 0, backend={"engine": {"rank_max": 16}}) as trainer:
        await trainer.step(1)
        trainer.write(0, "rank", rank=64).rename(trainer.folder / "rank")
        trainer.write(0, "dora", use_dora=True).rename(trainer.folder / "dora")
        corrupt = trainer.write(0, "corrupt").rename(trainer.folder / "corrupt")
        (corrupt / "adapter_model.safetensors").write_bytes(b"\xff" * 64)
        before = left_behind(trainer)
        steps = str(trainer.folder)
        content = (body if isinstance(body, bytes) else json.dumps(body).encode()).replace(b"{steps}", steps.encode())
        reply = await trainer.client.http.post(
            "/v1/load_lora_adapter", content=content, headers={"content-type": "application/json"}
        )
        error = reply.json()["error"]
        assert (reply.status_code, error["code"], error["type"]) == (status, status, kind)
        assert error["message"].startswith(text.replace("{steps}", steps)), error["message"]
        await until(lambda: left_behind(trainer) == before)


def left_behind(trainer: Trainer) -> dict[str, Any]:
    """Return the names, versions and files of a sidecar and its engines."""
    gateway = trainer.served.sidecar.gateway
    spool = gateway.sources.spool.directory
    return {
        "names": {record.name: record.versions for record in gateway.catalogue.registry.all()},
        "versions": set(gateway.state.versions),
        "sources": sorted(path.name for path in (spool / "sources").iterdir()),
        "incoming": sorted(path.name for path in (spool / "incoming").iterdir()),
        "staged": sorted(path.name for path in (trainer.folder.parent / "shared").iterdir() if path.name[0] != "."),
        "engines": [sorted(engine.adapters.copies) for engine in trainer.engines if hasattr(engine, "adapters")],
    }


async def test_an_adapter_that_engines_refuse_changes_nothing(tmp_path: Path) -> None:
    """One engine alone may be short of memory. When the second has refused it, a third may have been asked already."""
    async with pool(tmp_path, 5, 0) as trainer:
        await trainer.step(1)
        before = left_behind(trainer)
        reply = await trainer.load(trainer.write(2, rank=32))
        error = reply.json()["error"]
        assert (reply.status_code, error["type"]) == (500, "InternalServerError")
        assert error["message"] == (
            "Call to add_lora method failed: Worker failed with error 'LoRA rank 32 is greater than max_lora_rank "
            "16.', please check the stack trace above for the root cause"
        )
        loads = [effect for effect in trainer.served.recorder.of(Load) if effect.digest not in before["versions"]]
        assert 2 <= len(loads) <= 3
        await until(lambda: left_behind(trainer) == before)
        assert {answer.origins[0].version for answer in await trainer.answers()} == {"grpo@v1"}
        assert await trainer.step(3) == "grpo@v2"


async def test_one_engine_that_refuses_it_does_not_hold_up_the_others(tmp_path: Path) -> None:
    small = running_vllm(**VLLM | {"max_lora_rank": 8})
    async with small as (engine, _), running_vllm(**VLLM) as (other, _), trained([engine, other], tmp_path) as trainer:
        reply = await trainer.load(trainer.write(1, rank=16))
        assert (reply.status_code, reply.text) == (200, ADDED)
        assert (reply.headers["x-lora-backends"], reply.headers["x-lora-without"]) == ("vllm-1", "vllm-0")
        assert {answer.origins[0].backend for answer in await trainer.answers()} == {"vllm-1"}


async def test_an_engine_that_is_down_does_not_hold_up_the_name_and_gets_the_version_later(tmp_path: Path) -> None:
    async with both(dying(), dying(), tmp_path) as (trainer, engine, other):
        backends = trainer.served.state.backends
        await trainer.step(0)
        await engine.kill()
        await until(lambda: not backends["vllm-0"].takes_requests)
        reply = await trainer.load(trainer.write(1))
        assert reply.status_code == 200
        assert (reply.headers["x-lora-backends"], reply.headers["x-lora-without"]) == ("vllm-1", "vllm-0")
        assert {answer.origins[0].version for answer in await trainer.answers()} == {"grpo@v2"}
        await engine.start()
        await until(lambda: backends["vllm-0"].takes_requests)
        await other.kill()
        await until(lambda: not backends["vllm-1"].takes_requests)
        for answer in await trainer.answers():
            assert (answer.origins[0].version, answer.origins[0].backend) == ("grpo@v2", "vllm-0")


async def test_an_engine_that_goes_down_during_its_load_does_not_hold_up_the_name(tmp_path: Path) -> None:
    async with both(dying(), dying("--load-ms", "600000"), tmp_path) as (trainer, _, engine):
        loading = asyncio.create_task(trainer.load(trainer.write(0)))
        await until(lambda: any(effect.backend == "vllm-1" for effect in trainer.served.recorder.of(Load)))
        await engine.kill()
        reply = await loading
        assert (reply.status_code, reply.text) == (200, ADDED)
        assert (reply.headers["x-lora-backends"], reply.headers["x-lora-without"]) == ("vllm-0", "vllm-1")


async def test_an_engine_that_comes_while_the_only_other_is_drained_is_asked_as_well(tmp_path: Path) -> None:
    """As where engines are restarted in turn: at no moment was the pool without one."""
    async with both(dying("--load-ms", "600000"), dying(), tmp_path) as (trainer, _, engine):
        backends = trainer.served.state.backends
        await engine.kill()
        await until(lambda: not backends["vllm-1"].takes_requests)
        loading = asyncio.create_task(trainer.load(trainer.write(0)))
        await until(lambda: any(effect.backend == "vllm-0" for effect in trainer.served.recorder.of(Load)))
        await engine.start()
        await until(lambda: backends["vllm-1"].takes_requests)
        await trainer.served.backends.Drain(admin_pb2.BackendRequest(backend="vllm-0"))
        reply = await loading
        assert (reply.status_code, reply.text) == (200, ADDED)
        assert (reply.headers["x-lora-backends"], reply.headers["x-lora-without"]) == ("vllm-1", "vllm-0")


async def test_an_adapter_that_engines_die_of_gets_no_further_than_two(tmp_path: Path) -> None:
    deadly = write_adapter(tmp_path / "deadly", seed=66)
    crash = ("--crash-on-load", f"grpo@{digest_of_folder(deadly)[:12]}")
    async with (
        dying(*crash) as one,
        dying(*crash) as two,
        dying(*crash) as three,
        trained([one, two, three], tmp_path) as trainer,
    ):
        await trainer.step(0)
        before = left_behind(trainer)
        shutil.copytree(deadly, trainer.folder / "deadly")
        reply = await trainer.load(trainer.folder / "deadly")
        assert reply.status_code == 500
        assert "quarantined" in reply.json()["error"]["message"]
        assert len(trainer.served.recorder.of(Quarantine)) == 1
        assert sum(backend.takes_requests for backend in trainer.served.state.backends.values()) == 1
        await until(lambda: left_behind(trainer) == before)
        assert {answer.origins[0].version for answer in await trainer.answers()} == {"grpo@v1"}


async def test_without_an_engine_nothing_is_loaded(tmp_path: Path) -> None:
    async with dying() as engine, trained([engine], tmp_path) as trainer:
        await engine.kill()
        await until(lambda: not trainer.served.state.backends["vllm-0"].takes_requests)
        reply = await trainer.load(trainer.write(0))
        assert reply.status_code == 500
        assert reply.json()["error"]["message"] == ("grpo: no engine can take it now (vllm-0: it is down); try again")
        assert reply.headers["retry-after"] == "1"
        assert trainer.served.state.names == {}
        with pytest.raises(grpc.aio.AioRpcError, match="unknown adapter"):
            await trainer.served.ask("grpo")
        await engine.start()
        await until(lambda: trainer.served.state.backends["vllm-0"].takes_requests)
        assert await trainer.step(0) == "grpo@v1"


async def test_a_new_name_is_unknown_until_it_is_loaded(tmp_path: Path) -> None:
    async with dying("--load-ms", "600000") as engine, trained([engine], tmp_path) as trainer:
        loading = asyncio.create_task(trainer.load(trainer.write(0)))
        await until(lambda: bool(trainer.served.recorder.of(Load)))
        with pytest.raises(grpc.aio.AioRpcError, match='unknown adapter "grpo"'):
            await trainer.served.ask("grpo")
        assert set(await trainer.client.models()) == {BASE}
        assert (await trainer.client.unload("grpo")).status_code == 404 if loading.done() else True
        await engine.kill()
        assert (await loading).status_code == 500
        assert trainer.served.state.names == {}


async def test_two_loads_of_one_name_take_turns(tmp_path: Path) -> None:
    async with pool(tmp_path, 2, 0) as trainer:
        paths = [trainer.write(step) for step in range(3)]
        first, second = await asyncio.gather(*(trainer.load(path, in_place=False) for path in paths[:2]))
        assert sorted((first.status_code, second.status_code)) == [200, 400]
        replies = await asyncio.gather(*(trainer.load(path) for path in paths[1:]))
        assert [reply.status_code for reply in replies] == [200, 200]
        current = trainer.served.sidecar.gateway.catalogue.known("grpo")
        assert f"grpo@v{current.current}" in [reply.headers["x-lora-version"] for reply in replies]
        assert {answer.origins[0].version for answer in await trainer.answers()} == {f"grpo@v{current.current}"}


async def test_a_load_is_carried_out_although_its_client_has_left(tmp_path: Path) -> None:
    async with running_vllm(**VLLM, load_ms=500) as (engine, _), trained([engine], tmp_path) as trainer:
        async with Client(trainer.served.sidecar.http_address, patience_s=0.1) as impatient:
            with pytest.raises(httpx.ReadTimeout):
                await impatient.load("grpo", trainer.write(0))
        await until(lambda: "grpo" in trainer.served.state.names and trainer.served.state.names["grpo"].allow is None)
        reply = await trainer.load(trainer.folder / "step-0")
        assert (reply.status_code, reply.headers["x-lora-version"]) == (200, "grpo@v1")


async def test_a_load_that_is_under_way_is_carried_out_before_the_process_ends(tmp_path: Path) -> None:
    async with both(dying(), dying("--load-ms", "600000"), tmp_path, drain_timeout_s=60) as (trainer, _, slow):
        loading = asyncio.create_task(trainer.load(trainer.write(0)))
        await until(lambda: any(effect.backend == "vllm-1" for effect in trainer.served.recorder.of(Load)))
        draining = asyncio.create_task(trainer.served.sidecar.drain())
        await until(lambda: trainer.served.state.draining)
        late = await trainer.load(trainer.write(1), "late")
        assert late.status_code == 500
        assert "the sidecar is shutting down" in late.json()["error"]["message"]
        await slow.kill()
        assert (await loading).status_code == 200  # it was under way, and the other engine has it
        await draining


async def test_old_versions_and_their_files_go_as_steps_go_by_but_not_while_a_request_uses_them(tmp_path: Path) -> None:
    async with pool(tmp_path, 1, 1, openai={"versions_kept": 3}) as trainer:
        await trainer.step(0)
        gateway = trainer.served.sidecar.gateway
        oldest = gateway.state.names["grpo"].digest
        slow = [asyncio.create_task(trainer.served.ask("grpo@v1", tokens=4000)) for _ in range(2)]
        await until(lambda: len(gateway.state.requests) == 2)
        for step in range(1, 8):
            await trainer.step(step)
        kept = gateway.catalogue.known("grpo")
        assert [version.ordinal for version in kept.versions] == [6, 7, 8]
        if not any(task.done() for task in slow):
            assert oldest in left_behind(trainer)["sources"]
        for answer in await asyncio.gather(*slow):
            (origin,) = answer.origins
            assert answer.tokens == tokens_of(trainer, origin, 4000)
        digests = sorted(version.adapter.digest for version in kept.versions)
        await until(lambda: left_behind(trainer)["sources"] == digests)
        await until(lambda: {name.partition(".")[0] for name in left_behind(trainer)["staged"]} <= set(digests))
        names = {f"grpo@{digest[:12]}" for digest in digests}
        await until(lambda: set(left_behind(trainer)["engines"][0]) <= names)


async def test_a_trainer_may_rewrite_its_folder_as_soon_as_it_has_its_answer(tmp_path: Path) -> None:
    """The same folder for each step, garbage after that: all versions that are kept still come from our copy."""
    async with pool(tmp_path, 1, 1) as trainer:
        path = trainer.folder / "latest"
        for step in range(3):
            shutil.copytree(trainer.write(step), path, dirs_exist_ok=True)
            assert (await trainer.load(path)).headers["x-lora-version"] == f"grpo@v{step + 1}"
        (path / "adapter_model.safetensors").write_bytes(b"not yet")
        await trainer.served.adapters.Evict(admin_pb2.AdapterRequest(name="grpo"))
        for version in (1, 2, 3):
            answer = await trainer.served.ask(f"grpo@v{version}", tokens=6)
            assert answer.tokens == tokens_of(trainer, answer.origins[0])


async def test_an_unloaded_name_is_unknown_and_what_runs_ends(tmp_path: Path) -> None:
    async with pool(tmp_path, 1, 1) as trainer:
        before = left_behind(trainer)
        await trainer.step(0)
        slow = [asyncio.create_task(trainer.served.ask("grpo", tokens=4000)) for _ in range(2)]
        await until(lambda: len(trainer.served.state.requests) == 2)
        reply = await trainer.client.unload("grpo")
        assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'grpo' removed successfully.")
        with pytest.raises(grpc.aio.AioRpcError, match='unknown adapter "grpo"'):
            await trainer.served.ask("grpo")
        for answer in await asyncio.gather(*slow):
            assert answer.tokens == tokens_of(trainer, answer.origins[0], 4000)
        await until(lambda: left_behind(trainer) == before)
        again = await trainer.client.unload("grpo")
        assert again.status_code == 404
        assert again.json()["error"] == {
            "message": "The lora adapter 'grpo' cannot be found.",
            "type": "NotFoundError",
            "param": None,
            "code": 404,
        }
        nameless = await trainer.client.unload("")
        assert nameless.status_code == 400
        assert nameless.json()["error"]["message"] == "'lora_name' needs to be provided to unload a LoRA adapter."
        assert await trainer.step(1) == "grpo@v1"


async def test_names_of_operators_are_left_alone_and_operators_may_take_a_trainers_name(tmp_path: Path) -> None:
    async with pool(tmp_path, 1, 0) as trainer:
        adapters, path = trainer.served.adapters, str(trainer.write(0))
        await adapters.Register(admin_pb2.RegisterRequest(name="sql", path=path))
        for reply in (await trainer.load(trainer.write(1), "sql"), await trainer.client.unload("sql")):
            assert reply.status_code == 400
            assert "sql is registered by hand, and load calls change no name that they did not make" in reply.text
        assert "already been loaded" in (await trainer.load(trainer.write(1), "sql", in_place=False)).text
        assert await trainer.step(1) == "grpo@v1"
        assert await trainer.step(2) == "grpo@v2"
        await adapters.Rollback(admin_pb2.RollbackRequest(name="grpo", hold_s=3600))
        held = await trainer.load(trainer.write(3))
        assert held.status_code == 400
        assert "grpo is held by an operator" in held.json()["error"]["message"]
        await adapters.Register(admin_pb2.RegisterRequest(name="grpo", path=path))
        assert "by hand" in (await trainer.load(trainer.write(3))).text
        await adapters.Unregister(admin_pb2.UnregisterRequest(name="grpo"))
        assert await trainer.step(3) == "grpo@v1"


async def test_an_adapter_that_names_no_base_model_is_for_the_only_one_that_is_served(tmp_path: Path) -> None:
    async with pool(tmp_path, 2, 0, backend={"base_model": {"name": BASE_MODEL}}) as trainer:
        reply = await trainer.load(trainer.write(0, base_model_name_or_path=None))
        assert reply.status_code == 200, reply.text
        other = await trainer.load(trainer.write(1, base_model_name_or_path="/models/another"))
        assert other.status_code == 500
        assert "/models/another" in other.json()["error"]["message"]


async def test_models_say_from_where_a_name_was_loaded(tmp_path: Path) -> None:
    async with pool(tmp_path, 1, 0) as trainer:
        await trainer.step(0)
        card = (await trainer.client.models())["grpo"]
        assert card["root"] == str(trainer.folder / "step-0")


async def test_what_prime_rl_sends_is_served(tmp_path: Path) -> None:
    """Its client's requests after each step, recorded from its code: a path without /v1, which loads in place always.

    It tries again after a 404 and a 500: its files may not be on our file system yet.
    """
    async with pool(tmp_path, 1, 1) as trainer:
        url = f"http://{trainer.served.sidecar.http_address}"
        headers = {"authorization": "Bearer secret"}
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=None, trust_env=False) as admin:
            timeout = httpx.Timeout(connect=10.0, read=30.0, write=60.0, pool=10.0)

            async def load(path: Path) -> httpx.Response:
                body = {"lora_name": "r8-1", "lora_path": path.as_posix()}
                return await admin.post("/load_lora_adapter", json=body, timeout=timeout)

            assert (await admin.get("/health")).status_code == 200
            late = trainer.folder / "broadcasts" / "step_0"
            assert (await load(late)).status_code == 404
            late.parent.mkdir()
            for step in range(3):
                trainer.write(step).rename(late.parent / f"step_{step}")
                (await load(late.parent / f"step_{step}")).raise_for_status()
                answers = await trainer.answers(name="r8-1")
                assert {answer.origins[0].version for answer in answers} == {f"r8-1@v{step + 1}"}
            models = (await admin.get("/v1/models")).json()["data"]
            assert "r8-1" in [model["id"] for model in models]
            await admin.post("/v1/unload_lora_adapter", json={"lora_name": "r8-1"})
            assert trainer.served.state.names == {}


async def test_load_calls_are_off_unless_they_are_asked_for(tmp_path: Path) -> None:
    async with (
        running_vllm(**VLLM) as (engine, _),
        trained([engine], tmp_path, openai={"load_calls": False}) as trainer,
    ):
        reply = await trainer.load(trainer.write(0))
        error = reply.json()["error"]
        assert reply.status_code == error["code"] == 404  # as from a vLLM without them
        assert "operators add and remove adapters" in error["message"]
        assert "openai.load_calls: true" in error["message"]
