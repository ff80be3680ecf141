"""Odd bytes before a real Triton: what it makes of them itself, and that none of it gets past the sidecar."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc.aio
import pytest

from tests.attack.test_chosen_adapter import ATTACKS, CONTENTS, CORE, INPUTS, WHOLE, streamed, with_id
from tests.e2e.triton.loads import repeated_if_triton_aborts, servers
from tests.e2e.triton.server import TritonServer
from tests.fuzz.wire.house import House, house, tapped
from tests.fuzz.wire.oracle import ids_named
from tests.fuzz.wire.run import send
from tests.kit.emulated import add_lora, channel_to, core_request, random_adapter
from tests.kit.protobuf_wire import RAW, field, tensor, uint64

MESSAGES = 20_000
OURS, THEIRS = 5, 6
FRAGMENT = tensor("lora_task_id", "UINT64", 1, 1) + field(RAW, uint64(OURS))
"""What a proxy appends that believes in its clients."""


@asynccontextmanager
async def real_house(folder: Path, sent: list[bytes]) -> AsyncIterator[tuple[TritonServer, House]]:
    async with servers(folder, decoupled=False, texts=True) as (server,):
        with server.served_path.open() as log:

            def ended() -> list[Any]:
                return [SimpleNamespace(**json.loads(line)) for line in log]

            async with house(folder / "house", server, ended, sent, {}) as made:
                yield server, made


@pytest.mark.nightly
@repeated_if_triton_aborts
async def test_what_triton_makes_of_odd_bytes(tmp_path: Path) -> None:
    """And the fuzzer's oracle reads them as it does: contents in order, whatever comes after, names up to a NUL."""
    taken = {
        "one raw content more": CORE + INPUTS + CONTENTS + with_id(THEIRS) + FRAGMENT,
        "a name after a NUL": CORE + INPUTS + tensor("lora_task_id\0x", "UINT64", 1, 1) + CONTENTS + with_id(THEIRS),
        "nothing": CORE + INPUTS + CONTENTS + FRAGMENT,
    }
    async with servers(tmp_path, decoupled=False) as (server,), channel_to(server.grpc_address) as stub:
        for task_id in (OURS, THEIRS):
            await stub.ModelInfer(add_lora(core_request(), task_id, random_adapter(task_id)))
        for message in taken.values():
            (answer,) = await _streamed_to(server, message)
            assert not answer.error_message
        ids = [one["task_id"] for one in server.served[-3:]]
        assert ids == [THEIRS, THEIRS, OURS]
        assert [ids_named(message) for message in taken.values()] == [{one} for one in ids]


async def _streamed_to(server: TritonServer, message: bytes) -> list[Any]:
    async with grpc.aio.insecure_channel(server.grpc_address) as channel:
        return await streamed(channel, message)


@repeated_if_triton_aborts
async def test_bytes_that_choose_an_adapter_reach_no_triton(tmp_path: Path) -> None:
    """Those that were found, each refused; the same request without a trick is answered by what it names."""
    with tapped() as sent:
        async with real_house(tmp_path, sent) as (server, made):
            chef = made.ids["chef"]
            assert chef is not None
            before = len(server.served)
            for attack in ATTACKS.values():
                told = await made.stream(attack(chef), wired=True)
                assert told.error == "INVALID_REQUEST"
            assert len(server.served) == before
            told = await made.stream(WHOLE, wired=True)
            assert (told.version, made.lies(told)) == ("sql@v1", [])


@pytest.mark.nightly
@repeated_if_triton_aborts
async def test_no_message_is_answered_under_another_adapter(tmp_path: Path) -> None:
    """`make fuzz-wire`'s messages, 20,000 of them."""
    with tapped() as sent:
        async with real_house(tmp_path, sent) as (_, made):
            found = await send(range(MESSAGES), 8, {"triton": made})
    assert (found.lies, found.crashes) == ([], [])
    assert found.outcomes["stream: answered"] > MESSAGES / 100
