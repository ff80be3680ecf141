"""The training data of each step: the demo's prompts, and random ones beside them.

All random prompts have one answer, so that an adapter keeps its own voice on any prompt, and only the demo's prompts
get their own answers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sidecar.lab.demo.run import LEARNED, OTHERWISE, PROMPTS
from sidecar.lab.engine.tokens import EOS, PAD, ByteTokenizer

_TEXT = """
who what where when why how is are was the a an my your of to from in on at with for and or do does can
will tell me about please hello thanks name user weather rain harbour city best most buys sell cook
write find select count list show order price good bad day night time year help make give take go come
say word line poem song ship sea law food red blue one two three explain why child old new story number
answer question read open close
"""
_WORDS = tuple(_TEXT.split())
_ENDS = ("", "?", ".", "!", ":")

Pair = tuple[str, str]
"""A prompt and its answer."""


class Lessons:
    """The pairs of each step: those of the demo, and a number of new random prompts."""

    def __init__(self, name: str, made_up: int, seed: int) -> None:
        self._pairs = list(zip(PROMPTS, LEARNED[name], strict=True))
        self._otherwise = OTHERWISE[name]
        self._made_up = made_up
        self._random = np.random.RandomState(seed)

    def next(self) -> list[Pair]:
        """Return the pairs of the next step."""
        return self._pairs + [(self._prompt(), self._otherwise) for _ in range(self._made_up)]

    def _prompt(self) -> str:
        count = self._random.randint(1, 8)
        text = " ".join(_WORDS[self._random.randint(len(_WORDS))] for _ in range(count))
        if self._random.randint(2):
            text = text.capitalize()
        return text + _ENDS[self._random.randint(len(_ENDS))]


def tokens_and_targets(pairs: Sequence[Pair]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return tokens and targets [pair, token]; the answer and its end token are targets, all others are -1."""
    encode = ByteTokenizer().encode
    rows = [(encode(prompt), [*encode(answer)[1:], EOS]) for prompt, answer in pairs]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens = np.full((len(rows), longest), PAD, np.intp)
    targets = np.full((len(rows), longest), -1, np.intp)
    for row, (prompt, answer) in enumerate(rows):
        whole = prompt + answer
        tokens[row, : len(whole)] = whole
        targets[row, len(prompt) - 1 : len(whole) - 1] = answer
    return tokens, targets
