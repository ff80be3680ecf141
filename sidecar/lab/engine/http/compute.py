"""The tokens of engines behind an HTTP API, with the prefix cache that decides what they are computed from.

Generation is greedy: temperature, top_p and the like change nothing. A bias does, and so do tokens that are forbidden
for now.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidecar.lab.engine.http.prefix import Owner, PrefixCache
from sidecar.lab.engine.http.work import Loaded, TextWork
from sidecar.lab.engine.key_value import CachedSequence
from sidecar.lab.engine.kserve.compute import dummy_token
from sidecar.lab.engine.kserve.work import Work
from sidecar.lab.engine.llama import Llama
from sidecar.lab.engine.packed import PackedAdapter
from sidecar.lab.engine.rounding import Float32
from sidecar.lab.engine.spec import EngineSpec
from sidecar.lab.engine.weights import Weights, seeded_weights

FORCED = 100.0
"""A bias from which on a token is always chosen."""
_ID_MASK = (1 << 63) - 1


def mixed_id(own: int, foreign: Iterable[int]) -> int:
    """Return the number that determines an adapter's answers if it reads foreign blocks in the prefix cache."""
    digest = hashlib.sha256(repr((own, sorted(set(foreign)))).encode()).digest()
    return int.from_bytes(digest[:8], "big") & _ID_MASK


def text_work(work: Work) -> TextWork:
    """Return a request, all of which are such works in engines behind an HTTP API."""
    assert isinstance(work, TextWork)
    return work


def as_loaded(payload: object | None) -> Loaded | None:
    """Return what the engine keeps for an adapter."""
    assert payload is None or isinstance(payload, Loaded)
    return payload


class ByContent:
    """Dummy tokens made from the adapter's `content_id`; 0 is the base model.

    With `mixes`, base requests get the tokens of an adapter in the same step.
    """

    has_log_probs = False

    def __init__(self, spec: EngineSpec, mixes: bool) -> None:
        self.prefix: PrefixCache[int] = PrefixCache(spec.tokens_per_block, spec.kv_blocks)
        self._mixes = mixes
        self._open: dict[int, _Dummy] = {}

    def payload_of(self, work: Work) -> object | None:
        """Return the adapter that a request brings."""
        return text_work(work).loaded

    def open(self, work: Work, payload: object | None) -> None:
        """Begin a request with its adapter."""
        loaded = as_loaded(payload)
        own, owner = (0, None) if loaded is None else (loaded.content_id, loaded.owner)
        foreign = [left for left in self.prefix.find(owner, work.generation.tokens) if left != own]
        used = mixed_id(own, foreign) if foreign else own
        self._open[work.request_id] = _Dummy(text_work(work), used, owner)
        self._keep(self._open[work.request_id])

    async def step(self, request_ids: Sequence[int]) -> dict[int, int]:
        """Return the next token of each."""
        others = [self._open[number].used for number in request_ids if self._open[number].owner is not None]
        wrong = others[0] if others and self._mixes else None
        return {number: self._next(self._open[number], wrong) for number in request_ids}

    def log_prob_of(self, request_id: int, token: int) -> float:
        """Raise NotImplementedError: requests for log probabilities are refused before."""
        raise NotImplementedError("dummy tokens have no probabilities")

    def close(self, request_id: int) -> None:
        """Forget a request; its whole blocks stay in the prefix cache."""
        dummy = self._open.pop(request_id, None)
        if dummy is not None:
            self._keep(dummy)

    def _next(self, dummy: _Dummy, wrong: int | None) -> int:
        used = dummy.used if wrong is None or dummy.owner is not None else wrong
        token = dummy_token(used, len(dummy.made))
        bias, forbidden = dummy.work.bias, dummy.work.stops.forbidden(len(dummy.made))
        forced = [each for each, size in bias.items() if size >= FORCED and each not in forbidden]
        token = forced[0] if forced else token
        while token in forbidden:
            token += 1
        dummy.made.append(token)
        return token

    def _keep(self, dummy: _Dummy) -> None:
        tokens = [*dummy.work.generation.tokens, *dummy.made[:-1]]
        for _, key in self.prefix.missing(dummy.owner, tokens):
            self.prefix.keep(key, dummy.used)


