"""One sequence in an emulated vLLM, or one load call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sidecar.lab.engine.http.work import TextWork
from sidecar.lab.engine.kserve.generation import Generation, LoraTensors
from sidecar.lab.engine.kserve.work import Progress
from sidecar.lab.engine.openai.adapters import Copy


@dataclass(eq=False, kw_only=True)
class SequenceWork(TextWork):
    """A sequence of a request. `copy` is its adapter."""

    copy: Copy | None = None

    @property
    def loaded(self) -> Copy | None:
        """The copy that a load call brings."""
        return self.copy

    @property
    def is_load(self) -> bool:
        """True for a load call."""
        return self.brings_weights


def load_call(number: int, copy: Copy, sink: Callable[[Progress], None]) -> SequenceWork:
    """Return the request that brings an adapter to the engine: its rows, and no token."""
    assert copy.adapter is not None
    rows = np.array([[row.module_id, row.layer, row.rank] for row in copy.adapter.rows], np.int32).reshape(-1, 3)
    lora = LoraTensors(copy.number, np.empty(0, np.float32), rows)
    return SequenceWork(
        request_id=number,
        triton_id=f"load-{copy.name}",
        model=copy.name,
        generation=Generation([], 0, None, lora),
        parameters={"lora_name": copy.name},
        sink=sink,
        copy=copy,
    )
