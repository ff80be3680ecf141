"""The checks of an engine that are judged from what it says of itself: ModelConfig, sizes, certificates."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from sidecar.backends.checking import result_of
from sidecar.backends.checks.finding import Finding, State, Target, failed, ok, skipped, warning
from sidecar.backends.checks.port import certificate_finding
from sidecar.backends.triton.checks import engine, model
from sidecar.backends.triton.checks.look import Look
from sidecar.backends.triton.checks.memory import room
from sidecar.backends.triton.checks.rows import STEPS
from sidecar.backends.triton.checks.runs import TEXT_MAX, Answer
from sidecar.backends.triton.checks.tiny import BYTES_MAX, tiny_adapter
from sidecar.cli.findings import Report
from sidecar.core.enums import Fault
from sidecar.core.facts import Adapter, EngineFacts
from sidecar.lab.engine.kserve import Options
from sidecar.lab.engine.kserve.models import model_config, models_of
from sidecar.lab.engine.messages import Request
from sidecar.lab.engine.pages import Row as EngineRow
from sidecar.lab.engine.shape import SHAPES, module_dims
from sidecar.lab.engine.spec import EngineSpec
from sidecar.lab.engine.validation import check_adapter

LORA_INPUTS = ("lora_task_id", "lora_weights", "lora_config")
LLAMA = {name: (dims.in_dim, dims.out_dim) for name, dims in module_dims(SHAPES["llama-3.1-8b"]).items()}
ALL_LINEAR = ("attn_q", "attn_k", "attn_v", "attn_dense", "mlp_h_to_4h", "mlp_4h_to_h", "mlp_gate")


def config_of(**options: Any) -> Any:
    """Return the ModelConfig of an emulated engine's core model."""
    return model_config(models_of(Options(**options))["tensorrt_llm"])


def facts_of(modules: tuple[str, ...] = ALL_LINEAR, **fields: Any) -> EngineFacts:
    """Return the facts of Llama 3.1 8B, built for some modules."""
    known = {"dtype": "float16", "rank_max": 64, "layers": 32, "host_bytes": 1 << 30}
    return EngineFacts(modules={name: LLAMA[name] for name in modules}, **(known | fields))


async def judged(
    run: Callable[[Look], Awaitable[Finding]], config: Any, facts: EngineFacts | None = None, **fields: Any
) -> Finding:
    """Run a check that needs no server."""
    target = Target("trt-0", "gpu:8001", facts=facts or EngineFacts(), **fields)
    looking = Look(target, None, None, engine.facts_from(target, config), config=config)  # type: ignore[arg-type]
    return await run(looking)


def without(*names: str) -> Any:
    config = config_of()
    kept = [tensor for tensor in config.input if tensor.name not in names]
    del config.input[:]
    config.input.extend(kept)
    return config


def changed(name: str, change: Callable[[Any], None]) -> Any:
    config = config_of()
    change(next(tensor for tensor in config.input if tensor.name == name))
    return config


async def test_lora_inputs_as_in_the_template() -> None:
    """Types and dims are told."""
    found = await judged(model.lora_inputs, config_of())
    assert found == ok("lora_task_id UINT64 [1], lora_weights FP16 [-1, -1], lora_config INT32 [-1, 3]")


async def test_a_template_without_lora() -> None:
    """Every line that is to be added is given, and is config.pbtxt that Triton's own parser takes."""
    found = await judged(model.lora_inputs, without(*LORA_INPUTS))
    assert found.state is State.FAILED
    lines = [line for line in found.fix.splitlines() if line.startswith("{")]
    parsed = text_format.Parse(f"input [ {', '.join(lines)} ]", model_config_pb2.ModelConfig())
    config = without(*LORA_INPUTS)
    config.input.extend(parsed.input)
    assert (await judged(model.lora_inputs, config)).state is State.OK


@pytest.mark.parametrize(
    ("config", "words", "line"),
    [
        (without("lora_task_id"), "lora_task_id is missing", "lora_task_id"),
        (changed("lora_config", lambda t: t.dims.__setitem__(1, 4)), "lora_config has dims [-1, 4]", "lora_config"),
        (changed("lora_weights", lambda t: setattr(t, "data_type", 8)), "lora_weights is INT32", "lora_weights"),
        (changed("lora_task_id", lambda t: setattr(t, "optional", False)), "is not optional", "lora_task_id"),
    ],
)
async def test_one_lora_input_is_wrong(config: Any, words: str, line: str) -> None:
    """Only the line of the one that is wrong is given."""
    found = await judged(model.lora_inputs, config)
    assert found.state is State.FAILED
    assert words in found.text
    assert [name for name in LORA_INPUTS if f'"{name}"' in found.fix] == [line]


