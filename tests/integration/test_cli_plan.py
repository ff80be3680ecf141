"""`sidecar plan`, from options to a plan, its JSON, the lines to paste and the plot."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from sidecar.backends.openai.vllm import OLDEST, is_too_old
from sidecar.backends.registry import entries_of
from sidecar.config import parse
from sidecar.core.facts import EngineFacts
from sidecar.pace.cost import A100_TABLE
from tests.kit.cases import needs
from tests.kit.cli_runs import Ended, runner

LOAD = (
    "plan", "--workload", "zipf", "--rate", "4", "--adapters", "12", "--input-tokens", "256", "--output-tokens", "64",
    "--output-cv", "1", "--requests", "80", "--seeds", "1,2", "--rank", "64", "--lora-modules", "all",
)  # fmt: skip
GOAL = (*LOAD, "--p99-wait", "5")
LLAMA_CONFIG = {
    "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 16,
    "intermediate_size": 8192,
}  # fmt: skip


@pytest.fixture
def sidecar(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Return a function that runs one command here and now."""
    return runner(capfd)


def parameters(text: str) -> dict[str, str]:
    """Return the parameters of a config.pbtxt."""
    found = re.findall(r'parameters: \{\n  key: "(\w+)"\n  value: \{\n    string_value: "([^"]*)"\n  \}\n\}', text)
    return dict(found)


def cost_file(path: Path, **fields: Any) -> Path:
    """Write the A100's cost file with other fields."""
    path.write_text(json.dumps(json.loads(A100_TABLE.read_text()) | fields))
    return path


def test_a_plan_in_json(sidecar: Callable[..., Ended]) -> None:
    """It has the plan, what is predicted with its spread, the curve and what all of it rests on."""
    ended = sidecar(*GOAL, "--json")
    told = ended.json()
    assert (ended.code, ended.err, told["meets"]) == (0, "", True)
    plan, settings = told["plan"], told["settings"]["engine"]
    assert plan["backends"] == 1
    assert plan["slots"] <= 12 < plan["adapters_fit"]
    assert settings["lora_cache_max_adapter_size"] == 64
    assert settings["lora_cache_host_memory_bytes"] == plan["host_pages"] * plan["page_bytes"]
    assert 0 < settings["lora_cache_gpu_memory_fraction"] < 1
    wait = told["predicted"]["wait_p99_s"]
    assert 0 < wait["least"] <= wait["median"] <= wait["most"] <= 5
    assert [sample["seed"] for sample in told["predicted"]["samples"]] == [1, 2]
    assert [point["slots"] for point in told["curve"]] == [1, 2, 4, 8, 12]
    kv = [point["kv_tokens"] for point in told["curve"]]
    assert kv == sorted(kv, reverse=True)
    rests = told["rests_on"]
    assert rests["requests_simulated"] == rests["simulations"] * 80
    assert rests["lora_loss"]["published_range"] == [0.4, 0.477]
    assert any("SqueezeBits" in source for source in rests["cost_sources"])


def test_a_plan_for_people(sidecar: Callable[..., Ended]) -> None:
    """The verdict stands first, then settings, the curve with the plan marked, and what it rests on."""
    ended = sidecar(*GOAL)
    assert ended.code == 0
    assert "1 engine with" in ended.out.splitlines()[1]
    assert "meets a p99 wait of 5 s" in ended.out.splitlines()[1]
    for words in (
        "lora_cache_gpu_memory_fraction",
        "store.memory_bytes",
        "◄",
        "2 of 80 requests",
        "if steps take 10 %",
    ):
        assert words in ended.out


@pytest.mark.parametrize(
    ("engine", "measured", "warns"), [("vllm", "vLLM 0.14.0", 1), ("trtllm", "TensorRT-LLM 1.0.0", 0)]
)
def test_it_says_whose_times_it_rests_on(engine: str, measured: str, warns: int, sidecar: Callable[..., Ended]) -> None:
    """Those of a version that the sidecar does not serve are marked as such, in every form."""
    for form in ((), ("--emit", PASTED[engine])):
        assert f"by step times of {measured}" in sidecar(*GOAL, "--engine", engine, *form).out
    warnings = sidecar(*GOAL, "--engine", engine, "--json").json()["warnings"]
    told = [
        text for text in warnings if f"the step times were measured with {measured}; the sidecar needs vLLM" in text
    ]
    assert len(told) == warns
    assert not is_too_old(f"{OLDEST[0]}.{OLDEST[1]}.0")


PASTED = {"vllm": "vllm", "trtllm": "pbtxt"}


