"""The sources of tokens: the real executor in a thread, or numbers that cost nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from sidecar.lab.engine.kserve.adapters import packed_of
from sidecar.lab.engine.kserve.work import Work
from sidecar.lab.engine.llama import Llama
from sidecar.lab.engine.packed import PackedAdapter
from sidecar.lab.engine.spec import EngineSpec
from sidecar.lab.engine.weights import seeded_weights

_LETTERS = 26
_FIRST_LETTER = ord("a")
_MIX = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class Compute(Protocol):
    """Makes one token for each scheduled request. `has_log_probs` tells whether `log_prob_of` works."""

    has_log_probs: bool

    def payload_of(self, work: Work) -> object | None:
        """Return what the host cache keeps for the request's weights; None keeps sizes only."""

    def open(self, work: Work, payload: object | None) -> None:
        """Begin a request with what the host cache holds for its adapter."""

    async def step(self, request_ids: Sequence[int]) -> dict[int, int]:
        """Return the next token of each request."""

    def log_prob_of(self, request_id: int, token: int) -> float:
        """Return the natural logarithm of the probability that the request's last step gave a token."""

    def close(self, request_id: int) -> None:
        """Forget a request; one that was never opened is ignored."""


def dummy_token(task_id: int, position: int) -> int:
    """Return the letter that `DummyCompute` gives an adapter (0: the base model) at a position of its answer."""
    mixed = ((task_id + 1) * _MIX + position * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 31)) * 0x94D049BB133111EB) & _MASK
    return _FIRST_LETTER + (mixed >> 33) % _LETTERS


class DummyCompute:
    """Tokens derived from the task id and the position, so that answers of different adapters differ."""

    has_log_probs = False

    def __init__(self) -> None:
        self._open: dict[int, tuple[int, int]] = {}

    def payload_of(self, work: Work) -> object | None:
        return None

    def open(self, work: Work, payload: object | None) -> None:
        self._open[work.request_id] = (work.task_id or 0, 0)

    async def step(self, request_ids: Sequence[int]) -> dict[int, int]:
        tokens: dict[int, int] = {}
        for request_id in request_ids:
            task_id, position = self._open[request_id]
            tokens[request_id] = dummy_token(task_id, position)
            self._open[request_id] = (task_id, position + 1)
        return tokens

    def log_prob_of(self, request_id: int, token: int) -> float:
        raise NotImplementedError("dummy tokens have no probabilities")

    def close(self, request_id: int) -> None:
        self._open.pop(request_id, None)


class LlamaCompute:
    """The small real Llama, stepped in a worker thread so that the event loop stays free."""

    has_log_probs = True

    def __init__(self, spec: EngineSpec, seed: int) -> None:
        self._spec = spec
        self._llama = Llama(spec.shape, seeded_weights(spec.shape, seed, spec.dtype))

    def payload_of(self, work: Work) -> object | None:
        lora = work.generation.lora
        return None if lora is None else packed_of(lora, self._spec)

    def open(self, work: Work, payload: object | None) -> None:
        assert payload is None or isinstance(payload, PackedAdapter)
        self._llama.open(work.request_id, work.generation.tokens, payload)

    async def step(self, request_ids: Sequence[int]) -> dict[int, int]:
        return await asyncio.to_thread(self._llama.step, request_ids)

    def log_prob_of(self, request_id: int, token: int) -> float:
        logits = self._llama.logits_of(request_id).astype(np.float64)
        return float(logits[token] - logits.max() - np.log(np.exp(logits - logits.max()).sum()))

    def close(self, request_id: int) -> None:
        self._llama.close(request_id)


class BaseOnly:
    """Another compute without its adapters: they are unpacked, kept and found as usual, but change nothing."""

    def __init__(self, compute: Compute) -> None:
        self.has_log_probs = compute.has_log_probs
        self._compute = compute

    def payload_of(self, work: Work) -> object | None:
        return self._compute.payload_of(work)

    def open(self, work: Work, payload: object | None) -> None:
        self._compute.open(replace(work, generation=replace(work.generation, lora=None)), None)

    async def step(self, request_ids: Sequence[int]) -> dict[int, int]:
        return await self._compute.step(request_ids)

    def log_prob_of(self, request_id: int, token: int) -> float:
        return self._compute.log_prob_of(request_id, token)

    def close(self, request_id: int) -> None:
        self._compute.close(request_id)
