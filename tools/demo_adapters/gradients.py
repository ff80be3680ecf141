"""Compute loss and gradients of LoRA factors on the tiny Llama, without an autograd library.

Every operation returns its output and a function that maps the output's gradient to the input's. The base weights are
frozen; the backward functions store the factors' gradients in the factors. Arrays are float32, [sequence, token,
feature] unless stated otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sidecar.lab.engine.llama import NORM_EPSILON, Rotary, rotated
from sidecar.lab.engine.rounding import Float32
from sidecar.lab.engine.shape import ModelShape
from sidecar.lab.engine.weights import Weights

Key = tuple[int, str]
"""Layer and TensorRT-LLM module name."""

Backward = Callable[[Float32], Float32]


@dataclass
class Trainable:
    """One projection's factors A [rank, in] and B [out, rank], their fixed scale, and the last gradients of
    both.
    """

    A: Float32
    B: Float32
    scale: float
    gradients: tuple[Float32, Float32] = field(init=False)


@dataclass(frozen=True)
class Trainer:
    """The frozen model with trainable factors on some of its projections."""

    shape: ModelShape
    weights: Weights
    factors: dict[Key, Trainable]

    def loss(self, tokens: NDArray[np.intp], targets: NDArray[np.intp]) -> float:
        """Return the mean cross entropy, and store the factors' gradients in the factors.

        `tokens` and `targets` are [sequence, token]; a target below zero is not counted.
        """
        logits, backward = self._forward(tokens)
        shifted = logits - logits.max(axis=-1, keepdims=True)
        logs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        wanted = np.zeros_like(logs)
        np.put_along_axis(wanted, np.maximum(targets, 0)[..., None], np.float32(1), -1)
        share = (targets >= 0)[..., None] / np.float32((targets >= 0).sum())
        backward((np.exp(logs) - wanted) * share)
        return -float((logs * wanted * share).sum())

    def _forward(self, tokens: NDArray[np.intp]) -> tuple[Float32, Backward]:
        hidden = self.weights["embedding"][tokens]
        angles = Rotary(self.shape.head_size).of(np.arange(tokens.shape[1], dtype=np.intp))
        steps: list[Backward] = []
        for layer in range(self.shape.layers):
            hidden = self._attention(hidden, layer, angles, steps)
            hidden = self._feed_forward(hidden, layer, steps)
        normed, backward_norm = _norm(hidden, self.weights["norm"])
        head = self.weights["head"]

        def backward(gradient: Float32) -> Float32:
            result = backward_norm(gradient @ head)
            for step in reversed(steps):
                result = result + step(result)
            return result

        return normed @ head.T, backward

    def _project(self, inputs: Float32, layer: int, name: str) -> tuple[Float32, Backward]:
        W = self.weights[f"layers.{layer}.{name}"]
        pair = self.factors.get((layer, name))
        if pair is None:
            return inputs @ W.T, lambda gradient: gradient @ W
        narrow: Float32 = inputs @ pair.A.T
        output: Float32 = inputs @ W.T
        output += narrow @ pair.B.T * np.float32(pair.scale)

        def backward(gradient: Float32) -> Float32:
            scaled: Float32 = gradient * np.float32(pair.scale)
            for_narrow: Float32 = scaled @ pair.B
            pair.gradients = (_flat(for_narrow).T @ _flat(inputs), _flat(scaled).T @ _flat(narrow))
            return gradient @ W + for_narrow @ pair.A

        return output, backward

    def _feed_forward(self, hidden: Float32, layer: int, steps: list[Backward]) -> Float32:
        normed, backward_norm = _norm(hidden, self.weights[f"layers.{layer}.mlp_norm"])
        gate, backward_gate = self._project(normed, layer, "mlp_h_to_4h")
        up, backward_up = self._project(normed, layer, "mlp_gate")
        sigmoid = np.float32(0.5) + np.float32(0.5) * np.tanh(np.float32(0.5) * gate)
        down, backward_down = self._project(gate * sigmoid * up, layer, "mlp_4h_to_h")

        def backward(gradient: Float32) -> Float32:
            product = backward_down(gradient)
            slope = sigmoid * (1 + gate * (1 - sigmoid))
            return backward_norm(backward_gate(product * up * slope) + backward_up(product * gate * sigmoid))

        steps.append(backward)
        return hidden + down

    def _attention(
        self, hidden: Float32, layer: int, angles: tuple[Float32, Float32], steps: list[Backward]
    ) -> Float32:
        normed, backward_norm = _norm(hidden, self.weights[f"layers.{layer}.attn_norm"])
        queries, backward_queries = self._project(normed, layer, "attn_q")
        keys, backward_keys = self._project(normed, layer, "attn_k")
        values, backward_values = self._project(normed, layer, "attn_v")
        heads = [self._heads(rows) for rows in (queries, keys, values)]
        mixed, backward_mix = _mix(rotated(heads[0], angles), rotated(heads[1], angles), heads[2])
        output, backward_output = self._project(mixed.reshape(queries.shape), layer, "attn_dense")
        back = (angles[0], -angles[1])

        def backward(gradient: Float32) -> Float32:
            for_queries, for_keys, for_values = backward_mix(self._heads(backward_output(gradient)))
            return backward_norm(
                backward_queries(rotated(for_queries, back).reshape(queries.shape))
                + backward_keys(rotated(for_keys, back).reshape(keys.shape))
                + backward_values(for_values.reshape(values.shape))
            )

        steps.append(backward)
        return hidden + output

    def _heads(self, rows: Float32) -> Float32:
        return rows.reshape(*rows.shape[:-1], -1, self.shape.head_size)


def _flat(rows: Float32) -> Float32:
    return rows.reshape(-1, rows.shape[-1])


def _norm(hidden: Float32, weight: Float32) -> tuple[Float32, Backward]:
    inverse = 1 / np.sqrt(np.mean(np.square(hidden), axis=-1, keepdims=True) + NORM_EPSILON)

    def backward(gradient: Float32) -> Float32:
        weighted = gradient * weight
        along = np.mean(weighted * hidden, axis=-1, keepdims=True)
        result: Float32 = (weighted - hidden * (along * inverse**2)) * inverse
        return result

    return hidden * inverse * weight, backward


def _mix(
    queries: Float32, keys: Float32, values: Float32
) -> tuple[Float32, Callable[[Float32], tuple[Float32, Float32, Float32]]]:
    """Causal attention over [sequence, token, head, head size], keys and values with fewer heads."""
    kv_heads, size = keys.shape[2:]
    scale = np.float32(size**-0.5)

    def split(rows: Float32) -> Float32:
        """To [sequence, kv head, heads on it, token, head size]."""
        grouped = rows.reshape(*rows.shape[:2], kv_heads, -1, size)
        return grouped.transpose(0, 2, 3, 1, 4)

    def join(grouped: Float32) -> Float32:
        rows = grouped.transpose(0, 3, 1, 2, 4)
        return rows.reshape(*rows.shape[:2], -1, size)

    Q, K, V = split(queries), split(keys), split(values)
    count = queries.shape[1]
    ahead = np.triu(np.full((count, count), -1e30, np.float32), 1)
    scores = Q @ K.swapaxes(-1, -2) * scale + ahead
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares = powers / powers.sum(axis=-1, keepdims=True)

    def backward(gradient: Float32) -> tuple[Float32, Float32, Float32]:
        G = split(gradient)
        for_values = (shares.swapaxes(-1, -2) @ G).sum(axis=2, keepdims=True)
        for_shares = G @ V.swapaxes(-1, -2)
        for_scores = shares * (for_shares - (for_shares * shares).sum(axis=-1, keepdims=True)) * scale
        for_keys = (for_scores.swapaxes(-1, -2) @ Q).sum(axis=2, keepdims=True)
        return join(for_scores @ K), join(for_keys), join(for_values)

    return join(shares @ V), backward