def test_lines_for_triton(sidecar: Callable[..., Ended]) -> None:
    """Only the parameters are printed, by the names that Triton's model has, with the plan's values."""
    ended = sidecar(*GOAL, "--emit", "pbtxt", "--json")
    told = ended.json()
    found = parameters(told["lines"])
    assert found == {name: str(value) for name, value in told["settings"]["engine"].items()}
    assert set(found) == {
        "lora_cache_optimal_adapter_size", "lora_cache_max_adapter_size", "lora_cache_gpu_memory_fraction",
        "lora_cache_host_memory_bytes", "kv_cache_free_gpu_mem_fraction",
    }  # fmt: skip
    without = re.sub(r"parameters: \{.*?\n\}\n", "", told["lines"], flags=re.S)
    assert all(line.startswith("# ") for line in without.splitlines())
    assert sidecar(*GOAL, "--emit", "pbtxt").out == told["lines"]


@pytest.mark.parametrize("engine", ["trtllm", "vllm"])
def test_values_that_the_sidecar_takes(engine: str, tmp_path: Path, sidecar: Callable[..., Ended]) -> None:
    """`config check` accepts them, and what it would serve has the plan's sizes."""
    ended = sidecar(*GOAL, "--engine", engine, "--backends", "2", "--emit", "helm", "--json")
    told = ended.json()
    file = tmp_path / "values.yaml"
    file.write_text(told["lines"])
    checked = sidecar("config", "check", str(file), "--json")
    assert checked.code == 0
    assert f"calibrated from llama-3.1-8b/a100_sxm/{engine}" in checked.err
    config = parse(yaml.safe_load(told["lines"]), "lines")
    assert len(config.backends) == 2
    backend = entries_of(config)[0].engine
    assert (backend.device_pages, backend.host_pages) == (told["plan"]["device_pages"], told["plan"]["host_pages"])
    assert (backend.seats, backend.kv_tokens) == (told["plan"]["seats"], told["plan"]["kv_tokens"])
    assert config.store.memory_bytes == told["plan"]["store"]["memory_bytes"]
    assert config.core().classes["default"].patience_ns == 2_500_000_000


def test_declared_pages_are_those_of_the_emitted_bytes(sidecar: Callable[..., Ended]) -> None:
    """The sidecar would work out the same host pages from Triton's parameters as the values declare."""
    told = sidecar(*GOAL, "--emit", "pbtxt", "--json").json()
    found, declared = parameters(told["lines"]), told["settings"]["sidecar"]["backends"][0]["engine"]
    facts = EngineFacts(
        dtype=declared["dtype"],
        rank_max=declared["rank_max"],
        modules={name: tuple(dims) for name, dims in declared["modules"].items()},
        layers=declared["layers"],
        optimal_rank=int(found["lora_cache_optimal_adapter_size"]),
        cached_rank_max=int(found["lora_cache_max_adapter_size"]),
        host_bytes=int(found["lora_cache_host_memory_bytes"]),
    )
    assert facts.host_pages_total == declared["host_pages"]


def test_lines_for_vllm(sidecar: Callable[..., Ended]) -> None:
    """Options of `vllm serve`; no fewer adapters in host memory than on the GPU."""
    ended = sidecar(*GOAL, "--engine", "vllm", "--emit", "vllm")
    options = dict(re.findall(r"^(--[a-z-]+)(?: (.*))?$", ended.out, flags=re.M))
    assert ended.code == 0
    assert options["--max-lora-rank"] == "64"
    assert 1 <= int(options["--max-loras"]) <= int(options["--max-cpu-loras"]) <= 12
    assert options["--gpu-memory-utilization"] == "0.9"


def test_lines_for_sglang(sidecar: Callable[..., Ended]) -> None:
    """Planned as vLLM; a slot more than vLLM's, for the base model takes one."""
    vllm, ended = (sidecar(*GOAL, "--engine", "vllm", "--emit", name) for name in ("vllm", "sglang"))
    theirs, options = (dict(re.findall(r"^(--[a-z-]+)(?: (.*))?$", each.out, flags=re.M)) for each in (vllm, ended))
    assert ended.code == 0
    assert int(options["--max-loras-per-batch"]) == int(theirs["--max-loras"]) + 1
    assert int(options["--max-loaded-loras"]) >= int(options["--max-loras-per-batch"]), "SGLang would not start"
    assert options["--max-running-requests"] == theirs["--max-num-seqs"]
    assert "SGLang's own step times are not known" in ended.out


