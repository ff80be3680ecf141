"""The log of what an engine served: one JSON line for each executor request, written when it ends."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from sidecar.lab.engine.kserve.work import Parameter, Work

KEPT = 100_000


@dataclass(frozen=True)
class Served:
    """How one executor request ended. `sequence` counts the engine's requests from 1; `tokens` are output tokens.

    `outcome` is done, cancelled or error, with the executor's text in `error`. `instance` is the number of the model
    instance, from 0.
    """

    request_id: str
    sequence: int
    model: str
    task_id: int | None
    weights: bool
    tokens: int
    outcome: str
    error: str | None
    parameters: Mapping[str, Parameter]
    instance: int = 0


class ServedLog:
    """Keeps the last endings in memory and appends all of them to a file, if there is one."""

    def __init__(self, path: Path | None) -> None:
        self.last: deque[Served] = deque(maxlen=KEPT)
        self._file: TextIO | None = None if path is None else path.open("a", buffering=1, encoding="utf-8")

    def add(self, work: Work, outcome: str, error: str | None = None, instance: int = 0) -> None:
        """Note the end of a request."""
        served = Served(
            request_id=work.triton_id,
            sequence=work.request_id,
            model=work.model,
            task_id=work.task_id,
            weights=work.brings_weights,
            tokens=len(work.tokens),
            outcome=outcome,
            error=error,
            parameters=dict(work.parameters),
            instance=instance,
        )
        self.last.append(served)
        if self._file is not None:
            self._file.write(json.dumps(asdict(served)) + "\n")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
