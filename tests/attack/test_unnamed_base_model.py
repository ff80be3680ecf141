"""An adapter whose config names no base model: what PEFT saves for a model that was made in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc
import pytest

from sidecar.proto import admin_pb2 as pb
from tests.integration.test_base_models import DUMMY, base_model, refusal, register
from tests.kit.cli_runs import runner
from tests.kit.emulated import running_engine
from tests.kit.peft_files import write_adapter
from tests.kit.serving import serving

PEFTS_OWN = Path(__file__).parents[1] / "golden" / "peft" / "adapters" / "llama-unnamed"
"""As the real PEFT library wrote it (`make goldens`)."""


def test_peft_itself_writes_no_name() -> None:
    """The file is what these tests are about."""
    assert json.loads((PEFTS_OWN / "adapter_config.json").read_text())["base_model_name_or_path"] is None


def test_it_is_converted_and_inspected(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Rows do not depend on the base model's name."""
    sidecar = runner(capfd)
    ended = sidecar("adapters", "convert", str(PEFTS_OWN), "--out", str(tmp_path), "--json")
    assert ended.code == 0, ended
    assert ended.json()["shape"][1] == 2
    ended = sidecar("adapters", "inspect", str(PEFTS_OWN))
    assert ended.code == 0, ended
    assert "not named" in ended.out


@pytest.mark.parametrize("named", [None, "", ...], ids=["null", "empty", "absent"])
async def test_it_is_registered_where_the_operator_names_the_base(named: Any, tmp_path: Path) -> None:
    """Without a name it is refused with both ways out and leaves nothing; with --base it is served."""
    path = write_adapter(tmp_path / "sql", base_model_name_or_path=named)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], roots=[tmp_path], backend=base_model(tmp_path / "model")) as served,
    ):
        words = await refusal(served, path)
        assert "names no base model" in words
        assert "--base" in words
        assert "base_model_name_or_path" in words
        assert "save_pretrained" not in words
        assert not served.state.names
        assert (await register(served, path, base="org/tiny")).adapter.base_model == "org/tiny"
        assert (await served.ask("sql", 3)).tokens == served.expected("sql", 3)


async def test_pefts_own_is_taken_under_the_operators_name(tmp_path: Path) -> None:
    """No backend says what it serves: even so a name is asked for, since nobody could tell later what it was."""
    async with running_engine(**DUMMY) as engine, serving([engine], roots=[PEFTS_OWN.parent]) as served:
        assert "names no base model" in await refusal(served, PEFTS_OWN)
        with pytest.raises(grpc.aio.AioRpcError, match="is no base model's name"):
            await served.adapters.Register(pb.RegisterRequest(name="sql", path=str(PEFTS_OWN), base=" \n"))
        assert (await register(served, PEFTS_OWN, base="org/tiny")).adapter.base_model == "org/tiny"
