"""The trtllm backend in front of emulated trtllm-serves: ids and folders, loads, ends and silences of engines."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from sidecar.core.effects import Heal, Load
from sidecar.core.facts import packed_key, task_id_of
from sidecar.lab.engine.trtllm import TrtllmServer
from sidecar.proto import admin_pb2, gateway_pb2
from tests.kit.peft_files import write_adapter
from tests.kit.serving import Serving, serving, until, write_adapters
from tests.kit.trtllm_emulated import BASE, Client, TrtllmProcess, expected, running_trtllm
from tests.kit.trtllm_served import answer_of, entry_of, fronted, staged

DUMMY: dict[str, Any] = {"compute": "none", "max_loras": 2, "max_cpu_loras": 4, "seats": 32}
PROBES = 8
"""The adapters by which the engine is seen to compute with each declared module, and with all at once."""
PROCESS = ("--compute", "none", "--max-loras", "2", "--max-cpu-loras", "4", "--iteration-stats")


@asynccontextmanager
async def one(
    folder: Path, adapters: int = 3, **options: Any
) -> AsyncIterator[tuple[Serving, TrtllmServer, list[str]]]:
    """Run an engine, a sidecar in front of it, and the adapters `a00`, `a01`, …"""
    names = write_adapters(folder / "adapters", adapters)
    async with running_trtllm(**DUMMY | options) as (engine, _), fronted([engine], folder) as served:
        yield served, engine, names


def key_of(served: Serving, name: str) -> str:
    backend = next(iter(served.state.backends.values()))
    return packed_key(served.state.names[name].digest, backend.facts.layout.for_modules(()))


async def test_adapters_answer_by_the_hash_of_their_content(tmp_path: Path) -> None:
    """The engine knows each by 63 bits of its packed key, from a folder of that name."""
    async with one(tmp_path) as (served, engine, names):
        for name in names:
            assert (await served.ask(name)).tokens == answer_of(tmp_path, name)
        assert (await served.ask("")).tokens == expected(None, 4)
        known = {int(number) for number in engine.adapters.submitted}
        wanted = {task_id_of(key_of(served, name)) for name in names}
        assert wanted <= known
        assert len(known) == len(names) + PROBES
        assert staged(tmp_path) == {key_of(served, name) for name in names}
        assert all(0 < number < 2**63 for number in known)


async def test_new_content_gets_a_new_id(tmp_path: Path) -> None:
    """An id means its first content for ever, so a changed adapter must not come under the old one."""
    async with one(tmp_path, 1) as (served, engine, _):
        for seed in (1, 2):
            folder = write_adapter(tmp_path / "versions" / f"{seed}", seed=seed)
            await register(served, "sql", folder)
            assert (await served.ask("sql")).tokens == expected(folder, 4)
        assert (await served.ask("sql@v1")).tokens == expected(tmp_path / "versions" / "1", 4)
        assert len(engine.adapters.submitted) == 2 + PROBES


async def register(served: Serving, name: str, folder: Path) -> None:
    await served.adapters.Register(admin_pb2.RegisterRequest(name=name, path=str(folder)))


@pytest.mark.parametrize("era", ["1.2", "main"])
async def test_an_engine_without_lora_is_found_and_not_served(tmp_path: Path, era: str) -> None:
    """It would answer as the base model and say nothing."""
    async with running_trtllm(**DUMMY | {"lora_modules": (), "era": era}) as (engine, _):
        entry = entry_of(tmp_path) | {"url": f"trtllm://{engine.http_address}", "id": "t0"}
        async with serving([], backends=[entry | {"discover": None}], until_up=False) as served:
            backend = served.sidecar.gateway.fleet.backends["t0"]
            await until(lambda: "LoRA is switched off" in backend.detail())
            assert not served.state.backends["t0"].takes_requests
            assert "start trtllm-serve with a lora_config" in backend.detail()


async def test_an_engine_that_leaves_out_declared_modules_is_found(tmp_path: Path) -> None:
    """An adapter of such a module alone is refused. Older servers would end by it, so there nothing is tried."""
    options = {"max_loras": 2, "max_cpu_loras": 4, "lora_modules": ("attn_q", "attn_k", "attn_v")}
    async with running_trtllm(**options) as (engine, _):
        entry = entry_of(tmp_path) | {"url": f"trtllm://{engine.http_address}", "id": "t0"}
        async with serving([], backends=[entry | {"discover": None}], until_up=False) as served:
            backend = served.sidecar.gateway.fleet.backends["t0"]
            await until(lambda: "refuses an adapter of mlp_4h_to_h, which this entry declares" in backend.detail())


async def test_a_probe_that_ends_the_engine_names_what_to_compare(tmp_path: Path) -> None:
    async with running_trtllm(**DUMMY | {"max_lora_rank": 4, "era": "1.2"}) as (engine, _):
        entry = entry_of(tmp_path) | {"url": f"trtllm://{engine.http_address}", "id": "t0", "progress_timeout_s": 2}
        async with serving([], backends=[entry | {"discover": None}], until_up=False) as served:
            backend = served.sidecar.gateway.fleet.backends["t0"]
            await until(lambda: "fell silent when an adapter of rank 8 of mlp_4h_to_h" in backend.detail())
            assert "compare its max_lora_rank" in backend.detail()


@pytest.mark.parametrize("era", ["1.2", "main"])
async def test_without_target_modules_an_engine_adapts_all_of_them(tmp_path: Path, era: str) -> None:
    """The probe names no layer twice, by itself and as a part of a fused one."""
    names = write_adapters(tmp_path / "adapters", 1)
    async with running_trtllm(**DUMMY | {"era": era}) as (engine, _):  # noqa: SIM117 — the sidecar needs the engine
        async with fronted([engine], tmp_path, backend=entry_of(tmp_path, lora_target_modules=[])) as served:
            assert (await served.ask(names[0])).tokens == answer_of(tmp_path, names[0])


@pytest.mark.parametrize(
    ("options", "lora_config", "words"),
    [
        ({"rank": 16}, {"max_lora_rank": 8}, "its rank is 16 and the engine takes at most 8"),
        ({"modules": ("o_proj",)}, {"lora_target_modules": ["attn_q", "attn_v"]}, 'adapts "attn_dense"'),
        ({"layers": (0, 5)}, {}, "it adapts layer 5"),
        ({"modules": ("q_proj", "embed_tokens")}, {}, "embed_tokens"),
    ],
    ids=["rank", "module", "layer", "unknown"],
)
async def test_what_would_end_the_engine_never_gets_there(
    tmp_path: Path, options: dict[str, Any], lora_config: dict[str, Any], words: str
) -> None:
    modules = tuple(lora_config.get("lora_target_modules", ())) or DUMMY.get("lora_modules")
    more: dict[str, Any] = {} if modules is None else {"lora_modules": modules}
    (tmp_path / "adapters").mkdir()
    more["max_lora_rank"] = lora_config.get("max_lora_rank", 64)
    async with running_trtllm(**DUMMY | more) as (engine, _):  # noqa: SIM117 — the sidecar needs the engine
        async with fronted([engine], tmp_path, backend=entry_of(tmp_path, **lora_config)) as served:
            if "embed_tokens" in options.get("modules", ()):
                write_adapter(tmp_path / "bad")
                renamed(tmp_path / "bad")
            else:
                write_adapter(tmp_path / "bad", **options)
            before = dict(engine.adapters.submitted)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await register(served, "bad", tmp_path / "bad")
            assert words in (refused.value.details() or "")
            assert engine.adapters.submitted == before
            assert engine.died is None


def renamed(folder: Path) -> None:
    """Give a tensor the name of an embedding's."""
    path = folder / "adapter_model.safetensors"
    old, new = b"self_attn.q_proj.lora_A.weight", b"embed_tokens.lora_embed_AX    "
    assert len(old) == len(new)
    path.write_bytes(path.read_bytes().replace(old, new, 1))


