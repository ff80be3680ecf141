"""A step's time as a plane, by which a scheduler bounds a wait before the step has run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Times = Callable[[int, float], float]

BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
CONTEXTS = (256.0, 512.0, 1024.0, 1536.0, 2048.0, 3072.0, 4096.0)
PROMPTS = (1024.0, 2048.0, 4096.0)
"""The used range: batches, mean contexts, and prompts long enough for their length and not their number to matter."""


class Plane(NamedTuple):
    """A step's time in ns: a fixed part, and parts per decoding request, per token of context and per prompt token."""

    fixed_ns: float
    per_seat_ns: float
    per_context_token_ns: float
    per_prompt_token_ns: float

    def times(self, factor: float) -> Plane:
        """Return the plane with all parts multiplied by a factor."""
        return Plane(*(part * factor for part in self))

    def step_ns(self, seats: float, context_tokens: float, prompt_tokens: float = 0) -> float:
        """Return the time of a step that decodes `seats` requests with `context_tokens` tokens of context in all."""
        decoding_ns = self.per_seat_ns * seats + self.per_context_token_ns * context_tokens
        return self.fixed_ns + decoding_ns + self.per_prompt_token_ns * prompt_tokens


def plane_above(decode: Times, prefill: Times, kv_tokens: int) -> Plane:
    """Return the plane that touches a table from above, in the table's unit.

    It is the least-squares plane of the relative error over the used range, as far as the keys and values of a batch
    fit into `kv_tokens`, raised by the factor that puts it nowhere below a decode step of that range. So it
    overestimates where steps are curved most, by about a third for a GPU's measured steps. A prompt token costs its
    maximum over prompts of 1,024 to 4,096 tokens; shorter prompts may cost more per token if each prompt has a fixed
    cost.
    """
    points = [(batch, context) for batch in BATCHES for context in CONTEXTS if batch * context <= kv_tokens]
    points = points or [(batch, CONTEXTS[0]) for batch in BATCHES]
    terms = np.array([(1.0, batch, batch * context) for batch, context in points])
    times = np.array([decode(batch, context) for batch, context in points])
    parts = fit_above_zero(terms / times[:, None], np.ones(len(points)))
    fixed, seat, token = (float(part) for part in parts * np.max(times / (terms @ parts)))
    return Plane(fixed, seat, token, max((prefill(1, tokens) - fixed) / tokens for tokens in PROMPTS))


def fit_above_zero(terms: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return least-squares coefficients of which none is negative: a term that would be negative is left out."""
    kept = list(range(terms.shape[1]))
    result = np.zeros(terms.shape[1])
    while kept:
        found: Sequence[float] = np.linalg.lstsq(terms[:, kept], target, rcond=None)[0].tolist()
        if min(found) >= 0:
            result[kept] = found
            break
        del kept[found.index(min(found))]
    return result
