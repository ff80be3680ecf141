"""Usage while the disk under the data directory is full, or its file is damaged under way: requests go on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from sidecar.access.usage.keeper import USAGE_FILE
from sidecar.proto import admin_pb2 as pb
from sidecar.proto import admin_pb2_grpc
from tests.attack.test_full_disk import DUMMY, disk, fill
from tests.kit.emulated import running_engine
from tests.kit.serving import Serving, serving, write_adapters

__all__ = ["disk"]
LOGGER = "sidecar.access.usage.keeper"


async def usage_of(served: Serving) -> Any:
    return await admin_pb2_grpc.AccessStub(served.admin_channel).GetUsage(pb.UsageRequest(by=["adapter"]))


def answered(usage: Any) -> int:
    return sum(int(row.requests["ok"]) for row in usage.rows if "ok" in row.requests)


async def test_a_full_disk_stops_no_request_and_loses_nothing(
    disk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once in the log and counted; with room again everything is written."""
    (name,) = write_adapters(tmp_path / "loras", 1)
    data = disk / "data"
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path / "loras", data_directory=str(data), journal={"enabled": False}) as served,
    ):
        await served.ask(name, 3)
        assert answered(await usage_of(served)) == 1
        filler = fill(disk)
        with caplog.at_level(logging.ERROR, LOGGER):
            for number in range(40):
                assert (await served.ask(name, 3, tenant=f"t{number}" * 40)).tokens == served.expected(name, 3)
            await served.sidecar.usage.write()
            for _ in range(3):
                seen = await usage_of(served)
        assert answered(seen) == 1
        assert len(seen.incomplete) == 1
        assert "failed" in seen.note
        assert str(data / USAGE_FILE) in seen.note
        said = [record.getMessage() for record in caplog.records if record.name == LOGGER]
        assert len(said) == 1
        assert str(data / USAGE_FILE) in said[0]
        _, text = await served.sidecar.metrics.render()
        assert b"lora_sidecar_usage_errors_total 4.0" in text
        filler.unlink()
        usage = await usage_of(served)
        assert answered(usage) == 41
        assert list(usage.incomplete) == []


async def test_a_file_that_is_damaged_under_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its pages are overwritten while it is open: requests are answered, and the process ends in peace."""
    (name,) = write_adapters(tmp_path / "loras", 1)
    async with running_engine(**DUMMY) as engine:
        with caplog.at_level(logging.ERROR, LOGGER):
            async with serving([engine], tmp_path / "loras", data_directory=str(tmp_path / "data")) as served:
                await served.ask(name, 3)
                await served.sidecar.usage.write()
                for file in (tmp_path / "data" / USAGE_FILE).parent.glob("usage.sqlite*"):
                    file.write_bytes(b"\xa5" * file.stat().st_size)
                for _ in range(3):
                    assert (await served.ask(name, 3)).tokens == served.expected(name, 3)
                    await served.sidecar.usage.write()
