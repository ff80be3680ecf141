"""The demo as a newcomer runs it, and proof that its check can fail."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from sidecar.adapters.builder import build
from sidecar.adapters.folder import Folder
from sidecar.lab.demo import run
from sidecar.shell import store


def telling_to(told: list[str]) -> Callable[[str], AbstractContextManager[Callable[[str], None]]]:
    @contextmanager
    def telling(what: str) -> Iterator[Callable[[str], None]]:
        told.append(what)
        yield told.append

    return telling


def report_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


async def test_every_answer_is_the_merged_models(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 0; by id alone every request misses; by name all are right, over both engines, with evictions under way.

    Every answer is counted while people wait for the last.
    """
    told: list[str] = []
    assert await run.run_demo(keep=False, as_json=True, telling=telling_to(told)) == 0
    counts = [int(said.group(1)) for said in map(re.compile(r"(\d+) of 36").search, told) if said]
    assert counts == sorted(counts)
    assert counts[-1] == 36
    assert told[:2] == ["starting 2 emulated engines", "starting the sidecar"]
    report = report_of(capsys)
    assert report["direct"] == {"not found in cache": 8}
    assert len(report["answers"]) == 36
    assert all(answer["right"] for answer in report["answers"])
    assert {answer["backend"] for answer in report["answers"]} == {"engine-0", "engine-1"}
    assert report["counts"]["loads"] >= 8
    assert report["counts"]["engine_evictions"] > 0


@pytest.mark.slow
async def test_swapped_task_ids_are_caught(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two adapters' weights under each other's task id: both are named as wrong, and the exit code says so."""
    swap = {"pirate": "chef", "chef": "pirate"}

    def swapped(source: Folder, layout: Any, **_: Any) -> Any:
        return build(source.path.with_name(swap.get(source.path.name, source.path.name)), layout)

    monkeypatch.setattr(store, "build", swapped)
    assert await run.run_demo(keep=False, as_json=True, telling=telling_to([])) == 1
    wrong = report_of(capsys)["wrong"]
    assert len(wrong) == 8
    assert {line.split()[0] for line in wrong} == {"pirate", "chef"}


def without_b(source: Path, folder: Path) -> Path:
    """Copy an adapter with every byte of its B matrices zero."""
    copy = Path(shutil.copytree(source, folder / source.name, dirs_exist_ok=True))
    weights = copy / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    for name, tensor in json.loads(data[8 : 8 + length]).items():
        if name.endswith("lora_B.weight"):
            begin, end = (8 + length + offset for offset in tensor["data_offsets"])
            data[begin:end] = bytes(end - begin)
    weights.write_bytes(data)
    return copy


@pytest.mark.slow
async def test_a_zeroed_b_is_caught(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Adapters whose B never arrived answer as the base model: every one is named as wrong."""
    monkeypatch.setattr(store, "build", lambda source, layout, **_: build(without_b(source.path, tmp_path), layout))
    assert await run.run_demo(keep=False, as_json=True, telling=telling_to([])) == 1
    report = report_of(capsys)
    assert all(not answer["right"] for answer in report["answers"] if answer["adapter"])
