"""From a cost file to what the core rests its promises on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from sidecar.core.facts import EngineFacts
from sidecar.core.pace import Pace
from sidecar.errors import Misused, Reason
from sidecar.journal import codec
from sidecar.pace.cost import A100_TABLE, LINEAR_TABLE, CostModel, StepBatch
from sidecar.pace.engine_pace import pace_from_cost
from sidecar.serve.pool import facts_of
from tests.kit.entries import entries

NAMED = "llama-3.1-8b/a100_sxm/trtllm"
FACTS = EngineFacts(seats=64, device_pages=16, modules={"attn_q": (64, 64), "attn_v": (64, 64)}, rank_max=16)


def test_a_name_and_a_path_are_the_same_file() -> None:
    """Ours are found by model, GPU and engine; any other by its path."""
    assert pace_from_cost(NAMED, FACTS) == pace_from_cost(str(A100_TABLE), FACTS)
    assert pace_from_cost("llama-3.1-8b/a100_sxm/vllm", FACTS) != pace_from_cost(NAMED, FACTS)


def test_no_step_takes_longer_than_the_pace_says() -> None:
    """With adapters in every seat, at any batch: promises rest on steps that are not undercut."""
    pace = pace_from_cost(NAMED, FACTS)
    model = CostModel.from_file(A100_TABLE, lora_rank=16)
    for batch in (1, 8, 64):
        for context in (512, 1024, 2048):
            step = StepBatch(0, 0, batch, batch * context, min(16, batch), batch, 2)
            assert model.step_ns(step) <= 1.02 * pace.step_ns(batch, batch * context)


def test_the_scale_multiplies_everything() -> None:
    """An engine that is emulated five times as fast has a fifth of every time."""
    whole, fifth = pace_from_cost(NAMED, FACTS), pace_from_cost(NAMED, FACTS, 0.2)
    for name in ("fixed_ns", "seat_ns", "context_token_ns", "prompt_token_ns"):
        assert getattr(fifth, name) == pytest.approx(getattr(whole, name) / 5, rel=1e-4)


def test_more_modules_take_longer() -> None:
    """What adapters add to a step is in the pace; where the engine's modules are not known, all that are usual."""
    every = pace_from_cost(NAMED, replace(FACTS, modules=None))
    assert every.fixed_ns > pace_from_cost(NAMED, FACTS).fixed_ns
    assert pace_from_cost(str(LINEAR_TABLE), EngineFacts()).fixed_ns > 0


@pytest.mark.parametrize(
    ("cost", "words"),
    [
        ("/nowhere/cost.json", "No such file"),
        ("gpt-5/a100_sxm/trtllm", "there is no cost_gpt-5_a100_sxm_trtllm.json"),
        ("llama-3.1-8b/a100_sxm", "No such file"),
    ],
)
def test_a_cost_that_is_not_there(cost: str, words: str) -> None:
    """The key, what was looked for and the way out."""
    with pytest.raises(Misused, match=words) as caught:
        pace_from_cost(cost, FACTS)
    assert caught.value.reason is Reason.CONFIG_INVALID
    assert caught.value.message.startswith("engine.cost: ")


def test_a_file_that_is_no_cost_file(tmp_path: Path) -> None:
    """What is wrong with it is said with its path."""
    file = tmp_path / "cost.json"
    file.write_text(json.dumps({"format": "something else"}))
    with pytest.raises(Misused, match=str(file)):
        pace_from_cost(str(file), FACTS)


def test_the_configuration_names_it() -> None:
    """`backends[].engine.cost` becomes a fact of that backend, and of no other."""
    engine = {"cost": NAMED, "cost_scale": 0.5, "seats": 64}
    facts = facts_of(entries({"url": "triton://a:1", "engine": engine}, {"url": "triton://b:1"}))
    assert facts["a:1"].pace == pace_from_cost(NAMED, EngineFacts(seats=64), 0.5)
    assert facts["b:1"].pace is None
    with pytest.raises(Misused, match="cost_scale"):
        entries({"url": "triton://a:1", "engine": {"cost": NAMED, "cost_scale": 0}})


def test_the_pace_is_journaled() -> None:
    """It is part of the facts that the core is told of, so a replay makes the same promises."""
    facts = EngineFacts(pace=Pace(1.5, 2.5, 3.5, 4.5))
    assert msgspec.json.decode(codec.dumps(facts), type=EngineFacts) == facts
