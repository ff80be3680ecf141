"""`sidecar simulate`, from its options to its output for scripts and people."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from policies.registry import POLICIES
from sidecar.errors import needs_extra
from sidecar.lab.sim.flavours import FLAVOURS
from sidecar.lab.sim.options import Options
from sidecar.lab.sim.product import Product
from sidecar.lab.sim.records import Recorder
from sidecar.lab.sim.runs import runs_of
from sidecar.lab.sim.simulate import simulate
from sidecar.lab.sim.workloads import WORKLOADS
from sidecar.lab.sim.world import PROGRESS_EVERY, World
from tests.kit.cases import needs
from tests.kit.cli_runs import Ended, runner

SMALL = ("--requests", "60", "--input-tokens", "64", "--output-tokens", "16", "--adapters", "12", "--slots", "2")
PROMISED = (
    "throughput_tokens_per_s", "bounds.all_resident_tokens_per_s", "bounds.closed_form_tokens_per_s",
    "wait_s.all.p50", "wait_s.all.p99", "wait_s.all.max", "wait_s.hot.p50", "wait_s.hot.p99", "wait_s.hot.max",
    "wait_s.cold.p50", "wait_s.cold.p99", "wait_s.cold.max", "loads_per_request", "mean_batch",
    "slot_openings_per_1k_requests", "jain_index", "requests.offered", "requests.answered", "requests.failed",
    "requests.refused", "requests.doubled", "store.miss_cost", "store.bound", "core_us_per_request", "seed",
)  # fmt: skip
"""The fields of a run that scripts read, by path."""


@pytest.fixture
def sidecar(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Return a function that runs one command in this process."""
    return runner(capfd)


def at(record: Any, place: str) -> Any:
    for key in place.split("."):
        record = record[key]
    return record


def numbers(record: Any) -> Iterator[float]:
    """Yield every number of a JSON value."""
    if isinstance(record, dict):
        record = list(record.values())
    if isinstance(record, list):
        for value in record:
            yield from numbers(value)
    elif isinstance(record, int | float):
        yield record


# For scripts.


def test_one_run_is_one_object_with_the_promised_names(sidecar: Callable[..., Ended]) -> None:
    """Each name is there with a number, all of them finite, and each request has ended once."""
    ended = sidecar("simulate", "--workload", "two_hot", "--load", "0.5", "--seed", "3", *SMALL, "--json")
    assert (ended.code, ended.err) == (0, "")
    record = ended.json()
    assert all(isinstance(at(record, place), int | float) for place in PROMISED)
    assert all(math.isfinite(number) for number in numbers(record))
    assert record["seed"] == 3
    counts = record["requests"]
    assert counts["offered"] == 60 == sum(counts.values()) - 60
    assert counts["doubled"] == counts["unfinished"] == 0


def test_every_option_that_scripts_rely_on(sidecar: Callable[..., Ended]) -> None:
    """All options together are accepted, and the output names what was simulated."""
    record = sidecar(
        "simulate", "--workload", "zipf", "--input-tokens", "64", "--output-tokens", "16", "--model", "llama-3.1-8b",
        "--gpu", "a100_sxm", "--adapters", "10", "--slots", "3", "--seats", "20", "--in-flight", "30", "--backends",
        "2", "--output-cv", "0.5", "--engine", "vllm", "--ordering", "skip", "--routing", "affinity",
        "--eviction", "lfu", "--requests", "80", "--seed", "9", "--json",
    ).json()  # fmt: skip
    assert record["requests"]["answered"] == 80
    setup = record["setup"]
    assert {key: setup[key] for key in ("engine", "backends", "seats", "slots", "adapters", "in_flight")} == {
        "engine": "vllm", "backends": 2, "seats": 20, "slots": 3, "adapters": 10, "in_flight": 30,
    }  # fmt: skip
    assert (setup["order"], setup["route"], setup["store"]) == ("skip", "affinity", "lfu")


def test_several_runs_are_a_list_with_the_gain_over_the_bare_engine(sidecar: Callable[..., Ended]) -> None:
    """Orders and seeds side by side. Sixteen adapters of two slots, all in sight of a queue: more tokens than bare."""
    deep = ("--in-flight", "300", "--requests", "600", "--seats", "16")
    runs = sidecar("simulate", *SMALL, *deep, "--compare", "none,skip", "--seeds", "1,2", "--json").json()["runs"]
    assert [(run["label"], run["seed"]) for run in runs] == [("none", 1), ("skip", 1), ("none", 2), ("skip", 2)]
    for bare, skip in (runs[:2], runs[2:]):
        gain = skip["throughput_tokens_per_s"] / bare["throughput_tokens_per_s"]
        assert skip["over_bare"]["throughput"] == pytest.approx(gain)
        assert gain > 1.2
        assert "over_bare" not in bare
        assert bare["setup"]["order"] is None