def test_lines_for_trtllm_serve(tmp_path: Path, sidecar: Callable[..., Ended]) -> None:
    """The YAML file of the engine and the sidecar's entry have one `lora_config`, which the sidecar takes."""
    mixed = (*LOAD[:-4], "--ranks", "16,64", "--lora-modules", "all", "--p99-wait", "5", "--engine", "trtllm_pytorch")
    told = sidecar(*mixed, "--emit", "trtllm-serve", "--json").json()
    engine = yaml.safe_load(told["lines"])
    lora = engine["lora_config"]
    assert lora["max_loras"] == told["plan"]["slots"]
    assert lora["max_cpu_loras"] >= 2 * lora["max_loras"]
    assert lora["max_lora_rank"] == 64
    assert lora["lora_target_modules"][:3] == ["attn_q", "attn_k", "attn_v"]
    assert engine["enable_iter_perf_stats"] is True
    assert any("pages hold" in warning for warning in told["warnings"])

    values = yaml.safe_load(sidecar(*mixed, "--emit", "helm").out)
    assert values["backends"][0]["lora_config"] == lora
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14_336, "vocab_size": 128_256}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_CONFIG | sizes | {"model_type": "llama"}))
    values["backends"][0]["base_model"]["config"] = str(tmp_path)
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(values))
    assert sidecar("config", "check", str(file), "--json").code == 0
    (entry,) = entries_of(parse(values, "lines"))
    assert entry.host_versions_max == told["plan"]["versions_max"]
    shown = sidecar(*mixed).out
    assert "lora_config.max_loras" in shown
    assert "host_versions_max" in shown


def test_a_goal_that_nothing_meets(sidecar: Callable[..., Ended]) -> None:
    """The exit code is 1; the nearest plan is shown, and the message names it and what stands in the way."""
    ended = sidecar(*LOAD, "--p99-wait", "0.002", "--backends-max", "2", "--json")
    told = ended.json()
    assert (ended.code, told["meets"]) == (1, False)
    error = ended.error()
    assert error["reason"] == "GOAL_MISSED"
    assert f"{told['plan']['slots']} adapter slots" in error["message"]
    assert told["binds_because"] in error["message"]
    pasted = sidecar(*LOAD, "--p99-wait", "0.002", "--backends", "1", "--slots", "12", "--emit", "helm")
    assert (pasted.code, "does not meet the goal" in pasted.out) == (1, True)


def test_more_throughput_needs_more_engines(sidecar: Callable[..., Ended]) -> None:
    """Twice what an engine gives at its best takes at least three, for nobody reaches the bound."""
    closed = (
        "plan",
        "--in-flight",
        "600",
        "--requests",
        "600",
        "--seeds",
        "1",
        "--slots",
        "64",
        "--output-tokens",
        "256",
    )
    one = sidecar(*closed, "--throughput", "10", "--json").json()
    most = one["predicted"]["bound_tokens_per_s"]
    two = sidecar(*closed, "--throughput", str(1.2 * most), "--json").json()
    assert one["plan"]["backends"] == 1
    assert two["plan"]["backends"] == 2
    assert two["predicted"]["throughput_tokens_per_s"]["least"] >= 1.2 * most


def test_a_trace_is_planned_for(tmp_path: Path, sidecar: Callable[..., Ended]) -> None:
    """Its adapters, lengths and pace are the load, and the notes say what of it was simulated."""
    trace = tmp_path / "day.csv"
    lines = [f"{0.2 * number:.1f},m{number % 5},200,50" for number in range(300)]
    trace.write_text("\n".join(["arrival_s,adapter,input_tokens,output_tokens", *lines]))
    ended = sidecar("plan", "--trace", str(trace), "--requests", "100", "--wait-max", "3", "--json")
    told = ended.json()
    assert ended.code == 0
    assert (told["load"]["adapters"], told["load"]["input_tokens"]) == (5, 200)
    assert told["load"]["asked_tokens_per_s"] == pytest.approx(250, rel=0.02)
    assert "the 3 busiest stretches of 100" in told["notes"][0]
    assert told["settings"]["sidecar"]["queue"]["classes"]["default"]["queue_wait_s_max"] == 3


@needs("matplotlib", "lab")
@pytest.mark.parametrize("name", ["plan.svg", "plan.html"])
def test_the_plot(name: str, tmp_path: Path, sidecar: Callable[..., Ended]) -> None:
    """A file that stands alone, in light and dark, well-formed, with the plan's values in it."""
    file = tmp_path / name
    told = sidecar(*GOAL, "--plot", str(file), "--json").json()
    text = file.read_text()
    picture = text[text.index("<svg") : text.index("</svg>") + len("</svg>")]
    root = ElementTree.fromstring(picture)
    shown = [element.text or "" for element in root.iter() if element.tag.endswith("text")]
    assert sum(f"{told['plan']['slots']} slots: " in words for words in shown) == 3
    assert "prefers-color-scheme:dark" in text
    assert not re.findall(r"src=|href=\"(?!#)|url\((?!#)|@import", text)


