"""Make the demo's adapters and their expected answers: `python -m tools.demo_adapters.make_adapters`.

The script trains each adapter on its answers, writes it as PEFT files, reads it back, and checks what the demo relies
on: every answer is the intended one, the answers to a prompt all differ, and rounding cannot change any of them. If a
check fails, it ends with an error and writes no demo.json. It takes about three minutes on one core; set
OPENBLAS_NUM_THREADS=1, because more threads make it slower.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

from sidecar.lab.demo import merged, model
from sidecar.lab.demo.run import LEARNED, PROMPTS
from sidecar.lab.engine.tokens import ByteTokenizer
from tools.demo_adapters.lessons import Lessons
from tools.demo_adapters.margins import Margins, measured
from tools.demo_adapters.peft_files import write_adapter
from tools.demo_adapters.recipes import RECIPES
from tools.demo_adapters.training import learned_factors

BASE = "base"
SIZE_BYTES_MAX = 1_000_000

Answers = dict[str, list[list[int]]]
"""Answer tokens by adapter (and for the base model), in the order of the prompts."""


class NotSafe(Exception):
    """The trained adapters fail a check that the demo relies on."""


def main() -> None:
    """Make the adapters in the package's data folder."""
    make(model.DATA)


def make(data: Path) -> None:
    """Make adapters and answers below a folder. Raises NotSafe if a check fails."""
    folders = {name: data / "adapters" / name for name in sorted(RECIPES)}
    for seed, (name, folder) in enumerate(folders.items()):
        _train(name, folder, seed)
    answers = _answers(folders)
    check_answers(answers)
    margins = _margins(folders, answers)
    _check_sizes(data)
    (data / "demo.json").write_text(_text(_document(answers, margins)))


def _train(name: str, folder: Path, seed: int) -> None:
    recipe = RECIPES[name]

    def progress(step: int, loss: float) -> None:
        if step % 20 == 0 or step == recipe.steps:
            end = "\n" if step == recipe.steps else "\r"
            print(f"{name:8} step {step:4} of {recipe.steps}  loss {loss:.3f}", end=end, file=sys.stderr, flush=True)

    lessons = Lessons(name, recipe.made_up, seed)
    factors = learned_factors(recipe, model.SHAPE, model.base_weights(), lessons, seed, progress)
    write_adapter(folder, recipe, factors, model.SHAPE.name)


def _answers(folders: dict[str, Path]) -> Answers:
    models: dict[str, Path | None] = {BASE: None, **folders}
    return {
        name: [merged.greedy(folder, prompt, model.MAX_TOKENS) for prompt in PROMPTS] for name, folder in models.items()
    }


def check_answers(answers: Answers) -> None:
    """Raise NotSafe unless every adapter gives its learned answers and no two answers to a prompt are equal."""
    decode = ByteTokenizer().decode
    for name, texts in LEARNED.items():
        said = tuple(decode(tokens) for tokens in answers[name])
        if said != texts:
            raise NotSafe(f"{name} says {said}, not {texts}")
    for (name, one), (other, two) in itertools.combinations(answers.items(), 2):
        if any(first == second for first, second in zip(one, two, strict=True)):
            raise NotSafe(f"{name} and {other} give the same answer to a prompt")


def _margins(folders: dict[str, Path], answers: Answers) -> dict[str, Margins]:
    result = {}
    for name, tokens in answers.items():
        adapter = merged.changes(folders[name]) if name in folders else []
        result[name] = margins = measured(adapter, list(zip(PROMPTS, tokens, strict=True)))
        ratios = ", ".join(f"{margins.ratio(dtype):.0f}x {dtype}" for dtype in margins.logit_change_max)
        print(f"{name:8} smallest margin {margins.top1_min:.2f} = {ratios} rounding", file=sys.stderr)
        if margins.too_small():
            raise NotSafe(f"{name}: {margins} is too close for {margins.too_small()}")
    return result


def _check_sizes(data: Path) -> None:
    size_bytes = sum(path.stat().st_size for path in (data / "adapters").rglob("*.safetensors"))
    if size_bytes > SIZE_BYTES_MAX:
        raise NotSafe(f"the adapters have {size_bytes} bytes, more than {SIZE_BYTES_MAX}")


def _document(answers: Answers, margins: dict[str, Margins]) -> dict[str, Any]:
    decode = ByteTokenizer().decode
    return {
        "shape": model.SHAPE.name,
        "seed": model.SEED,
        "max_tokens": model.MAX_TOKENS,
        "prompts": list(PROMPTS),
        "answers": {name: [{"text": decode(tokens), "tokens": tokens} for tokens in answers[name]] for name in answers},
        "margins": {
            name: {"top1_min": one.top1_min, "logit_change_max": one.logit_change_max} for name, one in margins.items()
        },
    }


def _text(document: dict[str, Any]) -> str:
    """Return JSON with each list of numbers on one line."""
    text = json.dumps(document, indent=1)
    return re.sub(r"\[[\d,\s]+\]", lambda numbers: "[" + " ".join(numbers[0][1:-1].split()) + "]", text) + "\n"


if __name__ == "__main__":
    main()
