"""Cost tables out of published measurements, with a small stand-in for the package that holds them."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sidecar.errors import Misused, needs_extra
from sidecar.lab.calibrate.measured import Measured, short_name
from sidecar.lab.calibrate.refining import refined_grid
from sidecar.lab.calibrate.table import measured_table
from sidecar.pace.cost import A100_TABLE, CostModel, StepBatch, find_cost
from sidecar.pace.cost_table import load_cost_table
from tests.kit.cli_runs import runner

LLAMA = "meta-llama/Meta-Llama-3.1-8B"
GB = 10**9


class Times:
    """Step times with a kink where a batch needs a second tile."""

    def predict_decode_latency(self, batch: int, context: int, outputs: int) -> float:
        return 11 + 0.02 * batch + 6e-5 * batch * context + (9.0 if batch > 160 else 0.0)

    def predict_prefill_latency(self, requests: int, tokens: int) -> float:
        return 11 + 0.06 * requests * tokens


def estimate(model: str, gpu: str, engine: str, version: str, **options: Any) -> dict[str, Any]:
    if model != LLAMA:
        raise ValueError("no KV budget:\n it does not fit")
    assert options["memory_fraction_kind"] == {"trtllm": "of_free", "vllm": "of_total"}[engine]
    return {
        "total_gpu_capacity_bytes": 80 << 30,
        "memory_breakdown": {
            "weights_bytes": 16 * GB, "activations_bytes": GB, "runtime_overhead_bytes": 4 * GB,
        },
        "kv_size_per_token_bytes": 131_072,
        "total_kv_size_tokens": 400_000,
    }  # fmt: skip


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-in where the package would be."""
    systems = {
        "a100_sxm": {"trtllm": ["1.0.0"], "vllm": ["0.13.0", "0.14.0"], "sglang": ["0.5"]},
        "b60": {"vllm": ["1"]},
    }
    contents: dict[str, Any] = {
        "engine": {"EngineHandle": SimpleNamespace(compile=lambda *names, **options: Times())},
        "perf_database": {"get_supported_databases": lambda: systems},
        "common": {"get_default_models": lambda: {LLAMA, "Qwen/Qwen3-32B"}},
        "memory": {"estimate_kv_cache": estimate},
    }
    for name in ("aiconfigurator_core", "aiconfigurator_core.sdk"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, members in contents.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, f"aiconfigurator_core.sdk.{name}", module)
    real: Callable[[str], str] = importlib.metadata.version
    monkeypatch.setattr(
        "sidecar.lab.calibrate.measured.version", lambda name: "9.9" if name.startswith("aic") else real(name)
    )


@pytest.mark.usefixtures("package")
def test_a_table_holds_what_was_measured() -> None:
    """Steps between the points come out within the tolerance, past a kink too, and every part names its source."""
    measured = Measured("llama-3.1-8b", "a100_sxm", "vllm")
    told: list[tuple[str, int, int]] = []
    table = measured_table(measured, lambda *query: told.append(query))
    cost = CostModel(table)
    for decoding in (1, 3, 100, 150, 200, 300):
        for context in (100, 700, 3000):
            true = Times().predict_decode_latency(decoding, context, 2)
            found = cost.step_ns(StepBatch(0, 0, decoding, decoding * context, 0, 0, 0)) / 1e6
            assert found == pytest.approx(true, rel=0.02), (decoding, context)
    assert (table.model, table.engine, table.gpu) == ("llama-3.1-8b", "vLLM 0.14.0", "A100 SXM 80 GB")
    assert (table.kv_tokens, table.kv_token_bytes) == (400_000, 131_072)
    assert [sentence.partition(":")[0] for sentence in table.source] == [
        "Step times", "fixed_ms", "kv", "lora", "copies",
    ]  # fmt: skip
    assert "aiconfigurator-core 9.9" in table.source[0]
    assert {what for what, _, _ in told} == {"decode steps", "prompts"}
    assert told[-1][1] == told[-1][2]