@pytest.mark.parametrize(
    ("changes", "declared", "state", "words"),
    [
        ({}, "float16", State.OK, "FP16"),
        ({"dtype": "bfloat16"}, "bfloat16", State.OK, "BF16"),
        ({}, None, State.WARNING, "not declared"),
        ({}, "bfloat16", State.FAILED, "declared as bfloat16"),
        ({"lora_weights": "bf16"}, "float16", State.FAILED, "declared as float16"),
        ({"dtype": "float32"}, None, State.FAILED, "float16 or bfloat16 only"),
    ],
)
async def test_dtypes(changes: dict[str, Any], declared: str | None, state: State, words: str) -> None:
    """The model's and the declared one agree, contradict each other, or are not known."""
    found = await judged(model.dtype, config_of(**changes), EngineFacts(dtype=declared))
    assert (found.state, words in found.text) == (state, True)


async def test_bfloat16_in_the_python_backend() -> None:
    """Triton's Python backend cannot read such a tensor."""
    config = config_of(dtype="bfloat16")
    config.backend = "python"
    found = await judged(model.dtype, config, EngineFacts(dtype="bfloat16"))
    assert found.state is State.WARNING
    assert 'backend: "tensorrtllm"' in found.fix


async def test_a_model_without_a_batch_dimension() -> None:
    """Every tensor of ours has one."""
    found = await judged(model.batch, config_of(triton_max_batch_size=0))
    assert found == failed(found.text, "config.pbtxt: max_batch_size: 64")
    assert (await judged(model.batch, config_of(triton_max_batch_size=1))).state is State.OK


@pytest.mark.parametrize(
    ("groups", "caches"),
    [([], 1), ([(1, [])], 1), ([(4, [])], 4), ([(2, [0, 1])], 4), ([(1, [0]), (1, [1])], 2)],
)
async def test_instances_are_counted_with_their_devices(groups: list[tuple[int, list[int]]], caches: int) -> None:
    """Each instance on each device has a cache of its own."""
    config = config_of()
    del config.instance_group[:]
    for count, gpus in groups:
        config.instance_group.add(count=count, gpus=gpus)
    found = await judged(model.instances, config)
    assert found.state is (State.OK if caches == 1 else State.WARNING)
    if caches > 1:
        assert found.text.startswith(f"CACHES {caches}, not addressable")


@pytest.mark.parametrize(
    ("longest", "timeout_us", "seats", "state", "words"),
    [
        (0, 0, 64, State.OK, "no limit"),
        (64, 0, 64, State.OK, "max_queue_size 64"),
        (16, 0, 64, State.WARNING, "the engine has 64 seats"),
        (16, 0, None, State.OK, "max_queue_size 16"),
        (0, 2_000_000, 64, State.WARNING, "after 2 s"),
    ],
)
async def test_queues(longest: int, timeout_us: int, seats: int | None, state: State, words: str) -> None:
    """A queue shorter than the seats refuses what could run; a time-out of its own ends what may wait longer."""
    config = config_of()
    policy = config.dynamic_batching.default_queue_policy
    policy.max_queue_size, policy.default_timeout_microseconds = longest, timeout_us
    found = await judged(model.queue, config, EngineFacts(seats=seats))
    assert (found.state, words in found.text) == (state, True)


async def test_what_the_cache_holds_by_rank() -> None:
    """Figures worked out by hand in TensorRT-LLM's own terms: 23 pages of 45 MiB; rank 8 takes 1, rank 64 takes 8."""
    found = await judged(engine.cache, config_of(), facts_of())
    assert found == ok("23 host pages of 45 MiB: 23 of rank 8 or 2 of rank 64")


@pytest.mark.parametrize(
    ("pages", "state"), [(7, State.FAILED), (8, State.WARNING), (15, State.WARNING), (16, State.OK)]
)
async def test_small_caches(pages: int, state: State) -> None:
    """None of the largest rank fits, or only one, so that two adapters take turns; the value given would do."""
    found = await judged(engine.cache, config_of(), facts_of(host_pages=pages))
    assert found.state is state
    if state is not State.OK:
        wanted = int(found.fix.split('string_value: "')[1].split('"')[0])
        assert facts_of(host_bytes=wanted).host_pages_total == 64


async def test_what_the_cache_holds_of_the_served_adapters() -> None:
    """With adapters that are known their own pages count: all fit, some at once, or one does not fit at all."""

    def adapter(number: int, rank: int) -> Adapter:
        rows = tuple(engine.rows_of(facts_of(), rank, range(32)))
        return Adapter(f"{number:064x}", "llama", rows, "BF16")

    small, large = tuple(adapter(n, 8) for n in range(23)), adapter(99, 64)
    fits = await judged(engine.cache, config_of(), facts_of(), served=small)
    assert fits == ok("23 host pages of 45 MiB; the 23 served adapters take 23: all fit")
    turns = await judged(engine.cache, config_of(), facts_of(), served=(*small, large))
    assert turns.state is State.OK
    assert "at most 23 at once" in turns.text
    tight = await judged(engine.cache, config_of(), facts_of(host_pages=8), served=(large, adapter(98, 64)))
    assert tight.state is State.WARNING
    none = await judged(engine.cache, config_of(), facts_of(host_pages=7), served=(large,))
    assert none.state is State.FAILED
    assert "the largest alone 8" in none.text


