"""Declared adapters that an operator overrides for a while, and those that are loaded ahead."""

from __future__ import annotations

import os
import re
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest

from sidecar.proto import admin_pb2 as pb
from tests.kit.forked import python
from tests.kit.kubernetes_cluster import on_clusters
from tests.kit.kubernetes_house import LORAS, condition, house
from tests.kit.serving import Serving


@on_clusters
async def test_rolled_back_by_hand_with_a_hold(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused without one; with it the version before stays for so long and is shown as Held, then it is as declared.

    What is declared meanwhile waits for that, too.
    """
    async with house(kind, tmp_path, monkeypatch) as here:
        for seed in (1, 2):
            path = here.write(f"v{seed}", seed)
            if seed == 1:
                await here.home.declare("sql", path)
            else:
                await here.home.patch(LORAS, "sql", {"spec": {"source": str(path)}})
            await here.reaches("sql", "Ready", version=f"v{seed}")
        adapters = here.served.adapters
        for call in (
            adapters.Rollback(pb.RollbackRequest(name="sql")),
            adapters.Promote(pb.PromoteRequest(name="sql", version="v1")),
            adapters.Register(pb.RegisterRequest(name="sql", path=str(here.folder / "v1"))),
        ):
            assert "--hold" in await here.refused(call)
        assert "delete it there" in await here.refused(adapters.Unregister(pb.UnregisterRequest(name="sql", hold_s=60)))
        assert "set pinned there" in await here.refused(adapters.Pin(pb.AdapterRequest(name="sql")))
        held = await adapters.Rollback(pb.RollbackRequest(name="sql", hold_s=3600))
        assert (held.version, held.managed_by) == ("sql@v1", f"k8s:{here.home.namespace}/LoraAdapter/sql")
        status = await here.reaches("sql", "Held", version="v1")
        assert condition(status, "Held")["status"] == "True"
        assert await here.answers("sql") == status["digest"]
        _, text = await here.served.sidecar.metrics.render()
        assert b"lora_sidecar_declared_held 1.0" in text
        assert b'lora_sidecar_declared_adapters{phase="Held"} 1.0' in text
        here.write("v3", 3)
        await here.home.patch(LORAS, "sql", {"spec": {"source": str(here.folder / "v3")}})
        await here.reaches("sql", "Held", observedGeneration=3, version="v1")
        await adapters.Promote(pb.PromoteRequest(name="sql", version="v1", hold_s=1))
        status = await here.reaches("sql", "Ready", version="v3")
        assert await here.answers("sql") == status["digest"]
        assert condition(status, "Held")["status"] == "False"
        await here.home.tells("Registered", "Registered", "Held", "Registered")


@on_clusters
async def test_a_hold_that_ends_needs_no_source(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The declared version is still there: it is promoted again though its files have gone."""
    async with house(kind, tmp_path, monkeypatch) as here:
        await here.home.declare("sql", here.write("v1", 1))
        await here.reaches("sql", "Ready")
        other = here.write("by-hand", 2)
        await here.answers("sql")
        (here.folder / "v1" / "adapter_model.safetensors").unlink()
        request = pb.RegisterRequest(name="sql", path=str(other), hold_s=2)
        assert (await here.served.adapters.Register(request)).version == "v2"
        await here.reaches("sql", "Held", version="v2")
        status = await here.reaches("sql", "Ready", version="v1")
        assert await here.answers("sql") == status["digest"]


@on_clusters
async def test_it_is_loaded_ahead_where_it_is_wanted(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `prefetch` it is Ready only when it is resident, and nobody had to ask for it."""
    async with house(kind, tmp_path, monkeypatch) as here:
        await here.home.declare("sql", here.write("sql", 1), prefetch={"backends": ["trt-*"]})
        status = await here.reaches("sql", "Ready")
        assert status["residentOn"] == ["trt-0"]
        answer = await here.served.ask("sql", 1)
        assert answer.origins[0].cache == "resident"


async def command(served: Serving, *arguments: str) -> tuple[int, str, str]:
    """Run `sidecar adapters …` against the served sidecar."""
    process = await python(
        "-m", "sidecar", "adapters", *arguments, stdout=PIPE, stderr=PIPE,
        env=os.environ | {"LORA_SIDECAR_ADMIN": served.sidecar.admin_address},
    )  # fmt: skip
    out, error = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), error.decode()


@on_clusters
async def test_the_command_line_says_who_has_the_say(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who manages a name, that it is held and for how long; a hold without a time is an hour."""
    async with house(kind, tmp_path, monkeypatch) as here:
        await here.home.declare("sql", here.write("v1", 1))
        await here.reaches("sql", "Ready")
        await here.home.patch(LORAS, "sql", {"spec": {"source": str(here.write("v2", 2))}})
        await here.reaches("sql", "Ready", version="v2")
        code, _, error = await command(here.served, "rollback", "sql")
        assert code == 1
        assert "managed by the LoraAdapter sql in Kubernetes' namespace" in error
        assert "--hold" in error
        code, out, _ = await command(here.served, "rollback", "sql", "--hold")
        assert (code, out) == (0, "sql stands for v1\n")
        code, out, _ = await command(here.served, "show", "sql")
        assert "the LoraAdapter sql in Kubernetes' namespace" in out
        assert re.search(r"held for (59|60) min", out)
        code, out, _ = await command(here.served, "list")
        assert "held for" in out