async def test_loads_go_one_at_a_time(tmp_path: Path) -> None:
    """Each holds up all running answers; several at once would hold them up longer than needed."""
    async with one(tmp_path, 6, max_loras=6, max_cpu_loras=12, load_ms=30.0) as (served, engine, names):
        at_once, most = 0, 0
        submit = engine.adapters.submit

        async def counted(request: Any) -> Any:
            nonlocal at_once, most
            at_once += 1
            most = max(most, at_once)
            try:
                return await submit(request)
            finally:
                at_once -= 1

        engine.adapters.submit = counted  # type: ignore[method-assign]
        answers = await asyncio.gather(*(served.ask(name) for name in names for _ in range(3)))
        assert [answer.tokens for answer in answers] == [answer_of(tmp_path, name) for name in names for _ in range(3)]
        assert most == 1
        assert served.recorder.count(Load) >= len(names)


async def test_lost_files_are_staged_again(tmp_path: Path) -> None:
    """Each request carries the path, and the server looks for it each time."""
    async with one(tmp_path) as (served, _, names):
        assert (await served.ask(names[0])).tokens == answer_of(tmp_path, names[0])
        shutil.rmtree(tmp_path / "shared" / key_of(served, names[0]))
        assert (await served.ask(names[0])).tokens == answer_of(tmp_path, names[0])
        assert [heal.reason for heal in served.recorder.of(Heal)] == ["engine_miss"]