async def test_an_engine_of_which_little_is_known() -> None:
    """What is missing is named, what is known too."""
    found = await judged(engine.engine, config_of(), EngineFacts(layers=32))
    assert found.state is State.WARNING
    assert found.text.startswith("max rank, modules not known")
    assert "known: 32 layers" in found.text


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("modules", [("attn_q",), ALL_LINEAR, ("attn_qkv", "attn_dense", "mlp_gate_up")])
def test_the_tiny_adapter_is_one_that_the_engine_takes(modules: tuple[str, ...], dtype: str) -> None:
    """Its rows pass the engine's own checks, on the first and last layer, and its B is zero."""
    shape = SHAPES["tiny"]
    dims = {name: (d.in_dim, d.out_dim) for name, d in module_dims(shape).items()}
    facts = EngineFacts(dtype=dtype, rank_max=4, layers=shape.layers, modules={name: dims[name] for name in modules})
    tiny = tiny_adapter(facts)
    assert tiny is not None
    config = np.frombuffer(tiny.config, np.int32).reshape(-1, 3)
    assert config[:, 1].tolist() == [layer for layer in (0, shape.layers - 1) for _ in modules]
    assert set(config[:, 2].tolist()) == {4}
    width = {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32}[dtype]
    weights = np.frombuffer(tiny.weights, width).reshape(tiny.shape)
    spec = EngineSpec(
        shape=shape, lora_modules=modules, max_lora_rank=4, max_input_tokens=64, max_seq_tokens=64, kv_blocks=64
    )
    check_adapter(Request(1, 1, 1, 7, tuple(EngineRow(*row) for row in config.tolist())), spec)
    for packed, (number, _, rank) in zip(weights, config.tolist(), strict=True):
        module = next(d for d in module_dims(shape).values() if d.module_id == number)
        assert packed[: rank * module.in_dim].all()
        assert not packed[rank * module.in_dim :].any()


def test_the_tiny_adapter_stays_tiny() -> None:
    """Whatever the model's size: on fewer layers, and at last on one module."""
    huge = EngineFacts(dtype="float16", rank_max=64, layers=80, modules={"moe_gate": (1 << 20, 1 << 21)})
    tiny = tiny_adapter(huge)
    assert tiny is not None
    assert tiny.shape[0] == 1
    usual = tiny_adapter(facts_of())
    assert usual is not None
    assert len(usual.weights) < BYTES_MAX
    assert usual.task_id("gRPC") != usual.task_id("shared memory")
    assert tiny_adapter(facts_of(layers=None)) is None


@pytest.mark.parametrize(
    ("usable", "store", "state"),
    [(8 << 30, 4 << 30, State.OK), (64 << 20, 4 << 30, State.WARNING), (1, None, State.OK)],
)
def test_room_in_shared_memory(usable: int, store: int | None, state: State) -> None:
    """Docker's 64 MB hold no store; the flag says what would."""
    found = room(usable, store)
    assert found.state is state
    assert ("--shm-size=5g" in found.fix) is (state is State.WARNING)


@pytest.mark.parametrize(("day", "state"), [(1, State.OK), (20, State.WARNING)])
def test_certificates_that_end_soon(day: int, state: State) -> None:
    """Two weeks before its end one is warned."""
    found = certificate_finding(
        {"notAfter": "Jan 31 00:00:00 2027 GMT"}, "TLSv1.3", False, datetime(2027, 1, day, tzinfo=UTC)
    )
    assert found.state is state
    assert "2027-01-31" in found.text


def test_an_engines_words_become_one_line() -> None:
    """A traceback says what matters at its end; the fault is read from all of it."""
    trace = "Traceback (most recent call last):\n  File x\nValueError: There are no done tasks to evict\n\n"
    answer = Answer(trace, 0.1)
    assert (answer.line, answer.fault) == ("ValueError: There are no done tasks to evict", Fault.FULL)
    assert len(Answer("x" * 1000, 0.1).line) == TEXT_MAX + 1
    assert Answer("no answer", 1.0, in_time=False).fault is Fault.NO_ANSWER


def test_the_worst_finding_is_the_result() -> None:
    """What was skipped counts for nothing: its cause does."""
    assert result_of([ok("a"), skipped("b")]) is State.OK
    assert result_of([ok("a"), warning("b"), skipped("c")]) is State.WARNING
    assert result_of([warning("a"), failed("b"), ok("c")]) is State.FAILED
    report = Report("trt-0", "triton://gpu:8001", [warning("a", "b", "c"), failed("d"), ok("e")])
    assert report.summary() == "1 failed, 1 warning, 1 ok"
    assert report.record()["findings"][0]["fix"] == ["b", "c"]


def test_checks_rest_on_earlier_ones_of_their_kind() -> None:
    """No check needs one that comes later or is not there, and each has a bound."""
    for kind in ("triton", "triton_llmapi"):
        before: set[str] = set()
        for step in (step for step in STEPS if step.kind in (None, kind)):
            assert set(step.needs) <= before, step.name
            assert step.name not in before
            assert step.limit_s > 0
            before.add(step.name)
