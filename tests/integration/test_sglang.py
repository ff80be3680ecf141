"""The sglang backend in front of emulated SGLangs: what it refuses before a call, names, room, aborts, checks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest

from sidecar.backends.checking import check
from sidecar.backends.checks.finding import Finding, State, Target
from sidecar.backends.openai.kind import kind_of_dialect
from sidecar.backends.openai.sglang import DIALECT
from sidecar.backends.registry import entries_of
from sidecar.config import parse
from sidecar.errors import Misused
from sidecar.lab.engine.openai.sglang import SglangServer
from sidecar.proto import admin_pb2
from sidecar.serve.pool import base_model_of, facts_of
from tests.kit.looking import worse
from tests.kit.peft_files import Dims, write_adapter
from tests.kit.serving import Serving, serving, until, write_adapters
from tests.kit.sglang_emulated import SglangClient, running_sglang, sglang_entry

DUMMY: dict[str, Any] = {"compute": "none", "max_loras": 2, "max_cpu_loras": 2, "seats": 32}
WAYS = pytest.mark.parametrize("files", [False, True], ids=["sent", "read from files"])


def entry_of(engine: SglangServer, folder: Path, files: bool = False, **keys: Any) -> dict[str, Any]:
    (folder / "shared").mkdir(exist_ok=True)
    shared = {"adapters_dir": str(folder / "shared")} if files else {}
    return {"url": f"sglang://{engine.http_address}", "id": "s0"} | sglang_entry(folder) | shared | keys


@asynccontextmanager
async def one(
    folder: Path, files: bool = False, adapters: int = 4, **options: Any
) -> AsyncIterator[tuple[Serving, SglangServer]]:
    """Run an engine with two places in memory, and a sidecar in front of it with the adapters `a00`, `a01`, …"""
    write_adapters(folder / "adapters", adapters)
    async with running_sglang(**DUMMY | options) as engine:
        backends = [entry_of(engine, folder, files)]
        async with serving([], folder / "adapters", [folder], backends=backends) as served:
            yield served, engine


@WAYS
async def test_more_adapters_than_places(tmp_path: Path, files: bool) -> None:
    """Each answers as it did, the names are versions', and no more are registered than there are places for."""
    async with one(tmp_path, files) as (served, engine):
        names = ["", "a00", "a01", "a02", "a03"]
        first = {name: (await served.ask(name)).tokens for name in names}
        assert len({tuple(tokens) for tokens in first.values()}) == len(names)
        for name in (*names, *reversed(names)):
            assert (await served.ask(name)).tokens == first[name]
            assert len(engine.adapters.copies) <= 2
        assert all("@" in name for name in engine.adapters.copies)


@WAYS
async def test_a_name_that_somebody_else_has_taken(tmp_path: Path, files: bool) -> None:
    """With another content it is loaded anew; the other's is not answered by."""
    async with one(tmp_path, files) as (served, engine), SglangClient(engine.http_address) as direct:
        right = (await served.ask("a00")).tokens
        name = next(iter(engine.adapters.copies))
        for other in ("a01", "a02"):  # neither has room beside it
            await served.ask(other)
        assert name not in engine.adapters.copies
        await direct.unload(next(iter(engine.adapters.copies)))
        (await direct.load(name, tmp_path / "adapters" / "a03")).raise_for_status()
        assert (await served.ask("a00")).tokens == right


UNFIT: list[tuple[dict[str, Any], str]] = [
    ({"modules": ("k_proj", "up_proj")}, 'adapts "up_proj" without "gate_proj" in layer 0'),
    ({"modules": ("q_proj",)}, 'adapts "q_proj" without "v_proj" in layer 0'),
    ({"rank": 128}, "rank is 128"),
    ({"shape": Dims(layers=4)}, "layers"),
    ({"shape": Dims(hidden=32)}, "attn_q"),
]


