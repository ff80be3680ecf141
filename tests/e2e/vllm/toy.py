"""The toy model, its adapters, and what the PEFT library answers with them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.vllm.installed import VllmInstalled
from tests.kit.peft_files import ALL_LINEAR, Dims, write_adapter

NAMES = [f"a{number:02}" for number in range(16)]
DIMS = Dims(hidden=256, layers=4, heads=8, kv_heads=4, head_size=32, ffn=688)
SIZE = 0.06
"""The standard deviation of A and B, at which different adapters give different answers."""
VOCABULARY = 4096
BASE_MODEL = "base"


@dataclass(frozen=True)
class Asked:
    """A question to PEFT: an adapter's folder (None: the base model), a prompt of token ids, how many to answer."""

    adapter: Path | None
    prompt: tuple[int, ...]
    tokens: int


class Toy:
    """The model's files in `folder/model`, the adapters' in `folder/adapters`, and a PEFT to ask."""

    def __init__(self, folder: Path, ffn: int = DIMS.ffn) -> None:
        self.folder = folder
        self._ffn = ffn
        self._installed = VllmInstalled.find()
        self._peft: subprocess.Popen[str] | None = None
        self._known: dict[Asked, list[int]] = {}

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def adapters(self) -> Path:
        """The folder of PEFT folders `a00` … `a15`."""
        return self.folder / "adapters"

    def make(self) -> None:
        """Make the files. Raises RuntimeError with what the script says."""
        command = self._installed.script("make_model.py", str(self.folder), str(self._ffn))
        made = subprocess.run(command, env=self._installed.environment(), capture_output=True, text=True, check=False)
        if made.returncode:
            raise RuntimeError(f"the toy model could not be made:\n{made.stderr}")

    def greedy(self, adapter: Path | None, prompt: Sequence[int], tokens: int) -> list[int]:
        """Return PEFT's greedy token ids; each question is computed once. `adapter` must not change afterwards."""
        asked = Asked(adapter, tuple(prompt), tokens)
        if asked not in self._known:
            self._known[asked] = self._ask(asked)
        return self._known[asked]

    def close(self) -> None:
        if self._peft is not None:
            self._peft.communicate()
            self._peft = None

    def _ask(self, asked: Asked) -> list[int]:
        if self._peft is None:
            self._peft = self._start()
        question = {
            "adapter": None if asked.adapter is None else str(asked.adapter),
            "prompt": asked.prompt,
            "tokens": asked.tokens,
        }
        assert self._peft.stdin is not None
        self._peft.stdin.write(json.dumps(question) + "\n")
        self._peft.stdin.flush()
        answer = self._line(self._peft)
        assert len(answer) == asked.tokens
        return list(answer)

    def _start(self) -> subprocess.Popen[str]:
        with (self.folder / "peft.log").open("w") as log:
            process = subprocess.Popen(
                self._installed.script("peft_answers.py", str(self.model)), env=self._installed.environment(),
                text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        assert self._line(process) == "ready"
        return process

    def _line(self, process: subprocess.Popen[str]) -> Any:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"PEFT gave up:\n{(self.folder / 'peft.log').read_text()}")
        return json.loads(line)


def write_version(folder: Path, seed: int, rank: int = 8, **options: Any) -> Path:
    """Write another adapter for the toy model: another seed, other answers."""
    fields = {"modules": ALL_LINEAR, "dtype": "float32", "size": SIZE, "alpha": 2 * rank} | options
    fields = {"shape": DIMS} | fields
    return write_adapter(folder, rank=rank, seed=seed, base_model_name_or_path=BASE_MODEL, **fields)


def prompt(seed: int, length: int) -> list[int]:
    """Return token ids that are the same everywhere; another seed, another prompt from its first token on."""
    return [
        2 + (seed * 7919 + position * position * 31 + position * 17) % (VOCABULARY - 2) for position in range(length)
    ]


def all_different(answers: Iterable[Sequence[int]]) -> bool:
    """Whether no two answers are equal: a test of who answered needs that."""
    told = [tuple(answer) for answer in answers]
    return len(set(told)) == len(told)