async def test_a_restart_costs_a_load(tmp_path: Path) -> None:
    names = write_adapters(tmp_path / "adapters", 2)
    async with TrtllmProcess(*PROCESS) as engine, fronted([engine], tmp_path) as served:
        for name in names:
            assert (await served.ask(name)).tokens == answer_of(tmp_path, name)
        await engine.kill()
        asking = [asyncio.create_task(served.ask(name)) for name in names for _ in range(4)]
        await engine.start()
        for task, name in zip(asking, [name for name in names for _ in range(4)], strict=True):
            assert (await task).tokens == answer_of(tmp_path, name)


async def test_a_declared_number_of_slots_that_is_too_high_is_lowered(tmp_path: Path) -> None:
    """The batch fails as a whole; what has no token is sent again, and fewer adapters run at once from then on."""
    names = write_adapters(tmp_path / "adapters", 4)
    options = DUMMY | {"max_loras": 2, "max_cpu_loras": 8, "time_scale": 1.0, "step_errors_max": 1000}
    backend = entry_of(tmp_path, max_loras=4, max_cpu_loras=8)
    async with running_trtllm(**options) as (engine, _), fronted([engine], tmp_path, backend=backend) as served:

        def slots() -> int:
            return served.state.backends["trtllm-0"].facts.device_pages

        while slots() > 2:
            answers = await asyncio.gather(*(served.ask(name, 40) for name in names), return_exceptions=True)
            for name, answer in zip(names, answers, strict=True):
                if isinstance(answer, grpc.aio.AioRpcError):
                    assert "tokens had been sent" in (answer.details() or "")
                elif isinstance(answer, BaseException):
                    raise answer
                else:
                    assert answer.tokens == answer_of(tmp_path, name, 40)
        answers = await asyncio.gather(*(served.ask(name, 40) for name in names))
        assert [answer.tokens for answer in answers] == [answer_of(tmp_path, name, 40) for name in names]
        assert engine.died is None


@pytest.mark.parametrize("era", ["1.2", "main"])
async def test_an_engine_that_dies_in_silence_is_lost_and_its_requests_run_elsewhere(tmp_path: Path, era: str) -> None:
    """Its clients are never told: only the time without progress shows it."""
    names = write_adapters(tmp_path / "adapters", 1)
    backend = entry_of(tmp_path) | {"progress_timeout_s": 1.0}
    async with AsyncExitStack() as stack:
        running = [await stack.enter_async_context(running_trtllm(**DUMMY, era=era)) for _ in range(2)]
        engines = [engine for engine, _ in running]
        served = await stack.enter_async_context(fronted(engines, tmp_path, backend=backend))
        assert (await served.ask(names[0])).tokens == answer_of(tmp_path, names[0])
        await ended(engines[0], running[0][1], write_adapter(tmp_path / "deadly", rank=128))
        answers = await asyncio.gather(*(served.ask(names[0]) for _ in range(8)))
        assert all(answer.tokens == answer_of(tmp_path, names[0]) for answer in answers)


async def ended(engine: TrtllmServer, client: Client, folder: Path) -> None:
    """End an engine by an adapter that it is given past the sidecar, and that it does not check."""
    asking = asyncio.create_task(client.complete(7, folder))
    await until(lambda: engine.died is not None)
    asking.cancel()


async def test_a_cancelled_request_keeps_its_slot_until_the_engine_has_let_go(tmp_path: Path) -> None:
    """The server asks once a second whether its client is still there; until then the adapter is in the batch."""
    async with one(tmp_path, 3, time_scale=1.0) as (served, engine, names):
        running = [asyncio.create_task(served.ask(name, 2000)) for name in names[:2]]
        await until(lambda: engine.engine.counters.active == 2)
        running[0].cancel()
        third = asyncio.create_task(served.ask(names[2], 4))
        most = 0
        while not third.done():
            await asyncio.sleep(0.01)
            most = max(most, engine.engine.counters.active)
        assert most <= 2
        assert (await third).tokens == answer_of(tmp_path, names[2])
        running[1].cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def test_generate_takes_text_too(tmp_path: Path) -> None:
    async with one(tmp_path, 1) as (served, _, (name,)):
        request = gateway_pb2.GenerateRequest(adapter=name, text="hello", max_tokens=4)
        text = "".join([response.text async for response in served.gateway.Generate(request)])
        assert text
        assert BASE not in text
