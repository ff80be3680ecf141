"""The small Llama with vLLM's prefix cache, and with its CPU build's way to get mixed batches wrong.

A prompt whose first blocks are cached goes on from their keys and values, whoever computed them. Here they are computed
again and then overwritten, which costs time and gives the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidecar.lab.engine.key_value import Place
from sidecar.lab.engine.llama import Llama
from sidecar.lab.engine.openai.prefix import Owner, PrefixCache
from sidecar.lab.engine.packed import PackedAdapter
from sidecar.lab.engine.rounding import Float32
from sidecar.lab.engine.spec import EngineSpec
from sidecar.lab.engine.weights import Weights


@dataclass(eq=False)
class _Open:
    """A sequence: its tokens, whose its blocks are, and the cached blocks that it goes on from."""

    tokens: list[int]
    owner: Owner
    cached: list[NDArray[np.float32]]
    place: Place


class PrefixLlama(Llama):
    """A model whose sequences share blocks. A block is its keys and values [2, layer, kv head, token, head size]."""

    def __init__(self, spec: EngineSpec, weights: Weights, mixes: bool) -> None:
        super().__init__(spec.shape, weights)
        self.prefix: PrefixCache[NDArray[np.float32]] = PrefixCache(spec.tokens_per_block, spec.kv_blocks)
        self._mixes = mixes
        self._opened: dict[int, _Open] = {}
        self._reading: list[_Open] = []

    def open_for(self, request_id: int, tokens: Sequence[int], adapter: PackedAdapter | None, owner: Owner) -> None:
        """Add a sequence that begins with the tokens; what of them is cached for its owner is not computed."""
        self.open(request_id, tokens, adapter)
        cached = self.prefix.find(owner, tokens)
        self._opened[request_id] = _Open(list(tokens), owner, cached, self._sequences[request_id].place)

    def step_with(self, request_ids: Sequence[int], wishes: Mapping[int, Mapping[int, float]]) -> dict[int, int]:
        """Return the next token of each sequence, `wishes` added to its scores before the best one is taken."""
        self._reading = [self._opened[number] for number in request_ids if not self._opened[number].place.length]
        borrowed = self._borrow(request_ids) if self._mixes else []
        chosen = self.step(request_ids)
        for number in borrowed:
            self._sequences[number].adapter = None
        for number in request_ids:
            if wishes.get(number):
                chosen[number] = self._choose(number, wishes[number])
            opened = self._opened[number]
            if opened in self._reading:
                self._keep(opened)
            opened.tokens.append(chosen[number])
        return chosen

    def close(self, request_id: int) -> None:
        """Forget a sequence and keep its whole blocks."""
        opened = self._opened.pop(request_id, None)
        if opened is not None:
            self._keep(opened)
        super().close(request_id)

    def _choose(self, number: int, wishes: Mapping[int, float]) -> int:
        scores = self.logits_of(number).astype(np.float64)
        for token, size in wishes.items():
            scores[token] += size
        token = int(scores.argmax())
        self._sequences[number].pending = [token]
        return token

    def _borrow(self, request_ids: Sequence[int]) -> list[int]:
        """Give sequences of the base model the adapter of another in the step; returns whose must be taken back."""
        adapters = [self._sequences[number].adapter for number in request_ids]
        foreign = next((adapter for adapter in adapters if adapter is not None), None)
        bare = [number for number in request_ids if self._sequences[number].adapter is None]
        for number in bare:
            self._sequences[number].adapter = foreign
        return bare

    def _store(self, place: Place, layer: int, keys: Float32, values: Float32) -> None:  # type: ignore[override]
        """Put the cached blocks' keys and values in the place of a prompt's own, then write them to its seat."""
        opened = next(each for each in self._reading if each.place is place)
        size = self.prefix.tokens_per_block
        for number, (cached_keys, cached_values) in enumerate(opened.cached):
            span = slice(number * size, (number + 1) * size)
            keys[span] = cached_keys[layer].swapaxes(0, 1)
            values[span] = cached_values[layer].swapaxes(0, 1)
        super()._store(place, layer, keys, values)

    def _keep(self, opened: _Open) -> None:
        place, size = opened.place, self.prefix.tokens_per_block
        for number, key in self.prefix.missing(opened.owner, opened.tokens[: place.length]):
            span = slice(number * size, (number + 1) * size)
            parts: list[Any] = [array[:, place.seat, :, span] for array in (place.shelf.keys, place.shelf.values)]
            self.prefix.keep(key, np.stack(parts))
