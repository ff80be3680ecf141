"""A small real Llama in NumPy, with LoRA from packed rows, batched over sequences with different adapters.

Grouped-query attention, rotary positions, RMS norms, SwiGLU and a key-value cache; float32 arithmetic over weights
rounded to the engine's dtype. One step serves any mix of sequences: decoding ones contribute one row each, new ones all
rows of their prompt, and all rows are multiplied with the base weights at once. A sequence's answer does not depend on
the other sequences, up to the last bits of float32.

Rotary positions in the half-split form of Hugging Face checkpoints.

LoRA products for one step over rows of many adapters.

A step's rows are the decoding sequences, one row each, then the prompts, many rows each. Decoding rows take one product
over a stack of all adapters in the step, each row with its own factors; each prompt has enough rows for a product of
its own. A row never meets another row's factors, so an adapter of NaNs affects only itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sidecar.lab.engine.key_value import CachedSequence, Group, KeyValueCache, grouped
from sidecar.lab.engine.packed import PackedAdapter
from sidecar.lab.engine.rounding import Float32
from sidecar.lab.engine.shape import ModelShape
from sidecar.lab.engine.weights import Weights

Projection = tuple[int, str]
"""Layer and TensorRT-LLM module name."""


class Stack:
    """The factors of several adapters side by side, padded with zeros to the largest rank of each projection.

    `A[projection]` is [adapter, rank, in], `B[projection]` [adapter, rank, out] (B transposed).
    """

    def __init__(self, adapters: Sequence[PackedAdapter]) -> None:
        self.index = {adapter: position for position, adapter in enumerate(adapters)}
        self.A: dict[Projection, Float32] = {}
        self.B: dict[Projection, Float32] = {}
        for projection in dict.fromkeys(key for adapter in adapters for key in adapter.factors):
            self._add(projection, adapters)

    def _add(self, projection: Projection, adapters: Sequence[PackedAdapter]) -> None:
        present = {self.index[a]: a.factors[projection] for a in adapters if projection in a.factors}
        rank = max(pair.A.shape[0] for pair in present.values())
        sample = next(iter(present.values()))
        A = np.zeros((len(adapters), rank, sample.A.shape[1]), np.float32)
        B = np.zeros((len(adapters), rank, sample.B_transposed.shape[1]), np.float32)
        for position, pair in present.items():
            A[position, : pair.A.shape[0]] = pair.A
            B[position, : pair.A.shape[0]] = pair.B_transposed
        self.A[projection], self.B[projection] = A, B

    def holds(self, adapters: Sequence[PackedAdapter]) -> bool:
        """Return True if every one of the adapters is in the stack."""
        return all(adapter in self.index for adapter in adapters)


@dataclass(frozen=True)
class Prompt:
    """Rows of a step that belong to one prompt."""

    start: int
    stop: int
    adapter: PackedAdapter


@dataclass(frozen=True)
class StepAdapters:
    """The adapter of each row; `rows` and `members` pair decoding rows with stack positions."""

    stack: Stack
    rows: NDArray[np.intp]
    members: NDArray[np.intp]
    prompts: tuple[Prompt, ...]

    def add(self, output: Float32, inputs: Float32, projection: Projection) -> None:
        """Add B·A·input of each row's own adapter to its output; inputs [row, in], output [row, out]."""
        if self.rows.size and projection in self.stack.A:
            narrow = np.einsum("ni,nri->nr", inputs[self.rows], self.stack.A[projection][self.members])
            output[self.rows] += np.einsum("nr,nro->no", narrow, self.stack.B[projection][self.members])
        for prompt in self.prompts:
            pair = prompt.adapter.factors.get(projection)
            if pair is not None:
                rows = slice(prompt.start, prompt.stop)
                output[rows] += (inputs[rows] @ pair.A.T) @ pair.B_transposed


class AdapterRows:
    """Makes the `StepAdapters` of each step and reuses the last stack while it holds all adapters needed."""

    def __init__(self) -> None:
        self._stack = Stack(())

    def of(self, decoding: Sequence[PackedAdapter | None], prompts: Sequence[Prompt]) -> StepAdapters:
        """Return the adapters of a step whose first rows are the decoding sequences, in order."""
        used = [adapter for adapter in decoding if adapter is not None]
        distinct = tuple(dict.fromkeys(used))
        if not self._stack.holds(distinct):
            self._stack = Stack(distinct)
        return StepAdapters(
            stack=self._stack,
            rows=np.array([row for row, adapter in enumerate(decoding) if adapter is not None], np.intp),
            members=np.array([self._stack.index[adapter] for adapter in used], np.intp),
            prompts=tuple(prompts),
        )


