"""LoRA products for one step over rows of many adapters.

A step's rows are the decoding sequences, one row each, then the prompts, many rows each. Decoding rows take one product
over a stack of all adapters in the step, each row with its own factors; each prompt has enough rows for a product of
its own. A row never meets another row's factors, so an adapter of NaNs affects only itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sidecar.lab.engine.packed import PackedAdapter
from sidecar.lab.engine.rounding import Float32

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
