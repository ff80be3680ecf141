"""Train one demo adapter on its answers: Adam over the factors of a recipe, with the base model frozen."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sidecar.lab.engine.rounding import Float32
from sidecar.lab.engine.shape import HF_MODULES, ModelShape, module_dims
from sidecar.lab.engine.weights import Weights
from tools.demo_adapters.gradients import Key, Trainable, Trainer
from tools.demo_adapters.lessons import Lessons, tokens_and_targets
from tools.demo_adapters.recipes import Recipe

PEAK_RATE = 0.01
_FADING, _FADING_SQUARE = 0.9, 0.99

Progress = Callable[[int, float], None]
"""Takes the number of steps done and the loss."""


def learned_factors(
    recipe: Recipe,
    shape: ModelShape,
    weights: Weights,
    lessons: Lessons,
    seed: int,
    progress: Progress,
) -> dict[Key, Trainable]:
    """Return factors with which the model gives the answers of the lessons."""
    factors = _initial(recipe, shape, np.random.RandomState(seed))
    trainer = Trainer(shape, weights, factors)
    optimizer = _Adam(factors)
    for step in range(recipe.steps):
        loss = trainer.loss(*tokens_and_targets(lessons.next()))
        optimizer.update(_rate(step, recipe.steps))
        progress(step + 1, loss)
    return factors


def _initial(recipe: Recipe, shape: ModelShape, random: np.random.RandomState) -> dict[Key, Trainable]:
    """Return random A and zero B, as PEFT begins."""
    dims = module_dims(shape)
    factors: dict[Key, Trainable] = {}
    for layer in range(shape.layers):
        for module in recipe.modules:
            size, rank = dims[HF_MODULES[module]], recipe.rank_of(module)
            A = (random.random_sample((rank, size.in_dim)) * 2 - 1) * size.in_dim**-0.5
            B = np.zeros((size.out_dim, rank), np.float32)
            factors[layer, size.name] = Trainable(A.astype(np.float32), B, recipe.scale_of(module))
    return factors


def _rate(step: int, steps: int) -> float:
    """Return the learning rate: a short rise, then half a cosine down to zero."""
    rise = min(1.0, (step + 1) / 20)
    return PEAK_RATE * rise * 0.5 * (1 + float(np.cos(np.pi * step / steps)))


class _Adam:
    """Adam (Kingma and Ba, 2014) over both factors of every projection."""

    def __init__(self, factors: dict[Key, Trainable]) -> None:
        self._factors = factors
        self._step = 0
        self._moments = [
            (np.zeros_like(array), np.zeros_like(array)) for pair in factors.values() for array in (pair.A, pair.B)
        ]

    def update(self, rate: float) -> None:
        """Update every factor in place, along the gradients of the last loss."""
        self._step += 1
        arrays = [
            entry for pair in self._factors.values() for entry in zip((pair.A, pair.B), pair.gradients, strict=True)
        ]
        for (array, gradient), (mean, square) in zip(arrays, self._moments, strict=True):
            self._move(array, gradient, mean, square, rate)

    def _move(self, array: Float32, gradient: Float32, mean: Float32, square: Float32, rate: float) -> None:
        mean += (1 - _FADING) * (gradient - mean)
        square += (1 - _FADING_SQUARE) * (np.square(gradient) - square)
        mean_now = mean / (1 - _FADING**self._step)
        square_now = square / (1 - _FADING_SQUARE**self._step)
        array -= (rate * mean_now / (np.sqrt(square_now) + 1e-8)).astype(np.float32)
