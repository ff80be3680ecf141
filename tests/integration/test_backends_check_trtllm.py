"""What `sidecar backends check` finds at emulated trtllm-serves, each with one thing wrong."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from sidecar.backends.checking import check, names_of
from sidecar.backends.checks.finding import Finding, State, Target
from sidecar.backends.openai.kind import kind_of_dialect
from sidecar.backends.openai.trtllm import DIALECT
from sidecar.backends.registry import entries_of
from sidecar.config import parse
from sidecar.serve.pool import base_model_of, facts_of
from tests.kit.looking import worse
from tests.kit.ports import free_port
from tests.kit.trtllm_emulated import running_trtllm
from tests.kit.trtllm_served import entry_of

DUMMY: dict[str, Any] = {"compute": "none", "max_loras": 2, "max_cpu_loras": 4, "iteration_stats": True}


async def look_at(address: str, folder: Path, **keys: Any) -> dict[str, Finding]:
    """Return all findings by check, for a complete entry with these keys."""
    (folder / "shared").mkdir(exist_ok=True)
    record = {"url": f"trtllm://{address}", "id": "t0", "host_versions_max": 100} | entry_of(folder) | keys
    (entry,) = entries_of(parse({"backends": [record]}, "the test"))
    target = Target(
        "t0",
        address,
        facts=facts_of([entry])["t0"],
        adapters_dir=entry.shared_dir,
        base=base_model_of(entry),
        **kind_of_dialect(DIALECT).checks().target(entry),
    )
    found = [finding async for finding in check(target)]
    assert [finding.check for finding in found] == names_of("trtllm")
    return {finding.check: finding for finding in found}


@pytest.mark.parametrize("era", ["1.2", "main"])
async def test_a_server_that_serves(era: str, tmp_path: Path) -> None:
    async with running_trtllm(**DUMMY, era=era) as (engine, _):
        found = await look_at(engine.http_address, tmp_path)
        assert worse(found) == ({"seats": State.WARNING} if era == "1.2" else {}), found
        assert "changes its answers" in found["adapter"].text
        assert "the server tells none of it: read max_loras" in found["LoRA"].text


async def test_without_statistics_it_is_not_known_whether_it_is_idle(tmp_path: Path) -> None:
    """An adapter more than max_loras would fail all that runs, so none is tried."""
    async with running_trtllm(**DUMMY | {"iteration_stats": False}) as (engine, _):
        found = await look_at(engine.http_address, tmp_path)
        assert worse(found) == {"metrics": State.WARNING, "adapter": State.WARNING}
        assert "enable_iter_perf_stats: true" in found["adapter"].fix
        assert engine.adapters.submitted == {}


async def test_no_adapter_is_tried_at_a_busy_engine(tmp_path: Path) -> None:
    async with running_trtllm(**DUMMY, time_scale=1.0) as (engine, client):
        asking = asyncio.create_task(client.complete(prompt="x", tokens=4000))
        found = await look_at(engine.http_address, tmp_path)
        asking.cancel()
        assert "not tried: requests are running" in found["adapter"].text
        assert engine.adapters.submitted == {}


async def test_lora_is_off(tmp_path: Path) -> None:
    async with running_trtllm(**DUMMY | {"lora_modules": ()}) as (engine, _):
        found = await look_at(engine.http_address, tmp_path)
        assert worse(found) == {"adapter": State.FAILED}
        assert "LoRA is switched off" in found["adapter"].text
        assert "lora_config" in found["adapter"].fix


async def test_a_module_is_declared_that_it_leaves_out(tmp_path: Path) -> None:
    async with running_trtllm(**DUMMY | {"lora_modules": ("attn_q", "attn_k", "attn_v")}) as (engine, _):
        found = await look_at(engine.http_address, tmp_path)
        assert worse(found) == {"adapter": State.FAILED}
        assert "refuses an adapter of mlp_4h_to_h, which this entry declares" in found["adapter"].text


async def test_what_memory_needs_is_told(tmp_path: Path) -> None:
    async with running_trtllm(**DUMMY) as (engine, _):
        few = entry_of(tmp_path, max_loras=2, max_cpu_loras=3)
        found = await look_at(engine.http_address, tmp_path, **few)
        assert "max_cpu_loras: 4" in found["kept in memory"].fix
        found = await look_at(engine.http_address, tmp_path, host_versions_max=None)
        assert "no limit is set" in found["kept in memory"].text


async def test_nothing_listens(tmp_path: Path) -> None:
    found = await look_at(f"127.0.0.1:{free_port()}", tmp_path)
    assert found["reachable"].state is State.FAILED
    assert "nothing listens" in found["reachable"].text
    assert "trtllm-serve MODEL --host 0.0.0.0" in found["reachable"].fix
