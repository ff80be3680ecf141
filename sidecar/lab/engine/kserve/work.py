"""One executor request on its way through the engine, and its progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from sidecar.lab.engine.kserve.generation import Generation
from sidecar.lab.engine.pages import Row

Parameter = bool | int | float | str


@dataclass(frozen=True)
class Progress:
    """The news of one request after an iteration: a token, its end, or the executor's error text.

    A cancelled request ends without an error. The end token itself is never delivered.
    """

    work: Work
    token: int | None = None
    final: bool = False
    error: str | None = None


@dataclass(eq=False)
class Work:
    """One executor request: its client's ids, its generation, where its progress goes, and what it has produced."""

    request_id: int
    triton_id: str
    model: str
    generation: Generation
    parameters: Mapping[str, Parameter]
    sink: Callable[[Progress], None]
    batch_row: int = 0
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    sent: int = 0
    """How many of its tokens are in responses; the executor may be ahead of them."""
    ended: bool = False
    arrival_ns: int = 0
    scheduled_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0
    brings_weights: bool = field(init=False)
    """True if the request carries its adapter."""

    def __post_init__(self) -> None:
        self.brings_weights = self.generation.lora is not None and self.generation.lora.weights is not None

    def drop_tensors(self) -> None:
        """Forget the adapter's tensors, which the engine has copied or measured: their memory may be the client's."""
        lora = self.generation.lora
        if lora is not None:
            self.generation = replace(self.generation, lora=replace(lora, weights=None, config=None))

    @property
    def task_id(self) -> int | None:
        """The adapter's id, or None for the base model."""
        return None if self.generation.lora is None else self.generation.lora.task_id

    @property
    def rows(self) -> tuple[Row, ...] | None:
        """The rows of its lora_config, if it has any."""
        lora = self.generation.lora
        if lora is None or lora.config is None:
            return None
        return tuple(Row(*row) for row in lora.config.tolist())
