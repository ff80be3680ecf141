"""One sequence on its way through an emulated vLLM, or one load call, and what comes back from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from sidecar.lab.engine.kserve.generation import Generation, LoraTensors
from sidecar.lab.engine.kserve.work import Progress, Work
from sidecar.lab.engine.openai.adapters import Copy
from sidecar.lab.engine.openai.text import Said, Stops

LENGTH, STOP = "length", "stop"


@dataclass(frozen=True)
class Token(Progress):
    """A token that came out, with the text that it lets appear; the last one says why it is the last."""

    text: str = ""
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @property
    def asking(self) -> Asking:
        """The sequence whose token it is."""
        assert isinstance(self.work, Asking)
        return self.work

    @property
    def place(self) -> int:
        """The sequence's number among those of its request."""
        return self.asking.place


@dataclass(eq=False, kw_only=True)
class Asking(Work):
    """A sequence that was asked for. `place` is its number among those of its request, `copy` its adapter's."""

    copy: Copy | None = None
    stops: Stops = field(default_factory=Stops)
    bias: Mapping[int, float] = field(default_factory=dict)
    place: int = 0
    said: Said = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.said = Said(self.stops)

    @property
    def is_load(self) -> bool:
        """Whether this is a load call."""
        return self.brings_weights


def load_call(number: int, copy: Copy, sink: Callable[[Progress], None]) -> Asking:
    """Return the request that brings an adapter to the engine: its rows, and no token."""
    assert copy.adapter is not None
    rows = np.array([[row.module_id, row.layer, row.rank] for row in copy.adapter.rows], np.int32).reshape(-1, 3)
    lora = LoraTensors(copy.number, np.empty(0, np.float32), rows)
    return Asking(
        request_id=number,
        triton_id=f"load-{copy.name}",
        model=copy.name,
        generation=Generation([], 0, None, lora),
        parameters={"lora_name": copy.name},
        sink=sink,
        copy=copy,
    )