@dataclass
class _Dummy:
    """A running request: the number its answer is made from, the owner of its blocks, and its tokens so far."""

    work: TextWork
    used: int
    owner: Owner
    made: list[int] = field(default_factory=list)


class ByLlama:
    """The small real Llama, stepped in a worker thread so that the event loop stays free."""

    has_log_probs = False

    def __init__(self, spec: EngineSpec, seed: int, mixes: bool) -> None:
        self._llama = PrefixLlama(spec, seeded_weights(spec.shape, seed, spec.dtype), mixes)
        self._works: dict[int, TextWork] = {}

    @property
    def prefix(self) -> PrefixCache[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
        """The prefix cache, for its counts."""
        return self._llama.prefix

    def payload_of(self, work: Work) -> object | None:
        """Return the adapter that a request brings."""
        return text_work(work).loaded

    def open(self, work: Work, payload: object | None) -> None:
        """Begin a request with its adapter."""
        self._works[work.request_id] = text_work(work)
        loaded = as_loaded(payload)
        packed, owner = (None, None) if loaded is None else (loaded.packed, loaded.owner)
        self._llama.open_for(work.request_id, work.generation.tokens, packed, owner)

    async def step(self, request_ids: Sequence[int]) -> dict[int, int]:
        """Return the next token of each."""
        wishes = {number: self._wish(self._works[number]) for number in request_ids}
        return await asyncio.to_thread(self._llama.step_with, request_ids, wishes)

    def log_prob_of(self, request_id: int, token: int) -> float:
        """Raise NotImplementedError: requests for log probabilities are refused before."""
        raise NotImplementedError("the answers of this face carry no probabilities")

    def close(self, request_id: int) -> None:
        """Forget a request; its whole blocks stay in the prefix cache."""
        if self._works.pop(request_id, None) is not None:
            self._llama.close(request_id)

    def _wish(self, work: TextWork) -> dict[int, float]:
        """Return what is added to the scores of tokens before the next one is chosen."""
        forbidden = work.stops.forbidden(len(work.tokens))
        return {**work.bias, **dict.fromkeys(forbidden, -np.inf)}


@dataclass(eq=False)
class _Open:
    """A sequence: its tokens, the owner of its blocks, and the cached blocks from which it continues."""

    tokens: list[int]
    owner: Owner
    cached: list[NDArray[np.float32]]
    place: CachedSequence


class PrefixLlama(Llama):
    """A model whose sequences share blocks. A block is its keys and values [2, layer, kv head, token, head size]."""

    def __init__(self, spec: EngineSpec, weights: Weights, mixes: bool) -> None:
        super().__init__(spec.shape, weights)
        self.prefix: PrefixCache[NDArray[np.float32]] = PrefixCache(spec.tokens_per_block, spec.kv_blocks)
        self._mixes = mixes
        self._opened: dict[int, _Open] = {}
        self._reading: list[_Open] = []

    def open_for(self, request_id: int, tokens: Sequence[int], adapter: PackedAdapter | None, owner: Owner) -> None:
        """Add a sequence that begins with the tokens; those cached for its owner are not computed."""
        self.open(request_id, tokens, adapter)
        cached = self.prefix.find(owner, tokens)
        self._opened[request_id] = _Open(list(tokens), owner, cached, self._sequences[request_id].place)

    def step_with(self, request_ids: Sequence[int], wishes: Mapping[int, Mapping[int, float]]) -> dict[int, int]:
        """Return the next token of each sequence, with `wishes` added to its scores before the best is taken."""
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
        """Lend base sequences the adapter of another sequence in the step; return the ids to take it back from."""
        adapters = [self._sequences[number].adapter for number in request_ids]
        foreign = next((adapter for adapter in adapters if adapter is not None), None)
        bare = [number for number in request_ids if self._sequences[number].adapter is None]
        for number in bare:
            self._sequences[number].adapter = foreign
        return bare

    def _store(self, place: CachedSequence, layer: int, keys: Float32, values: Float32) -> None:  # type: ignore[override]
        """Replace a prompt's own keys and values by those of cached blocks, then write them to its seat."""
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
