"""A vLLM that was started otherwise than declared: what it says itself holds, and the smaller number is used."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from sidecar.core.effects import Dispatch
from sidecar.proto import admin_pb2
from tests.integration.test_vllm import DUMMY, answer_of, fronted, staged
from tests.kit.serving import Serving, until, write_adapters
from tests.kit.vllm_emulated import expected, running_vllm

DECLARED = {"device_pages": 4, "host_pages": 8, "seats": 32, "rank_max": 64}


def warned(caplog: pytest.LogCaptureFixture, part: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if part in record.getMessage()]


async def reached_again(served: Serving) -> None:
    """Have the engine looked at anew, as after a break of its connection."""
    backend: Any = served.sidecar.gateway.backends["vllm-0"]
    backend._lose("the test says so")
    await until(lambda: not served.state.backends["vllm-0"].takes_requests)
    await until(lambda: served.state.backends["vllm-0"].takes_requests)


async def detail_of(served: Serving, backend: str = "vllm-0") -> str:
    return str((await served.backends.Get(admin_pb2.BackendRequest(backend=backend))).detail)


async def test_fewer_slots_than_declared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Requests of more adapters than it runs would wait inside it, where nothing bounds their wait. It is said once."""
    names = write_adapters(tmp_path / "adapters", 3)
    caplog.set_level(logging.INFO)
    async with (
        running_vllm(**DUMMY, max_loras=2, max_cpu_loras=4) as (engine, _),
        fronted([engine], tmp_path, backend={"engine": DECLARED}) as served,
    ):
        assert served.state.backends["vllm-0"].facts.device_pages == 2
        for name in names:
            assert (await served.ask(name)).tokens == answer_of(served, tmp_path, name)
        await reached_again(served)
        assert served.state.backends["vllm-0"].facts.device_pages == 2
        assert warned(caplog, "declared") == [
            "vllm-0: engine.device_pages is declared as 4 and it was started with max_loras 2: "
            "the smaller number is used"
        ]


async def test_more_slots_than_declared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Someone may want fewer than there are."""
    write_adapters(tmp_path / "adapters", 1)
    async with (
        running_vllm(**DUMMY, max_loras=8, max_cpu_loras=16, dev_mode=True) as (engine, _),
        fronted([engine], tmp_path, backend={"engine": DECLARED | {"rank_max": 8}}) as served,
    ):
        facts = served.state.backends["vllm-0"].facts
        assert (facts.device_pages, facts.host_pages, facts.rank_max) == (4, 8, 8)
        assert warned(caplog, "declared") == []


async def test_what_a_server_in_development_mode_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It tells what it was started with, the largest rank too: then adapters of a larger one are never sent there."""
    write_adapters(tmp_path / "adapters", 1, rank=16)
    async with (
        running_vllm(**DUMMY, max_loras=2, max_cpu_loras=4, max_lora_rank=8, dev_mode=True) as (engine, _),
        fronted([engine], tmp_path, backend={"engine": DECLARED}) as served,
    ):
        facts = served.state.backends["vllm-0"].facts
        assert (facts.device_pages, facts.host_pages, facts.rank_max) == (2, 4, 8)
        assert len(warned(caplog, "the smaller number is used")) == 3
        with pytest.raises(grpc.aio.AioRpcError, match="its rank is 16 and the engine takes at most 8"):
            await served.ask("a00")


@pytest.mark.parametrize("options", [{"enable_lora": False}, {"runtime_lora": False}], ids=["no LoRA", "no route"])
@pytest.mark.parametrize("rust", [False, True], ids=["python", "rust"])
async def test_an_engine_that_takes_no_adapters(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any], rust: bool
) -> None:
    """Requests with an adapter go to the other engine, those for the base model to both; people see why."""
    names = write_adapters(tmp_path / "adapters", 3)
    (tmp_path / "shared").mkdir()
    more = {"rust_frontend": True, "allowed_prefix": (str(tmp_path / "shared"),)} if rust else {}
    async with (
        running_vllm(**DUMMY, **more, **options) as (lacking, _),
        running_vllm(**DUMMY, max_loras=2, max_cpu_loras=4) as (able, _),
        fronted([lacking, able], tmp_path) as served,
    ):
        assert served.state.backends["vllm-0"].facts.base_only
        for name in names * 2:
            assert (await served.ask(name)).tokens == answer_of(served, tmp_path, name)
        sent = [effect for effect in served.recorder.effects if isinstance(effect, Dispatch)]
        assert {effect.backend for effect in sent} == {"vllm-1"}
        assert (await served.ask("")).tokens == expected("", None, 4)
        assert "takes no adapters" in await detail_of(served)
        assert "takes no adapters" not in await detail_of(served, "vllm-1")
        await reached_again(served)
        assert len(warned(caplog, "takes no adapters")) == 1


async def test_alone_it_says_what_to_start(tmp_path: Path) -> None:
    write_adapters(tmp_path / "adapters", 1)
    async with (
        running_vllm(**DUMMY, enable_lora=False) as (engine, _),
        fronted([engine], tmp_path) as served,
    ):
        assert (await served.ask("")).tokens == expected("", None, 4)
        with pytest.raises(grpc.aio.AioRpcError, match="--enable-lora"):
            await served.ask("a00")
        assert staged(tmp_path) == set()
