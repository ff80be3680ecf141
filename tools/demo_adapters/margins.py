"""Measure how safe the demo's answers are: the gap between the two best tokens, against changes by 16-bit rounding.

A greedy answer can be compared byte for byte only if no rounding can swap its two best tokens at any step. The exact
model (float32 base weights, unrounded scale · B · A) is compared with an engine's: base weights, A and scaled B, each
rounded to the engine's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sidecar.lab.demo.merged import Change, logits, merged_weights
from sidecar.lab.demo.model import base_weights
from sidecar.lab.engine.rounding import Float32, rounded
from sidecar.lab.engine.tokens import BOS
from sidecar.lab.engine.weights import Weights

REQUIRED = {"float16": 10.0, "bfloat16": 2.0}
"""The smallest margin allowed, in units of the largest logit change; above 2, rounding cannot change the best token."""


@dataclass(frozen=True)
class Margins:
    """The smallest gap between the two best logits over all steps, and the largest change of any logit by dtype."""

    top1_min: float
    logit_change_max: dict[str, float]

    def ratio(self, dtype: str) -> float:
        """Return how many times the largest change fits into the smallest gap."""
        return self.top1_min / self.logit_change_max[dtype]

    def too_small(self) -> list[str]:
        """Return the dtypes for which the answers are not safe."""
        return [dtype for dtype, required in REQUIRED.items() if self.ratio(dtype) < required]


def measured(adapter: list[Change], answers: Sequence[tuple[str, list[int]]]) -> Margins:
    """Return the margins of the (prompt, answer tokens) pairs, at every step of every answer."""
    exact = merged_weights(base_weights("float32"), adapter)
    expected = [_answer_logits(exact, prompt, answer) for prompt, answer in answers]
    best = [np.sort(rows, axis=-1)[:, -2:] for rows in expected]
    changes = {
        dtype: max(
            float(np.abs(_answer_logits(_engine_weights(adapter, dtype), prompt, answer) - rows).max())
            for (prompt, answer), rows in zip(answers, expected, strict=True)
        )
        for dtype in REQUIRED
    }
    return Margins(min(float((pair[:, 1] - pair[:, 0]).min()) for pair in best), changes)


def _engine_weights(adapter: list[Change], dtype: str) -> Weights:
    packed = [
        Change(one.name, rounded(one.A, dtype), rounded(one.B * np.float32(one.scale), dtype), 1.0) for one in adapter
    ]
    return merged_weights(base_weights(dtype), packed)


def _answer_logits(weights: Weights, prompt: str, answer: list[int]) -> Float32:
    """Return the logits [step, vocab] that produced each token of an answer."""
    before = [BOS, *prompt.encode()]
    return logits(weights, before + answer[:-1])[len(before) - 1 :]
