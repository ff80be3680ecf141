"""The folders that the configuration names for adapters: what is not there, and what is no longer configured."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from sidecar.proto import admin_pb2 as pb
from tests.kit.serving import serving, write_adapters


async def test_a_root_that_is_not_there_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At the start; one that is there is not told."""
    async with serving([], roots=[tmp_path, tmp_path / "none"]):
        pass
    assert [line.partition("; ")[0] for line in caplog.messages if "adapters.roots" in line] == [
        f"adapters.roots: there is no folder {tmp_path / 'none'}"
    ]


async def test_a_name_that_is_no_longer_configured_is_unregistered(tmp_path: Path) -> None:
    """One of a folder that is still served stays refused: it would come back."""
    write_adapters(tmp_path / "one", 1)
    one, data = tmp_path / "one", str(tmp_path / "data")
    async with serving([], one, data_directory=data) as served:
        [name] = served.sidecar.gateway.state.names
        with pytest.raises(grpc.aio.AioRpcError, match="is managed by config and would be set back"):
            await served.adapters.Unregister(pb.UnregisterRequest(name=name))
    async with serving([], data_directory=data) as served:
        await served.adapters.Unregister(pb.UnregisterRequest(name=name))
        assert not served.sidecar.gateway.state.names
