"""The short form of `make fuzz-wire`: some thousand messages of one seed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.wire.oracle import ids_named
from tests.fuzz.wire.run import WAYS, run
from tests.kit.protobuf_wire import (
    BYTES_CONTENTS,
    CONTENTS,
    RAW,
    UINT64_CONTENTS,
    field,
    parameter,
    tensor,
    uint64,
    varint,
)

MESSAGES = 2000
TASK_ID = tensor("lora_task_id", "UINT64", 1, 1)
OTHER = tensor("end_id", "INT32", 1, 1)


async def test_no_message_is_answered_under_another_adapter(tmp_path: Path) -> None:
    """By every way in some are answered and some refused, none crashes, and good ones get what they name."""
    found = await run(range(MESSAGES), 1, tmp_path)
    assert (found.lies, found.crashes) == ([], [])
    assert found.outcomes.total() == MESSAGES
    for way in WAYS:
        answered = found.outcomes[f"{way}: answered"]
        assert 0 < answered < sum(count for what, count in found.outcomes.items() if what.startswith(way))


@pytest.mark.parametrize(
    ("raw", "ids"),
    [
        (OTHER + TASK_ID + field(RAW, b"four") + field(RAW, uint64(5)), {5}),
        (TASK_ID + OTHER + field(RAW, b"four") + field(RAW, uint64(5)), {None}),
        (field(RAW, uint64(9)) + field(RAW, uint64(5)) + OTHER + TASK_ID, {5}),
        (tensor("lora_task_id\0x", "UINT64", 1, 1) + field(RAW, uint64(5)), {5}),
        (tensor("lora_id", "UINT64", 1, more=field(CONTENTS, field(UINT64_CONTENTS, varint(5)))), {5}),
        (tensor("lora_id", "UINT64", 1, more=field(CONTENTS, field(BYTES_CONTENTS, varint(5)))), set()),
        (tensor("x", "INT32", 1, more=parameter("shared_memory_region", "r")) + TASK_ID + field(RAW, uint64(5)), {5}),
        (OTHER + field(RAW, uint64(5)), set()),
    ],
)
def test_the_oracle_reads_as_a_server_does(raw: bytes, ids: set[int | None]) -> None:
    """Contents in order, past what is typed or in a region; names up to a NUL."""
    assert ids_named(raw) == ids
