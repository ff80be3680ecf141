"""Grouped-query attention: over the cache for decoding rows, within itself for a prompt."""

from __future__ import annotations

import numpy as np

from sidecar.lab.engine.key_value import Group
from sidecar.lab.engine.rounding import Float32

_MASKED = np.float32(-1e30)
_QUERIES_AT_ONCE = 256
"""Bounds the score matrix of a long prompt: 256 queries by all keys."""


def attend_cached(group: Group, layer: int, queries: Float32, keys: Float32, values: Float32) -> Float32:
    """Write the group's new keys and values to its shelf and return its attention [row, head, head size].

    queries [row, head, head size]; keys and values [row, kv head, head size], of all rows of the step.
    """
    shelf_keys, shelf_values = group.shelf.keys[layer], group.shelf.values[layer]
    shelf_keys[group.seats, :, group.positions] = keys[group.rows]
    shelf_values[group.seats, :, group.positions] = values[group.rows]
    longest = int(group.positions.max()) + 1
    visible = np.arange(longest) <= group.positions[:, None]
    own = queries[group.rows]
    shared = own.reshape(len(own), keys.shape[1], -1, own.shape[-1])  # [row, kv head, queries on it, head size]
    scores = shared @ shelf_keys[group.seats, :, :longest].swapaxes(-1, -2)
    weights = _softmax(np.where(visible[:, None, None, :], scores, _MASKED), own.shape[-1])
    # A seat keeps what an earlier sequence left behind: NaN times a weight of zero would still be NaN.
    past = np.where(visible[:, None, :, None], shelf_values[group.seats, :, :longest], np.float32(0))
    return (weights @ past).reshape(own.shape)


def attend_prompt(queries: Float32, keys: Float32, values: Float32) -> Float32:
    """Return the causal attention [token, head, head size] of one prompt."""
    count, heads, size = queries.shape
    kv_heads = keys.shape[1]
    grouped = queries.reshape(count, kv_heads, heads // kv_heads, size).transpose(1, 2, 0, 3)
    by_head = keys.transpose(1, 2, 0)[:, None], values.transpose(1, 0, 2)[:, None]
    parts = [
        _causal_part(grouped[:, :, start : start + _QUERIES_AT_ONCE], start, *by_head)
        for start in range(0, count, _QUERIES_AT_ONCE)
    ]
    return np.concatenate(parts, axis=2).transpose(2, 0, 1, 3).reshape(count, heads, size)


def _causal_part(queries: Float32, start: int, keys: Float32, values: Float32) -> Float32:
    """Return the attention of the queries from `start` on: [kv head, queries on it, token, head size]."""
    stop = start + queries.shape[2]
    hidden = np.arange(stop) > np.arange(start, stop)[:, None]
    scores = np.where(hidden, _MASKED, queries @ keys[..., :stop])
    mixed: Float32 = _softmax(scores, queries.shape[-1]) @ values[:, :, :stop]
    return mixed


def _softmax(scores: Float32, head_size: int) -> Float32:
    scores = scores * np.float32(head_size**-0.5)
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights: Float32 = powers / powers.sum(axis=-1, keepdims=True)
    return weights
