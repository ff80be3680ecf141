"""The checks of a vLLM that are judged without one: what it was started with, its versions, what is declared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sidecar.adapters.peft import read_adapter
from sidecar.adapters.staging import AdaptersDir
from sidecar.backends.checking import names_of
from sidecar.backends.checks.finding import State
from sidecar.backends.checks.staged import PREFIX, staged
from sidecar.backends.kind import CheckStep
from sidecar.backends.openai.checks.declared import judged_memory, judged_rank, judged_slots, undeclared
from sidecar.backends.openai.checks.look import TEXT_MAX, Answered
from sidecar.backends.openai.checks.rows import CARRYING, REGISTERING
from sidecar.backends.openai.vllm import DIALECT
from sidecar.backends.triton.checks.rows import STEPS
from sidecar.core.facts import Adapter, EngineFacts, Row
from tests.kit.looking import TINY_BASE


def adapters(*ranks: int) -> tuple[Adapter, ...]:
    """Return adapters of these ranks."""
    return tuple(
        Adapter(f"{number:064x}", "llama", (Row("attn_q", 1, 0, rank, 64, 64),), "BF16")
        for number, rank in enumerate(ranks)
    )


def inside(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.mark.parametrize(
    ("declared", "found", "state", "fix"),
    [
        (None, None, State.WARNING, "device_pages: the engine's --max-loras"),
        (None, 4, State.WARNING, "device_pages: 4"),
        (4, None, State.OK, ""),
        (4, 4, State.OK, ""),
        (8, 4, State.FAILED, "vllm serve --max-loras 8"),
        (2, 4, State.WARNING, "device_pages: 4"),
    ],
)
def test_slots(declared: int | None, found: int | None, state: State, fix: str) -> None:
    """What is declared of max_loras against what is published, which nothing is before the first request."""
    finding = judged_slots(DIALECT, declared, found)
    assert finding.state is state
    assert fix in finding.fix


@pytest.mark.parametrize(
    ("declared", "slots", "served", "state", "words"),
    [
        (None, None, 0, State.OK, "taken for max_loras, as vLLM does"),
        (None, 2, 0, State.OK, "taken for max_loras, 2"),
        (None, 2, 3, State.WARNING, "3 adapters are served"),
        (4, 2, 4, State.OK, "4 adapters are served"),
        (4, 2, 5, State.WARNING, "5 adapters are served"),
        (1, 2, 0, State.FAILED, "vLLM does not start with fewer"),
    ],
)
def test_adapters_in_memory(declared: int | None, slots: int | None, served: int, state: State, words: str) -> None:
    """What does not fit is read again when it is asked for; fewer than max_loras cannot be."""
    finding = judged_memory(DIALECT, declared, slots, adapters(*[8] * served))
    assert finding.state is state
    assert words in finding.text


@pytest.mark.parametrize(
    ("declared", "ranks", "state", "words"),
    [
        (None, (), State.WARNING, "neither declared nor published"),
        (None, (8, 32), State.WARNING, "the served adapters' is 32"),
        (16, (8, 16), State.OK, "16 declared"),
        (16, (8, 33, 40), State.FAILED, "2 of the 3 served adapters have more, up to 40"),
        (24, (8,), State.WARNING, "one of 1, 8, 16"),
    ],
)
def test_ranks(declared: int | None, ranks: tuple[int, ...], state: State, words: str) -> None:
    """vLLM knows certain ranks only; the smallest that is enough is proposed."""
    finding = judged_rank(DIALECT, declared, adapters(*ranks))
    assert finding.state is state
    assert words in finding.text
    assert ("rank_max: 64" in finding.fix) is (state is State.FAILED)


def test_what_a_configuration_leaves_out() -> None:
    """Each key once, with what follows; nothing where all is said."""
    keys = ("adapters_dir", "device_pages", "host_pages", "seats", "rank_max")
    notes = list(undeclared(DIALECT, EngineFacts(kind="vllm", reads_files=True), has_folder=False))
    assert [[key for key in keys if f"{key}:" in note] for note in notes] == [[key] for key in keys]
    assert all("backends[]." in note for note in notes)
    declared = EngineFacts(kind="vllm", reads_files=True, device_pages=2, host_pages=4, seats=64, rank_max=16)
    assert list(undeclared(DIALECT, declared, has_folder=True)) == []


def test_an_errors_words_are_one_line() -> None:
    assert Answered(500, "a\n  b", 0.1).line == "a b"
    assert Answered(502, "", 0.1).line == "status 502"
    assert len(Answered(500, "x" * 1000, 0.1).line) == TEXT_MAX + 1


@pytest.mark.parametrize("steps", [REGISTERING, CARRYING], ids=["registering", "carrying"])
def test_each_kind_has_its_checks(steps: tuple[CheckStep, ...]) -> None:
    """No check needs one that comes later, and each has a bound and a name of its own."""
    before: set[str] = set()
    for step in steps:
        assert set(step.needs) <= before, step.name
        assert step.name not in before
        assert step.limit_s > 0
        before.add(step.name)
    assert names_of("vllm") == [step.name for step in REGISTERING]
    assert "shared folder" not in names_of("triton")
    assert len(names_of("triton")) < len(STEPS)


async def test_a_staged_adapter_goes_with_its_folder(tmp_path: Path) -> None:
    """It is one that is served like any other, in a folder of its own; whatever else is there is not touched."""
    stray = tmp_path / f"{'0' * 64}.files.p1.g0"
    stray.mkdir()
    async with staged(AdaptersDir(tmp_path, "/engine"), TINY_BASE, rank=1) as tiny:
        folder = tiny.shared_dir.ours / tiny.key
        assert tiny.shared_dir.engine_path(tiny.key) == f"/engine/{tiny.shared_dir.ours.name}/{tiny.key}"
        assert tiny.shared_dir.ours.name.startswith(PREFIX)
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == 1
        with read_adapter(folder, base=TINY_BASE) as source:
            assert source.digest == tiny.digest
        assert folder.stat().st_mode & 0o777 == tiny.shared_dir.ours.stat().st_mode & 0o777 == 0o755
    assert inside(tmp_path) == [stray.name]


async def test_a_staged_adapter_stays_where_it_may_be_looked_for(tmp_path: Path) -> None:
    """An engine that still knows its name would miss it."""
    async with staged(AdaptersDir(tmp_path, "/engine"), TINY_BASE) as tiny:
        tiny.stays = True
    assert (tiny.shared_dir.ours / tiny.key / "adapter_config.json").is_file()


async def test_an_error_leaves_nothing_staged(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        async with staged(AdaptersDir(tmp_path, "/engine"), TINY_BASE):
            raise ZeroDivisionError
    assert inside(tmp_path) == []
