"""One sequence in an emulated vLLM, or one load call, and its progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from sidecar.lab.engine.kserve.generation import Generation, LoraTensors
from sidecar.lab.engine.kserve.work import Progress, Work
from sidecar.lab.engine.openai.adapters import Copy
from sidecar.lab.engine.openai.text import GeneratedText, Stops

LENGTH, STOP = "length", "stop"


@dataclass(frozen=True)
class Token(Progress):
    """A token with the text that it completes; the last one has the reason for the end."""

    text: str = ""
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @property
    def sequence(self) -> SequenceWork:
        """The sequence of the token."""
        assert isinstance(self.work, SequenceWork)
        return self.work

    @property
    def place(self) -> int:
        """The sequence's number in its request."""
        return self.sequence.place


@dataclass(eq=False, kw_only=True)
class SequenceWork(Work):
    """A sequence of a request. `place` is its number in the request, `copy` its adapter."""

    copy: Copy | None = None
    stops: Stops = field(default_factory=Stops)
    bias: Mapping[int, float] = field(default_factory=dict)
    place: int = 0
    output: GeneratedText = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.output = GeneratedText(self.stops)

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