@WAYS
@pytest.mark.parametrize(("bad", "reason"), UNFIT, ids=[reason for _, reason in UNFIT])
async def test_an_adapter_that_would_end_it_is_not_loaded(
    tmp_path: Path, files: bool, bad: dict[str, Any], reason: str
) -> None:
    path = write_adapter(tmp_path / "bad", **bad)
    async with one(tmp_path, files) as (served, engine):
        with pytest.raises(grpc.aio.AioRpcError, match=reason):
            await served.adapters.Register(admin_pb2.RegisterRequest(name="bad", path=str(path)))
        assert not any(name.startswith("bad") for name in engine.adapters.copies)
        assert (await served.ask("a00")).tokens


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tokenizer_workers": 2}, "--tokenizer-worker-num above 1, where each worker knows its own adapters only"),
        ({"dp_size": 2}, "--dp-size above 1, where it loads no adapters"),
    ],
)
async def test_a_server_that_loses_adapters_is_not_used(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    async with (
        running_sglang(**DUMMY | options) as engine,
        serving([], backends=[entry_of(engine, tmp_path)], until_up=False) as served,
    ):
        backend = served.sidecar.gateway.fleet.backends["s0"]
        await until(lambda: reason in backend.detail())
        assert not served.state.backends["s0"].takes_requests


async def test_without_sizes_it_serves_its_base_model_only(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a00")
    async with running_sglang(**DUMMY) as engine:
        entry = entry_of(engine, tmp_path, base_model={"name": "base"})
        async with serving([], None, [tmp_path], backends=[entry]) as served:
            assert (await served.ask("")).tokens
            with pytest.raises(grpc.aio.AioRpcError, match="the base model's files are not named"):
                await served.adapters.Register(admin_pb2.RegisterRequest(name="a00", path=str(path)))
            assert not engine.adapters.copies


def test_files_need_sizes() -> None:
    record = {"url": "sglang://h:1", "adapters_dir": "/a", "base_model": {"name": "base"}}
    with pytest.raises(Misused, match="name the base model's folder, for an adapter of other sizes ends the engine"):
        entries_of(parse({"backends": [record]}, "the test"))


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        ({"rid": "mine"}, "one client could end another's"),
        ({"lora_path": "a01"}, 'name it in "model"'),
        ({"structured_outputs": {"json": {}}}, "SGLang ignores it"),
        ({"input_ids": [5]}, "would end the engine"),
        ({"logprobs": 21}, "20 at most"),
        ({"top_k": 1 << 31}, "2147483647 at most"),
        ({"prompt": [5, 99_999]}, "the token id 99999 is none of the model's"),
        ({"prompt": [[5], [-1, 3]]}, "the token id -1 is none of the model's"),
    ],
)
async def test_members_that_must_not_reach_it(tmp_path: Path, member: dict[str, Any], reason: str) -> None:
    async with one(tmp_path) as (served, _):
        async with httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}") as client:
            reply = await client.post("/v1/completions", json={"model": "a00", "prompt": "x"} | member)
        assert reply.status_code == httpx.codes.BAD_REQUEST
        assert reason in reply.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_has_its_request_aborted(tmp_path: Path, stream: bool) -> None:
    async with one(tmp_path, time_scale=1.0) as (served, engine):
        async with httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}") as client:
            body = {"model": "a00", "prompt": "x", "max_tokens": 500, "stream": stream}
            asking = asyncio.create_task(client.post("/v1/completions", json=body))
            await until(lambda: engine.engine.counters.active == 1)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await until(lambda: engine.engine.counters.active == 0)
        await until(lambda: not served.state.requests)


async def looked(engine: SglangServer, folder: Path, files: bool, **keys: Any) -> dict[str, Finding]:
    """Return all findings by check."""
    (entry,) = entries_of(parse({"backends": [entry_of(engine, folder, files, **keys)]}, "the test"))
    target = Target(
        "s0",
        engine.http_address,
        facts=facts_of([entry])["s0"],
        adapters_dir=entry.shared_dir,
        base=base_model_of(entry),
        **kind_of_dialect(DIALECT).checks().target(entry),
    )
    return {finding.check: finding async for finding in check(target)}


@WAYS
async def test_checks_of_a_server_that_serves(tmp_path: Path, files: bool) -> None:
    async with running_sglang(**DUMMY) as engine:
        found = await looked(engine, tmp_path, files)
        assert worse(found) == {}, found
        assert not engine.adapters.copies, "what was tried is left"


async def test_checks_of_a_server_without_lora(tmp_path: Path) -> None:
    async with running_sglang(**DUMMY, enable_lora=False) as engine:
        found = await looked(engine, tmp_path, False)
        assert worse(found) == {"LoRA updating": State.FAILED, "adapter": State.SKIPPED}
        assert found["LoRA updating"].fix.endswith("--enable-lora --max-lora-rank R --lora-target-modules all")


async def test_checks_of_a_server_that_wants_a_key(tmp_path: Path) -> None:
    async with running_sglang(**DUMMY, api_key="secret") as engine:
        found = await looked(engine, tmp_path, False)
        assert "it wants another API key" in found["reachable"].text
        assert "api_key_file" in found["reachable"].fix


async def test_checks_of_a_server_that_loses_adapters(tmp_path: Path) -> None:
    async with running_sglang(**DUMMY, tokenizer_workers=2) as engine:
        found = await looked(engine, tmp_path, False)
        assert found["reachable"].fix.endswith("(without --tokenizer-worker-num)")