def test_another_model_needs_its_shape(tmp_path: Path, sidecar: Callable[..., Ended]) -> None:
    """Adapters are as large as the model makes them; without its config.json another model's size would be a guess."""
    file = cost_file(tmp_path / "cost.json", model="tiny-1b")
    refused = sidecar(*GOAL, "--cost", str(file), "--json")
    assert refused.code == 2
    assert "--model-config" in refused.error()["message"]
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA_CONFIG))
    told = sidecar(*GOAL, "--cost", str(file), "--model-config", str(config), "--json").json()
    backend = told["settings"]["sidecar"]["backends"][0]["engine"]
    assert (backend["layers"], backend["modules"]["mlp_gate"]) == (16, [2048, 8192])
    assert told["rests_on"]["lora_loss"]["assumed"]


def test_without_a_memory_limit_no_fraction_is_made_up(tmp_path: Path, sidecar: Callable[..., Ended]) -> None:
    """A cost file that says that there is always room: the fractions are left out, and the lines say why."""
    file = cost_file(tmp_path / "cost.json", kv=None)
    told = sidecar(*GOAL, "--cost", str(file), "--emit", "pbtxt", "--json").json()
    assert not any("fraction" in name for name in parameters(told["lines"]))
    assert "cannot be computed" in told["lines"]
    assert (told["plan"]["kv_tokens"], told["plan"]["adapters_fit"]) == (None, None)
    assert "no limit is known" in sidecar(*GOAL, "--cost", str(file)).out


def test_a_cost_file_beside_us_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sidecar: Callable[..., Ended]
) -> None:
    """What `sidecar calibrate` wrote here is what is planned with."""
    cost_file(tmp_path / "cost_llama-3.1-8b_gpu9_trtllm.json", gpu="GPU 9")
    monkeypatch.chdir(tmp_path)
    assert sidecar(*GOAL, "--gpu", "gpu9", "--json").json()["gpu"] == "GPU 9"


WRONG: list[tuple[tuple[str, ...], str]] = [
    ((), "a plan needs a goal: --p99-wait, --wait-max, --throughput"),
    (("--p99-wait", "nan"), "--p99-wait nan"),
    (("--p99-wait", "5", "--workload", "base"), "base requests no adapter"),
    (("--p99-wait", "5", "--engine", "sglang"), 'there is no "sglang"; there are trtllm, vllm'),
    (("--p99-wait", "5", "--emit", "yaml"), 'there is no "yaml"; there are helm, pbtxt, vllm'),
    (
        ("--p99-wait", "5", "--engine", "vllm", "--emit", "pbtxt"),
        "--emit pbtxt is nothing that vllm reads; take helm, vllm or sglang",
    ),
    (("--p99-wait", "5", "--engine", "trtllm_pytorch", "--emit", "pbtxt"), "is nothing that trtllm_pytorch reads"),
    (("--p99-wait", "5", "--emit", "vllm"), "--emit vllm is nothing that trtllm reads"),
    pytest.param(
        ("--p99-wait", "5", "--plot", "x.png"),
        "expected a file that ends in .svg or .html",
        marks=needs("matplotlib", "lab"),
    ),
    (("--p99-wait", "5", "--rank", "8", "--ranks", "8,16"), "--rank and --ranks exclude each other"),
    (("--p99-wait", "5", "--backends-max", "0"), "--backends 0"),
    (("--p99-wait", "5", "--host-memory", "1000"), "--host-memory is 0.0 GB"),
    (("--p99-wait", "5", "--input-tokens", "500000"), "longer than the 131,072 that engines take"),
    (("--throughput", "1e6", "--rate", "1"), "--throughput 1,000,000 is more than arrivals ask for"),
    (("--p99-wait", "5", "--trace", "nowhere.csv"), "nowhere.csv"),
    (("--p99-wait", "5", "--slots", "65"), "--slots 65: expected at most 64"),
    (("--p99-wait", "5", "--gpu", "abacus"), "a100_sxm"),
    (
        (
            "--p99-wait",
            "5",
            "--rank",
            "12288",
            "--lora-modules",
            "all",
            "--host-memory",
            str(1 << 40),
            "--adapters",
            "1",
        ),
        "GB on the GPU, and beside it no keys and values are left",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "words"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_what_makes_no_sense(arguments: tuple[str, ...], words: str, sidecar: Callable[..., Ended]) -> None:
    """The exit code is 2, and one line says what was wrong and what there is instead."""
    ended = sidecar("plan", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert words in ended.err
