"""A client that would list, read, take or unregister another's shared memory."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

from sidecar.access.access import Access
from sidecar.adapters.shared_memory import PREFIX
from sidecar.errors import Refused
from sidecar.fronts.kserve.owners import Caller, RegionOwners
from tests.integration.test_kserve_verbs import PROMPT, inputs_in, region_of, regions_at
from tests.kit.emulated import running_engine
from tests.kit.kserve_clients import DUMMY, aio_client, ask
from tests.kit.serving import Serving, serving, write_adapters

OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]
BLUE, RED = {"lora-tenant": "blue"}, {"lora-tenant": "red"}


@asynccontextmanager
async def two_clients(
    folder: Path,
) -> AsyncIterator[tuple[Serving, Any, triton_aio.InferenceServerClient, triton_aio.InferenceServerClient]]:
    write_adapters(folder, 1)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], folder) as served,
        aio_client(served.sidecar.data_address, channel_args=OWN_CONNECTION) as one,
        aio_client(served.sidecar.data_address, channel_args=OWN_CONNECTION) as other,
    ):
        yield served, engine, one, other


async def test_another_tenant_neither_sees_nor_uses_nor_unregisters_a_region(tmp_path: Path) -> None:
    """To it, it is as if there were none, but that the name is taken; its owner goes on with it."""
    async with two_clients(tmp_path) as (_, engine, one, other):
        with region_of(PROMPT) as memory, region_of(PROMPT) as others:
            await one.register_system_shared_memory("prompt", memory.name, PROMPT.nbytes, headers=BLUE)
            assert not (await other.get_system_shared_memory_status(headers=RED)).regions
            with pytest.raises(InferenceServerException, match="Unable to find system shared memory region"):
                await other.get_system_shared_memory_status("prompt", headers=RED)
            with pytest.raises(InferenceServerException, match="already in manager"):
                await other.register_system_shared_memory("prompt", others.name, PROMPT.nbytes, headers=RED)
            told = await ask(other, name="a00", inputs=inputs_in("prompt"), headers=RED)
            assert "Unable to find shared memory region: 'prompt'" in told.errors[0]
            await other.unregister_system_shared_memory("prompt", headers=RED)
            await other.unregister_system_shared_memory(headers=RED)
            assert "prompt" in await regions_at(engine.grpc_address)
            told = await ask(one, name="a00", inputs=inputs_in("prompt"), headers=BLUE)
            assert told.errors == []
            assert list((await one.get_system_shared_memory_status("prompt", headers=BLUE)).regions) == ["prompt"]
            await one.unregister_system_shared_memory("prompt", headers=BLUE)
            assert "prompt" not in await regions_at(engine.grpc_address)
            await other.register_system_shared_memory("prompt", others.name, PROMPT.nbytes, headers=RED)


async def test_a_program_that_clears_all_regions_clears_its_own(tmp_path: Path) -> None:
    """Many do before they begin. Without tenants another one's are still there, and known to who knows the name."""
    async with two_clients(tmp_path) as (_, engine, one, other):
        with region_of(PROMPT) as memory, region_of(PROMPT) as others:
            await one.register_system_shared_memory("prompt", memory.name, PROMPT.nbytes)
            await other.register_system_shared_memory("others", others.name, PROMPT.nbytes)
            assert list((await other.get_system_shared_memory_status()).regions) == ["others"]
            await other.unregister_system_shared_memory()
            assert "prompt" in await regions_at(engine.grpc_address)
            assert "others" not in await regions_at(engine.grpc_address)
            assert (await ask(other, name="a00", inputs=inputs_in("prompt"))).errors == []


async def test_a_region_that_was_not_to_be_had_is_nobodys(tmp_path: Path) -> None:
    """A failed registration takes no name from anybody."""
    async with two_clients(tmp_path) as (_, _, one, other):
        with pytest.raises(InferenceServerException, match="Unable to open shared memory region"):
            await one.register_system_shared_memory("prompt", "nowhere", PROMPT.nbytes, headers=BLUE)
        with region_of(PROMPT) as memory:
            await other.register_system_shared_memory("prompt", memory.name, PROMPT.nbytes, headers=RED)


def test_a_clients_regions_are_bounded() -> None:
    """Another client's are not counted with them, and what is unregistered makes room."""
    owners, blue, red = (
        RegionOwners(Access.off(lambda name: None), 2),
        Caller("blue", "ipv4:127.0.0.1:1"),
        Caller("red", "ipv4:127.0.0.1:2"),
    )
    for name in "ab":
        owners.register(name, blue)
    with pytest.raises(Refused, match="2 regions"):
        owners.register("c", blue)
    owners.register("c", red)
    owners.forget("a")
    owners.register("d", Caller("blue", "ipv4:127.0.0.1:3"))
    with pytest.raises(Refused, match="2 regions"):
        owners.register("e", blue)


@pytest.mark.parametrize("key", ["/{}", "//{}", "./{}", "/./{}", "/../shm/{}", ".", "/.."])
async def test_the_stores_own_memory_by_another_path(tmp_path: Path, key: str) -> None:
    """An engine opens a key as a file's path, so the store's has as many names as one writes."""
    store = SharedMemory(f"{PREFIX}{secrets.token_hex(6)}", create=True, size=PROMPT.nbytes)
    try:
        async with two_clients(tmp_path) as (_, engine, one, _):
            with pytest.raises(InferenceServerException, match=r"the region('s key)? is"):
                await one.register_system_shared_memory("mine", key.format(store.name), PROMPT.nbytes)
            assert "mine" not in await regions_at(engine.grpc_address)
    finally:
        store.close()
        store.unlink()
