"""`make record`: the emulator against itself has no differences, against another one those that it is told to have."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.kit.peft_files import ALL_LINEAR, read_tensors, write_adapter
from tests.kit.trtllm_emulated import start_trtllm
from tools.record.__main__ import arguments, compare, differences
from tools.record.copies import Copies
from tools.record.deadly import DEEDS
from tools.record.questions import OF_ADAPTERS, OF_FAILING_LOADS, QUESTIONS

SETTINGS = {"max_seq_tokens": 1 << 17, "kv_blocks": 1 << 16, "max_loras": 2, "max_cpu_loras": 4}


async def compared(tmp_path: Path, *more: str, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Record an emulated server of these options, and the one that the command starts."""
    folder = write_adapter(tmp_path / "adapter", modules=ALL_LINEAR, size=0.3)
    server = await start_trtllm(**SETTINGS | options)
    given = [f"http://{server.http_address}", "--adapter", str(folder), "--max-loras", "2", "--max-cpu-loras", "4"]
    try:
        return await compare(arguments().parse_args([*given, *more]))
    finally:
        await server.stop()


@pytest.mark.parametrize(("era", "statistics"), [("main", True), ("1.2", False)])
async def test_an_emulator_is_like_itself(tmp_path: Path, era: str, statistics: bool) -> None:
    """All questions are answered, and none by an exception; what 1.2 dies of is not asked there."""
    options = {"era": era, "iteration_stats": statistics, "perf_metrics": statistics}
    real, emulated = await compared(tmp_path, **options)
    assert differences(real, emulated) == []
    assert len(real) == len(QUESTIONS) + len(OF_ADAPTERS) + (len(OF_FAILING_LOADS) if era == "main" else 0)
    assert not [name for name, said in real.items() if isinstance(said, str)]
    assert real["a_number_keeps_its_first_content"] == {
        "another path": True, "changed files": True, "a new number": False,
    }  # fmt: skip
    for name in ("alpha_pattern", "the_rank_of_the_configuration", "a_module_of_an_unknown_name"):
        assert real[name] == {"is ignored": True}
    assert real["an_adapter_changes_the_answer"] == {"lora is on": True}
    assert real["metrics_are_drained"]["second is empty"] is True
    assert os.listdir(tmp_path) == ["adapter"], "its copies are gone"  # noqa: PTH208 - async


async def test_what_differs_is_named(tmp_path: Path) -> None:
    """A server whose LoRA is off, and one that checks paths later."""
    real, emulated = await compared(tmp_path, lora_modules=())
    told = [line for line in differences(real, emulated) if not line.startswith(" ")]
    assert "an_adapter_changes_the_answer" in told
    assert "loads_that_fail" in told
    assert "a_whole_completion" not in told
    real, emulated = await compared(tmp_path, late_path_check=True)
    told = [line for line in differences(real, emulated) if not line.startswith(" ")]
    assert told == ["refusals", "the_path_of_a_known_number"]


QUICK = {("slots", "main"), ("load", "1.2")}
EACH = [
    pytest.param(deed, era, marks=() if (deed, era) in QUICK else pytest.mark.slow)
    for deed in DEEDS
    for era in ("main", "1.2")
]


@pytest.mark.parametrize(("deed", "era"), EACH)
async def test_deeds(tmp_path: Path, deed: str, era: str) -> None:
    """Each is seen alike by both, and as the era has it."""
    options: dict[str, Any] = {"era": era}
    real, emulated = await compared(tmp_path, "--deadly", deed, "--patience", "2", **options)
    assert differences(real, emulated) == []
    seen = real[deed]
    if deed in ("rank", "layer", "size"):
        assert (seen["who asks"], seen["the stream"], seen["who comes later"]) == ("hangs", "is silent", "hangs")
        assert seen["health"] == (["503", "is not let in"] if era == "main" else ["200"])
    elif deed == "slots":
        assert "more LoRA task ID than loRA slot size" in seen["who asks"]
        assert seen["the stream"] != "goes on"
        assert seen["health"] == ["200"]
    elif era == "main":
        assert seen["who asks"].startswith("400")
        assert seen["the stream"] == "goes on"
    else:
        assert seen["who asks"] == seen["the stream"] == "is broken"
        assert seen["health"] == ["is not let in"]


def test_copies(tmp_path: Path) -> None:
    """What is changed, and that the rest is not."""
    source = write_adapter(tmp_path / "adapter", rank=8)
    below = tmp_path / "below"
    below.mkdir()
    copies = Copies(source, below)
    plain = copies.plain()
    assert sorted(path.name for path in plain.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((copies.configured(r=1) / "adapter_config.json").read_text())["r"] == 1
    there = read_tensors(plain)
    for name, values in read_tensors(copies.negated()).items():
        assert np.array_equal(values, -there[name] if ".lora_B." in name else there[name])
    higher = read_tensors(copies.of_rank(20))
    assert {values.shape for values in higher.values()} == {(24, 64), (64, 24), (32, 24)}
    assert len(read_tensors(copies.of_layer(9))) == len(there) * 3 // 2
    shorter = read_tensors(copies.too_short())
    assert {values.shape for name, values in shorter.items() if ".lora_B." in name} == {(32, 8), (16, 8)}
