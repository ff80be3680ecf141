"""The base model of the emulated engine: Llama weights made from a seed.

The output head reads the embedding of each token's *predecessor* in a seeded permutation, so that the model clearly
prefers one next token. Purely random weights make the two best logits differ by no more than float16 rounding, so that
no answer could be checked byte for byte.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sidecar.lab.engine.rounding import Float32, rounded
from sidecar.lab.engine.shape import ALL_LINEAR, ModelShape, module_dims

Weights = dict[str, Float32]
"""Tensors by name: `embedding` and `head` [vocab, hidden], `norm` [hidden], and for each layer `layers.N.attn_norm`,
`layers.N.mlp_norm` [hidden] and `layers.N.<module>` [out, in] for each module of `ALL_LINEAR`: SiLU is applied to
`mlp_h_to_4h`, which `mlp_gate` is multiplied with."""

_PRINTABLE = range(32, 127)


def seeded_weights(shape: ModelShape, seed: int, dtype: str) -> Weights:
    """Return the weights of a model for a seed: float32 arrays of values that the engine dtype can hold.

    They are equal on every machine and NumPy version: uniform numbers of the frozen legacy generator, no logarithms.
    Raises ValueError for an unknown dtype.
    """
    random = np.random.RandomState(seed)
    weights: Weights = {"embedding": _uniform(random, shape.vocab, shape.hidden, 1.0)}
    weights["head"] = _head(weights["embedding"], random)
    weights["norm"] = np.ones(shape.hidden, np.float32)
    for layer in range(shape.layers):
        _add_layer(weights, shape, layer, random)
    return {name: rounded(values, dtype) for name, values in weights.items()}


def _add_layer(weights: Weights, shape: ModelShape, layer: int, random: np.random.RandomState) -> None:
    dims = module_dims(shape)
    for norm in ("attn_norm", "mlp_norm"):
        weights[f"layers.{layer}.{norm}"] = np.ones(shape.hidden, np.float32)
    for name in ALL_LINEAR:
        size = dims[name]
        weights[f"layers.{layer}.{name}"] = _uniform(random, size.out_dim, size.in_dim, size.in_dim**-0.5)


def _uniform(random: np.random.RandomState, rows: int, columns: int, deviation: float) -> Float32:
    """Return uniform numbers around zero with the given standard deviation."""
    return ((random.random_sample((rows, columns)) - 0.5) * (12**0.5 * deviation)).astype(np.float32)


def _head(embedding: Float32, random: np.random.RandomState) -> Float32:
    vocabulary, hidden = embedding.shape
    return embedding[_predecessors(vocabulary, random)] * np.float32(hidden**-0.5)


def _predecessors(vocabulary: int, random: np.random.RandomState) -> NDArray[np.int64]:
    """Return a permutation that maps printable bytes to printable bytes, so that the model's output is readable."""
    result = np.zeros(vocabulary, np.int64)
    printable = np.array([token for token in _PRINTABLE if token < vocabulary], np.int64)
    others = np.setdiff1d(np.arange(vocabulary), printable)
    for group in (printable, others):
        result[group] = group[_shuffled(len(group), random)]
    return result


def _shuffled(count: int, random: np.random.RandomState) -> NDArray[np.int64]:
    return np.argsort(random.random_sample(count), kind="stable")