def test_the_same_command_gives_the_same_json_in_any_process() -> None:
    """With two hash seeds of Python all is equal, except the times of the machine's clock."""
    command = (
        "simulate", "--workload", "zipf", "--compare", "none,skip,soft_gated", "--rate", "400", "--output-cv", "1",
        "--arrival-cv", "2", "--tenants", "3,1", "--ranks", "8,16", "--drift", "20", "--backends", "2", "--store-bytes",
        "60000000", "--host-slots", "4", *SMALL, "--json",
    )  # fmt: skip
    outputs = []
    for hash_seed in ("0", "4242"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        code = "from sidecar.cli import main; main()"
        ran = subprocess.run(
            [sys.executable, "-c", code, *command], env=environment, capture_output=True, text=True, check=True
        )
        measured = re.compile(r'"(core_us_per_request|wall_s)": [^\n]+')
        outputs.append(measured.sub("", ran.stdout))
    assert outputs[0] == outputs[1]
    assert '"refused"' in outputs[0]


@pytest.mark.parametrize(
    "options",
    [
        *(("--workload", name) for name in WORKLOADS),
        *(("--engine", name) for name in FLAVOURS),
        *(("--ordering", name, "--engine", "vllm") for name in (*POLICIES["ordering"], "none")),
        *(("--routing", name, "--backends", "2") for name in POLICIES["routing"]),
        *(("--eviction", name, "--store-bytes", "60000000", "--host-slots", "4") for name in POLICIES["eviction"]),
        *(("--prefetch", name, "--store-bytes", "60000000") for name in POLICIES["prefetch"]),
    ],
    ids=" ".join,
)
def test_every_name_can_be_simulated(options: tuple[str, ...], sidecar: Callable[..., Ended]) -> None:
    """Each policy of each kind runs, and every request is answered."""
    counts = sidecar("simulate", *SMALL, *options, "--json").json()["requests"]
    assert (counts["answered"], counts["doubled"], counts["unfinished"]) == (60, 0, 0)


BARE_PYTORCH = ("--engine", "trtllm_pytorch", "--in-flight", "40", "--compare", "none,soft_gated")


def test_a_pytorch_engine_alone_fails_what_the_sidecar_keeps_apart(sidecar: Callable[..., Ended]) -> None:
    """Its pages hold more adapters than its batches take; behind the sidecar no more than its slots ever meet."""
    bare, ours = sidecar("simulate", *SMALL, *BARE_PYTORCH, "--json").json()["runs"]
    assert bare["batches_failed"] > 0
    assert bare["requests"]["failed"] > 0
    assert (ours["batches_failed"], ours["requests"]["answered"]) == (0, 60)
    assert ours["wait_bound"]["exceeded"] == 0
    shown = sidecar("simulate", *SMALL, *BARE_PYTORCH).out
    assert "batches failed by too many adapters" in shown
    assert "more adapters met than the engine has slots" in shown


def test_a_read_takes_as_long_as_is_said(sidecar: Callable[..., Ended]) -> None:
    """One request for each of 12 adapters, one at a time: each reads for so much longer."""
    one_by_one = ("--engine", "trtllm_pytorch", "--in-flight", "1", "--requests", "12", "--ordering", "soft_gated")
    seconds = [
        sidecar("simulate", *SMALL, *one_by_one, "--load-ms", load_ms, "--json").json()["simulated_s"]
        for load_ms in ("0", "500")
    ]
    assert seconds[1] - seconds[0] == pytest.approx(12 * 0.5, rel=0.01)


def test_an_engine_that_computes_is_not_suspected() -> None:
    """Few requests with long answers: nothing starts or ends for seconds, and each second's tokens are reported."""
    options = Options(workload="two_hot", adapters=2, slots=2, in_flight=2, output_tokens=2000, requests=6)
    (run,) = runs_of(options)
    assert run.setup.sidecar is not None
    world = World(run.setup, run.workload, Recorder())
    asked: list[str] = []
    product = Product(world, run.setup.sidecar)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(product, "_probe", lambda effect: asked.append(effect.backend))
        world.run(product)
    assert world.recorder.counts["answered"] == 6
    assert asked == []


def test_a_trace_is_simulated(tmp_path: Path, sidecar: Callable[..., Ended]) -> None:
    """In an open loop by its times, in a closed one as fast as it goes."""
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,adapter,input_tokens,output_tokens\n0,sql,10,20\n100,a@v7,10,20\n")
    opened = sidecar("simulate", "--trace", str(path), "--json").json()
    closed = sidecar("simulate", "--trace", str(path), "--in-flight", "1", "--json").json()
    assert opened["requests"]["answered"] == closed["requests"]["answered"] == 2
    assert opened["simulated_s"] > 100 > closed["simulated_s"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--slots", "0"), "--slots 0: expected"),
        (("--rate", "nan"), "--rate nan: expected"),
        (("--ordering", "lifo"), "there are none, credit"),
        (("--ranks", "8;16"), "--ranks 8;16: expected ranks"),
        (("--in-flight", "4", "--rate", "1"), "exclude each other"),
        (("--seed", "1", "--seeds", "1,2"), "--seed and --seeds exclude each other"),
        (("--trace", "nowhere.csv"), "nowhere.csv"),
        (("--engine", "vllm", "--load-ms", "5"), "--load-ms: vllm is sent its adapters"),
        (("--engine", "trtllm_pytorch", "--load-ms", "-1"), "--load-ms -1.0: expected milliseconds"),
        (("--report", __file__), "expected a directory"),
    ],
)
def test_nonsense_ends_with_two(options: tuple[str, ...], words: str, sidecar: Callable[..., Ended]) -> None:
    """One line for people, an object for scripts, and nothing on stdout."""
    ended = sidecar("simulate", *options)
    assert (ended.code, ended.out) == (2, "")
    assert words in ended.err
    assert sidecar("simulate", *options, "--json").error()["reason"] == "CONFIG_INVALID"