def test_a_grid_is_no_finer_than_it_must_be() -> None:
    """A straight surface needs the given points only; a kink gets points around it, and no more."""

    def straight(row: int, column: int) -> float:
        return 10.0 + row + column

    def kinked(row: int, column: int) -> float:
        return 10.0 + max(0, row - 100) * 5

    grid = refined_grid(straight, (1, 8, 64), (1, 100), 0.01, lambda *query: None, "steps")
    assert (grid.first, grid.second) == ((1, 8, 64), (1, 100))
    finer = refined_grid(kinked, (64, 128), (1, 100), 0.01, lambda *query: None, "steps").first
    assert 2 < len(finer) < 12
    assert any(96 <= point <= 104 for point in finer)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("gpt-5", "a100_sxm", "vllm"), 'no measurements of the model "gpt-5"; there are llama-3.1-8b, qwen3-32b'),
        (("llama-3.1-8b", "a100", "vllm"), 'no measurements of the GPU "a100"; there are a100_sxm, b60'),
        (("llama-3.1-8b", "b60", "trtllm"), 'no measurements of the engine "trtllm" for b60; there are vllm'),
        (("llama-3.1-8b", "a100_sxm", "sglang"), "for a100_sxm; there are trtllm, vllm"),
        (("qwen3-32b", "a100_sxm", "vllm"), "has no times of Qwen/Qwen3-32B .*: no KV budget: it does not fit; take"),
    ],
)
def test_what_is_not_measured_is_refused(names: tuple[str, str, str], message: str) -> None:
    """A model, GPU or engine without measurements is named, with those that have some."""
    with pytest.raises(Misused, match=message):
        Measured(*names)


@pytest.mark.usefixtures("package")
def test_the_command_writes_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`calibrate` writes a file that can be used at once, and tells people and scripts what is in it."""
    out = tmp_path / "cost.json"
    names = ("--model", LLAMA, "--gpu", "b60", "--engine", "vllm")
    record = runner(capfd)("calibrate", *names, "--out", str(out), "--json").json()
    assert (record["file"], record["model"], record["kv_tokens"]) == (str(out), "llama-3.1-8b", 400_000)
    assert "is an assumption" in record["source"][3]
    assert load_cost_table(out).engine == "vLLM 1"
    shown = runner(capfd)("calibrate", *names, "--out", str(out))
    assert (shown.code, shown.err) == (0, "")
    assert f"sidecar emulate --cost {out}" in shown.out
    assert [path.name for path in tmp_path.iterdir()] == ["cost.json"]


@pytest.mark.usefixtures("package")
def test_the_file_is_named_as_it_is_found(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --out the file gets the name that a look-up by model, GPU and engine finds."""
    monkeypatch.chdir(tmp_path)
    runner(capfd)("calibrate", "--model", LLAMA, "--gpu", "a100_sxm", "--engine", "trtllm")
    assert find_cost("llama-3.1-8b", "a100_sxm", "trtllm", tmp_path).name == A100_TABLE.name


def test_the_command_says_what_is_missing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the extra, without options, with one that does not belong: exit 2, and the way out."""
    command = runner(capfd)
    for name in [*sys.modules]:  # an earlier test may have imported what is installed
        if name.startswith("aiconfigurator_core."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "aiconfigurator_core", None)
    ended = command("calibrate", "--model", "llama-3.1-8b", "--gpu", "a100_sxm", "--engine", "vllm", "--json")
    assert ended.code == 2
    assert ended.error()["message"] == needs_extra("what is measured", "calibrate")
    for arguments, way_out in ((("--model", "x"), "--from-journal"), (("--backend", "b0"), "--from-journal")):
        ended = command("calibrate", *arguments, "--json")
        assert ended.code == 2
        assert way_out in ended.error()["message"]
    ended = command("calibrate", "--from-journal", str(tmp_path), "--json")
    assert (ended.code, ended.error()["reason"]) == (1, "NOT_A_JOURNAL")


@pytest.mark.usefixtures("package")
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A folder that is not there is an error with the path, and nothing is left behind."""
    out = tmp_path / "nowhere" / "cost.json"
    arguments = ("--model", "llama-3.1-8b", "--gpu", "a100_sxm", "--engine", "vllm", "--out", str(out))
    ended = runner(capfd)("calibrate", *arguments)
    assert ended.code == 1
    assert f"{out}: No such file or directory; --out names another place" in ended.err


def test_short_names() -> None:
    """Models go by their last part in small letters, without a maker's prefix."""
    assert short_name(LLAMA) == short_name("llama-3.1-8b") == "llama-3.1-8b"
    assert short_name("Qwen/Qwen3-32B") == "qwen3-32b"
