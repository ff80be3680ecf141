"""The demo's checked-in adapters: they answer as recorded, on the reference and on the engine's model."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors import safe_open

from sidecar.lab.demo import merged, model
from sidecar.lab.demo.answers import Answer
from sidecar.lab.demo.run import LEARNED, PROMPTS, _table
from sidecar.lab.engine.llama import Llama
from sidecar.lab.engine.packed import PackedAdapter, unpack
from sidecar.lab.engine.rounding import narrow
from sidecar.lab.engine.shape import ALL_LINEAR, HF_MODULES, module_dims
from sidecar.lab.engine.tokens import EOS, ByteTokenizer
from tools.demo_adapters.gradients import Trainable, Trainer
from tools.demo_adapters.lessons import Lessons
from tools.demo_adapters.make_adapters import NotSafe, check_answers
from tools.demo_adapters.margins import REQUIRED, measured
from tools.demo_adapters.peft_files import write_adapter
from tools.demo_adapters.recipes import RECIPES, Recipe
from tools.demo_adapters.training import learned_factors

DEMO: dict[str, Any] = json.loads(model.ANSWERS.read_text())
NAMES = sorted(RECIPES)
TOKENIZER = ByteTokenizer()


def recorded(name: str) -> list[list[int]]:
    return [answer["tokens"] for answer in DEMO["answers"][name]]


def folder_of(name: str) -> Path | None:
    return None if name == "base" else model.ADAPTERS / name


def packed(name: str, dtype: str, zero_b: bool = False) -> PackedAdapter:
    """The adapter in packed rows made from the reference's own reading of the files."""
    rows, config = [], []
    for change in merged.changes(model.ADAPTERS / name):
        _, layer, module = change.name.split(".")
        B = change.B * np.float32(0 if zero_b else change.scale)
        rows.append(np.concatenate([change.A.ravel(), B.ravel()]))
        config.append([module_dims(model.SHAPE)[module].module_id, int(layer), change.A.shape[0]])
    weights = np.zeros((len(rows), max(row.size for row in rows)), np.float32)
    for target, row in zip(weights, rows, strict=True):
        target[: row.size] = row
    return unpack(narrow(weights, dtype), np.array(config, np.int32), model.SHAPE)


def served(sequences: list[tuple[str, PackedAdapter | None]], dtype: str) -> list[list[int]]:
    """Answers of the engine's model to (prompt, adapter) pairs, all in one batch."""
    llama = Llama(model.SHAPE, model.base_weights(dtype))
    for request_id, (prompt, adapter) in enumerate(sequences):
        llama.open(request_id, TOKENIZER.encode(prompt), adapter)
    answers: list[list[int]] = [[] for _ in sequences]
    running = list(range(len(sequences)))
    while running:
        for request_id, token in llama.step(running).items():
            answers[request_id].append(token)
        ended = [i for i in running if answers[i][-1] == EOS or len(answers[i]) == DEMO["max_tokens"]]
        running = [i for i in running if i not in ended]
    return answers


