"""What `sidecar backends check` finds at engines that read adapters from files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sidecar.adapters.staging import AdaptersDir
from sidecar.backends.checking import check, names_of
from sidecar.backends.checks.finding import Finding, State, Target
from tests.kit.looking import TINY_BASE, engine_and_target, worse


async def look_at_files(target: Target) -> dict[str, Finding]:
    """Return the findings at an engine that reads adapters from files: those of the other kind are not among them."""
    found = [finding async for finding in check(target)]
    assert [finding.check for finding in found] == names_of("triton_llmapi")
    return {finding.check: finding for finding in found}


@pytest.mark.parametrize("decoupled", [True, False])
async def test_an_engine_that_reads_files(tmp_path: Path, decoupled: bool) -> None:
    """A tiny PEFT adapter is staged, loaded by the engine from its own disk, and taken away again."""
    shared = tmp_path / "shared"
    shared.mkdir()
    async with engine_and_target(tmp_path, protocol="llmapi", decoupled=decoupled) as (_, target):
        here = replace(target, base=TINY_BASE, adapters_dir=AdaptersDir(shared, str(shared)))
        found = await look_at_files(here)
        expected = {"metrics": State.WARNING}  # this kind publishes none
        assert worse(found) == expected | ({} if decoupled else {"decoupled": State.WARNING})
        assert "staged, loaded by the engine" in found["adapter"].text
        assert list(shared.iterdir()) == []


async def test_a_folder_that_the_engine_does_not_see(tmp_path: Path) -> None:
    """No folder, one that cannot be here, and one that is another on the engine's side: each with the way out.

    One whose parent is here is made, as by a sidecar that serves.
    """
    shared = tmp_path / "shared"
    async with engine_and_target(tmp_path, protocol="llmapi") as (_, target):
        none = await look_at_files(replace(target, base=TINY_BASE))
        assert none["shared folder"].state is State.FAILED
        assert "adapters_dir: {ours:" in none["shared folder"].fix
        assert none["adapter"].text == 'not looked at, because of "shared folder"'
        below = shared / "nothing"
        missing = await look_at_files(replace(target, base=TINY_BASE, adapters_dir=AdaptersDir(below, str(below))))
        assert f"there is no folder {below} here" in missing["shared folder"].text
        assert not shared.exists()
        made = await look_at_files(replace(target, base=TINY_BASE, adapters_dir=AdaptersDir(shared, str(shared))))
        assert made["shared folder"].state is State.OK
        assert made["shared folder"].text == f"{shared}, made just now, as serve would"
        assert "staged, loaded by the engine" in made["adapter"].text
        elsewhere = replace(target, base=TINY_BASE, adapters_dir=AdaptersDir(shared, "/not/mounted"))
        found = await look_at_files(elsewhere)
        assert found["adapter"].state is State.FAILED
        assert "the engine does not see what is staged" in found["adapter"].text
        unknown = await look_at_files(replace(elsewhere, base=None))
        assert unknown["engine"].state is State.WARNING
        assert unknown["adapter"].state is State.SKIPPED
        assert "base_model: {name:" in unknown["adapter"].fix