# For people.


def test_people_get_a_table_and_what_it_means(sidecar: Callable[..., Ended]) -> None:
    """What was simulated, bounds first, the gain in words; a single run says how to see the gain."""
    ended = sidecar("simulate", *SMALL, "--compare", "none,skip")
    assert (ended.code, ended.err) == (0, "")
    lines = [line.strip() for line in ended.out.splitlines()]
    assert lines[0].startswith("llama-3.1-8b on A100")
    assert lines[2].split() == ["none", "skip"]
    assert lines[3].startswith("bound, all resident")
    assert any(line.startswith("skip has ") and "× the bare engine's tokens/s" in line for line in lines)
    assert "--compare none,skip" in sidecar("simulate", *SMALL, "--ordering", "skip").out


def test_refusals_are_explained(sidecar: Callable[..., Ended]) -> None:
    """Overload is refused with a reason and a delay; the first message of each reason is shown."""
    small = (*SMALL, "--requests", "400", "--ordering", "skip", "--load", "5")
    out = sidecar("simulate", *small, "--wait-limit", "0.5").out
    assert re.search(r"skip had \d+ QUEUE_FULL.*; refused ones were told to come back after", out)
    assert "QUEUE_FULL, for example: the expected wait on b0 is" in out


@needs("matplotlib", "lab")
def test_a_report_is_written(tmp_path: Path, sidecar: Callable[..., Ended]) -> None:
    """The page lies in the directory, which need not be there, and its place is told."""
    ended = sidecar("simulate", *SMALL, "--report", str(tmp_path / "plots"))
    assert ended.code == 0
    (page,) = (tmp_path / "plots").iterdir()
    assert str(page) in ended.out
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    "arguments", [("simulate", *SMALL, "--report", "plots"), ("plan", "--p99-wait", "5", "--plot", "plan.svg")]
)
def test_without_the_extra_nothing_is_simulated_for_plots(
    arguments: tuple[str, ...], sidecar: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the extra to install before any simulation; the command without plots needs none."""
    for name in {"matplotlib", *sys.modules}:
        if name.partition(".")[0] == "matplotlib":
            monkeypatch.setitem(sys.modules, name, None)
        elif name.startswith(("sidecar.lab.sim.report", "sidecar.lab.plan.drawing")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("sidecar.cli.simulating.run_simulation", None)
    monkeypatch.setattr("sidecar.cli.planning.Search", None)

    ended = sidecar(*arguments)

    assert (ended.code, ended.out) == (2, "")
    assert needs_extra("a report or plot", "lab") in ended.err


def test_a_long_run_tells_how_far_it_is() -> None:
    """The progress callback gets rising numbers of ended requests, for the bare engine and the product."""
    for run in runs_of(Options(compare=("none", "skip"), requests=700, input_tokens=8, output_tokens=4, adapters=4)):
        told: list[int] = []
        simulate(run.setup, run.workload, run.label, told.append)
        assert told == [PROGRESS_EVERY, 2 * PROGRESS_EVERY]


def test_json_is_json_to_the_last_digit(sidecar: Callable[..., Ended]) -> None:
    """There is no NaN and no infinity, which JSON lacks, even if nothing was answered."""
    ended = sidecar("simulate", *SMALL, "--ordering", "skip", "--store-bytes", "1", "--json")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    record = json.loads(ended.out, parse_constant=refuse)
    assert record["requests"]["refused"] == 60
    assert record["reasons"] == {"NO_BACKEND": 60}