BASE = 10000.0


class Rotary:
    """Sines and cosines for each position, computed when first needed."""

    def __init__(self, head_size: int) -> None:
        self._frequencies = BASE ** (-np.arange(0, head_size, 2) / head_size)
        self._cosines = self._sines = np.empty((0, 1, head_size // 2), np.float32)

    def of(self, positions: NDArray[np.intp]) -> tuple[Float32, Float32]:
        """Return cosines and sines [row, 1, head size / 2] for the rows' positions."""
        last = int(positions.max())
        if last >= len(self._cosines):
            angles = np.outer(np.arange(2 * last + 64), self._frequencies)[:, None, :]
            self._cosines, self._sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        return self._cosines[positions], self._sines[positions]


def rotated(heads: Float32, angles: tuple[Float32, Float32]) -> Float32:
    """Return [row, head, head size] with the two halves of each head rotated by the row's angles."""
    cosines, sines = angles
    first, second = np.split(heads, 2, axis=-1)
    return np.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1)


NORM_EPSILON = np.float32(1e-5)
_MASKED = np.float32(-1e30)
_QUERIES_AT_ONCE = 256
"""Bounds the score matrix of a long prompt: 256 queries by all keys."""


@dataclass(eq=False)
class _Sequence:
    """A sequence: the tokens that are not in its cache yet (the prompt, then the last token), and the last logits."""

    pending: list[int]
    adapter: PackedAdapter | None
    place: CachedSequence
    logits: Float32 | None = None


@dataclass(frozen=True)
class _Step:
    """The rows of one step: one for each decoding sequence, then those of each new prompt."""

    decoding: list[_Sequence]
    opening: list[_Sequence]
    spans: list[slice]
    groups: list[Group]
    adapters: StepAdapters
    positions: NDArray[np.intp]
    tokens: NDArray[np.intp]

    @property
    def sequences(self) -> list[_Sequence]:
        return self.decoding + self.opening

    def last_rows(self) -> NDArray[np.intp]:
        """Return the row of the newest token of each sequence, in the order of `sequences`."""
        return np.array([*range(len(self.decoding)), *(span.stop - 1 for span in self.spans)], np.intp)


class Llama:
    """A model and its running sequences. Not thread-safe."""

    def __init__(self, shape: ModelShape, weights: Weights) -> None:
        self.shape = shape
        self._weights = weights
        self._rotary = Rotary(shape.head_size)
        self._cache = KeyValueCache(shape)
        self._adapter_rows = AdapterRows()
        self._sequences: dict[int, _Sequence] = {}

    def open(self, request_id: int, tokens: Sequence[int], adapter: PackedAdapter | None) -> None:
        """Add a sequence that begins with the tokens; its first step reads them all.

        Raises ValueError for an id in use, no tokens, or a token outside the vocabulary.
        """
        if request_id in self._sequences:
            raise ValueError(f"request {request_id} is open already")
        if not tokens or min(tokens) < 0 or max(tokens) >= self.shape.vocab:
            raise ValueError(f"request {request_id}: expected one or more tokens below {self.shape.vocab}")
        place = self._cache.open(len(tokens))
        self._sequences[request_id] = _Sequence(list(tokens), adapter, place)

    def close(self, request_id: int) -> None:
        """Forget a sequence and free its cache; an unknown id is ignored."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._cache.close(sequence.place)

    def step(self, request_ids: Sequence[int]) -> dict[int, int]:
        """Return the next greedy token of each sequence, which also becomes its next input.

        All are computed in one pass over the weights. Raises KeyError for an id that is not open.
        """
        chosen = {request_id: self._sequences[request_id] for request_id in request_ids}
        if not chosen:
            return {}
        step = self._planned(list(chosen.values()))
        with np.errstate(over="ignore", invalid="ignore"):
            logits = self._forward(step)
        for sequence, row in zip(step.sequences, logits, strict=True):
            sequence.place.length += len(sequence.pending)
            sequence.logits = row
            sequence.pending = [int(row.argmax())]
        return {request_id: sequence.pending[0] for request_id, sequence in chosen.items()}

    def logits_of(self, request_id: int) -> Float32:
        """Return the logits [vocab] behind the sequence's last token. Raises ValueError before its first step."""
        logits = self._sequences[request_id].logits
        if logits is None:
            raise ValueError(f"request {request_id} has made no step yet")
        return logits

    def _planned(self, sequences: list[_Sequence]) -> _Step:
        decoding = [sequence for sequence in sequences if sequence.place.length]
        opening = [sequence for sequence in sequences if not sequence.place.length]
        for sequence in decoding:
            self._cache.extend(sequence.place)
        ends = len(decoding) + np.cumsum([len(sequence.pending) for sequence in opening], dtype=np.intp)
        spans = [slice(int(end) - len(s.pending), int(end)) for end, s in zip(ends, opening, strict=True)]
        starts = [sequence.place.length for sequence in decoding]
        return _Step(
            decoding=decoding,
            opening=opening,
            spans=spans,
            groups=grouped([sequence.place for sequence in decoding]),
            adapters=self._adapters(decoding, opening, spans),
            positions=np.array([*starts, *(i for s in opening for i in range(len(s.pending)))], np.intp),
            tokens=np.array([token for s in decoding + opening for token in s.pending], np.intp),
        )

    def _adapters(self, decoding: list[_Sequence], opening: list[_Sequence], spans: list[slice]) -> StepAdapters:
        prompts = [
            Prompt(span.start, span.stop, sequence.adapter)
            for span, sequence in zip(spans, opening, strict=True)
            if sequence.adapter is not None
        ]
        return self._adapter_rows.of([sequence.adapter for sequence in decoding], prompts)

    def _forward(self, step: _Step) -> Float32:
        """Return the logits [sequence, vocab] of the newest token of each sequence."""
        hidden = self._weights["embedding"][step.tokens]
        angles = self._rotary.of(step.positions)
        for layer in range(self.shape.layers):
            hidden += self._attention(step, layer, self._normed(hidden, f"layers.{layer}.attn_norm"), angles)
            hidden += self._feed_forward(step, layer, self._normed(hidden, f"layers.{layer}.mlp_norm"))
        logits: Float32 = self._normed(hidden[step.last_rows()], "norm") @ self._weights["head"].T
        return logits

    def _normed(self, hidden: Float32, name: str) -> Float32:
        mean_square = np.mean(np.square(hidden), axis=-1, keepdims=True)
        scaled: Float32 = hidden / np.sqrt(mean_square + NORM_EPSILON) * self._weights[name]
        return scaled

    def _project(self, step: _Step, layer: int, name: str, inputs: Float32) -> Float32:
        """Return the projection of all rows: the base weights for all, plus each row's adapter."""
        output: Float32 = inputs @ self._weights[f"layers.{layer}.{name}"].T
        step.adapters.add(output, inputs, (layer, name))
        return output

    def _feed_forward(self, step: _Step, layer: int, inputs: Float32) -> Float32:
        gate = self._project(step, layer, "mlp_h_to_4h", inputs)
        up = self._project(step, layer, "mlp_gate", inputs)
        # gate·sigmoid(gate), in a form that cannot overflow
        active = gate * (np.float32(0.5) + np.float32(0.5) * np.tanh(np.float32(0.5) * gate))
        return self._project(step, layer, "mlp_4h_to_h", active * up)

    def _attention(self, step: _Step, layer: int, inputs: Float32, angles: tuple[Float32, Float32]) -> Float32:
        queries = rotated(self._heads(self._project(step, layer, "attn_q", inputs)), angles)
        keys = rotated(self._heads(self._project(step, layer, "attn_k", inputs)), angles)
        values = self._heads(self._project(step, layer, "attn_v", inputs))
        mixed = np.empty_like(queries)
        for group in step.groups:
            mixed[group.rows] = attend_cached(group, layer, queries, keys, values)
        for span, sequence in zip(step.spans, step.opening, strict=True):
            self._store(sequence.place, layer, keys[span], values[span])
            mixed[span] = attend_prompt(queries[span], keys[span], values[span])
        return self._project(step, layer, "attn_dense", mixed.reshape(len(mixed), -1))

    def _heads(self, rows: Float32) -> Float32:
        return rows.reshape(len(rows), -1, self.shape.head_size)

    @staticmethod
    def _store(place: CachedSequence, layer: int, keys: Float32, values: Float32) -> None:
        """Write a prompt's keys and values [token, kv head, head size] to its seat."""
        count = len(keys)
        place.shelf.keys[layer, place.seat, :, :count] = keys.swapaxes(0, 1)
        place.shelf.values[layer, place.seat, :, :count] = values.swapaxes(0, 1)


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
    # A seat keeps values of an earlier sequence: NaN times a weight of zero would still be NaN.
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