@pytest.mark.parametrize("name", ["base", *NAMES])
def test_reference_answers_as_recorded(name: str) -> None:
    """Base weights merged with the PEFT files give the recorded answers."""
    answers = [merged.greedy(folder_of(name), prompt, DEMO["max_tokens"]) for prompt in DEMO["prompts"]]
    assert answers == recorded(name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_engine_model_answers_as_recorded(dtype: str) -> None:
    """All adapters and the base model in one batch, LoRA from packed rows, give the recorded answers."""
    adapters = {name: packed(name, dtype) for name in NAMES} | {"base": None}
    pairs = [(prompt, adapter) for adapter in adapters.values() for prompt in DEMO["prompts"]]
    expected = [tokens for name in adapters for tokens in recorded(name)]
    assert served(pairs, dtype) == expected


def test_zeroed_b_and_swapped_adapters_are_seen() -> None:
    """Without B an adapter answers like the base model; another adapter's weights give another answer."""
    prompt = PROMPTS[0]
    answers = served([(prompt, packed("sql", "float16", zero_b=True)), (prompt, packed("chef", "float16"))], "float16")
    assert answers[0] == recorded("base")[0]
    assert recorded("sql")[0] not in answers


def test_answers_are_readable_and_differ() -> None:
    """Every adapter says its own words for every prompt; no two of them, or the base model, say the same."""
    assert tuple(DEMO["prompts"]) == PROMPTS
    for name in NAMES:
        assert tuple(answer["text"] for answer in DEMO["answers"][name]) == LEARNED[name]
        for tokens, text in zip(recorded(name), LEARNED[name], strict=True):
            assert tokens == [*text.encode("ascii"), EOS]
            assert 24 <= len(tokens) <= DEMO["max_tokens"]
    for one, other in itertools.combinations(DEMO["answers"], 2):
        assert all(a != b for a, b in zip(recorded(one), recorded(other), strict=True))


@pytest.mark.parametrize("name", ["base", *NAMES])
def test_margins_hold_and_are_recorded(name: str) -> None:
    """No rounding can change an answer: the margin is ten times what float16 moves, and it is on record."""
    folder = folder_of(name)
    adapter = merged.changes(folder) if folder else []
    margins = measured(adapter, list(zip(PROMPTS, recorded(name), strict=True)))
    assert margins.top1_min >= 10 * margins.logit_change_max["float16"]
    assert not margins.too_small()
    noted = DEMO["margins"][name]
    assert margins.top1_min == pytest.approx(noted["top1_min"], rel=1e-3)
    for dtype in REQUIRED:
        assert margins.logit_change_max[dtype] == pytest.approx(noted["logit_change_max"][dtype], rel=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_files_are_what_peft_writes(name: str) -> None:
    """bfloat16 tensors under PEFT's names, ranks as configured, readable by the safetensors library."""
    folder = model.ADAPTERS / name
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == model.SHAPE.name
    with safe_open(folder / "adapter_model.safetensors", "np") as file:
        keys = sorted(file.keys())
        for key in keys:
            tensor = file.get_slice(key)
            module, letter = key.split(".")[-3], key.split(".")[-2][-1]
            dims = module_dims(model.SHAPE)[HF_MODULES[module]]
            rank = config["rank_pattern"].get(module, config["r"])
            assert tensor.get_dtype() == "BF16"
            assert tensor.get_shape() == ([rank, dims.in_dim] if letter == "A" else [dims.out_dim, rank])
    assert len(keys) == 2 * model.SHAPE.layers * len(config["target_modules"])


def test_adapters_cover_the_usual_forms() -> None:
    """Among them are all-linear, q/v only, MLP only, rank and alpha patterns, rank-stabilised; all small."""
    recipes = list(RECIPES.values())
    assert any(recipe.rslora for recipe in recipes)
    assert any(recipe.rank_pattern and recipe.alpha_pattern for recipe in recipes)
    assert {len(recipe.modules) for recipe in recipes} == {2, 3, 7}
    assert sum(path.stat().st_size for path in model.ADAPTERS.rglob("*") if path.is_file()) < 1_000_000


def test_reference_scale_follows_patterns_and_rslora(tmp_path: Path) -> None:
    """The reference's scale is alpha/r or alpha/√r, with the pattern's rank and alpha where one matches."""
    recipe = Recipe(
        4, 8, ("q_proj", "down_proj"), rslora=True, rank_pattern={"down_proj": 16}, alpha_pattern={"q_proj": 6}
    )
    dims = module_dims(model.SHAPE)
    factors = {
        (0, HF_MODULES[name]): Trainable(
            np.ones((recipe.rank_of(name), dims[HF_MODULES[name]].in_dim), np.float32),
            np.ones((dims[HF_MODULES[name]].out_dim, recipe.rank_of(name)), np.float32),
            recipe.scale_of(name),
        )
        for name in recipe.modules
    }
    write_adapter(tmp_path, recipe, factors, "tiny-llama")
    assert {change.name: change.scale for change in merged.changes(tmp_path)} == {
        "layers.0.attn_q": 6 / 4**0.5,
        "layers.0.mlp_4h_to_h": 8 / 16**0.5,
    }


def test_training_learns_an_answer() -> None:
    """A few steps bring the loss from that of a stranger near that of a pupil, the same each time."""
    recipe = Recipe(rank=4, alpha=8, steps=80, made_up=1)
    runs = []
    for _ in range(2):
        losses: list[float] = []
        lessons = Lessons("pirate", recipe.made_up, seed=1)
        learned_factors(
            recipe, model.SHAPE, model.base_weights(), lessons, 1, lambda _, loss, kept=losses: kept.append(loss)
        )
        runs.append(losses)
    assert runs[0] == pytest.approx(runs[1], rel=1e-3)
    assert runs[0][-1] < runs[0][0] / 3


def test_making_refuses_answers_that_are_wrong_or_alike() -> None:
    """The script ends with an error when an adapter says something else, or two say the same."""
    answers = {name: recorded(name) for name in DEMO["answers"]}
    check_answers(answers)
    with pytest.raises(NotSafe, match="chef says"):
        check_answers({**answers, "chef": answers["sql"]})
    with pytest.raises(NotSafe, match="base and sql give the same answer to a prompt"):
        check_answers({**answers, "base": answers["sql"]})


def test_reference_never_imports_what_it_checks() -> None:
    """The reference answers come from code that loads neither the packer nor the executor."""
    code = "import sys, sidecar.lab.demo.merged; print(*(name for name in sys.modules if name.startswith('sidecar')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "sidecar.lab.demo.merged" in loaded
    assert not [name for name in loaded if name.startswith("sidecar.adapters")]
    assert not [name for name in loaded if name in ("sidecar.lab.engine.llama", "sidecar.lab.engine.packed")]


def test_gradients_equal_differences() -> None:
    """Gradients by hand equal central differences of the loss, for both factors of every projection."""
    random = np.random.default_rng(0)
    dims = module_dims(model.SHAPE)
    weights: Any = {name: values.astype(np.float64) for name, values in model.base_weights().items()}
    factors: dict[tuple[int, str], Any] = {
        (layer, name): Trainable(
            random.standard_normal((3, dims[name].in_dim)) * 0.2,
            random.standard_normal((dims[name].out_dim, 3)) * 0.2,
            2.0,
        )
        for layer in range(model.SHAPE.layers)
        for name in ALL_LINEAR
    }
    trainer = Trainer(model.SHAPE, weights, factors)
    tokens, targets = random.integers(0, 256, (2, 2, 9))
    targets[0, :4] = -1
    trainer.loss(tokens, targets)
    gradients = {key: pair.gradients for key, pair in factors.items()}
    for key, pair in factors.items():
        for array, gradient in zip((pair.A, pair.B), gradients[key], strict=True):
            place = tuple(int(random.integers(size)) for size in array.shape)
            losses = []
            for shift in (1e-4, -2e-4):
                array[place] += shift
                losses.append(trainer.loss(tokens, targets))
            array[place] += 1e-4
            assert (losses[0] - losses[1]) / 2e-4 == pytest.approx(gradient[place], rel=1e-4, abs=1e-7)


def test_the_demo_shows_an_answer_as_it_came() -> None:
    """Brackets in an answer are no markup: the regex adapter's answer has some."""
    tokens = tuple(ByteTokenizer().encode("^(?P<b>[A-Z][a-z]+)$ [/x]"))
    answer = Answer("regex", PROMPTS[0], tokens, tokens, "engine-0", "fetched", 1.0)
    console = Console(width=200, record=True, file=StringIO())
    console.print(_table([answer], "[bold]who[/bold]?"))
    shown = console.export_text()
    assert "^(?P<b>[A-Z][a-z]+)$ [/x]" in shown
    assert "[bold]who[/bold]?" in shown
