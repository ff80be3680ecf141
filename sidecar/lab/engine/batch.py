"""The interface between an engine and its planner: the next batch, and what a planner can be asked."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from sidecar.lab.engine.messages import Ending, Failure
from sidecar.lab.engine.pages import Row
from sidecar.lab.engine.waiting import WaitingQueue
from sidecar.pace.cost import StepBatch


@dataclass(slots=True, eq=False)
class Batch:
    """An iteration: the requests whose prompts it ends, the work its step costs, and how often it repeats unchanged.

    `waited_ns` is the time until its adapters were on the device; it belongs to the first run only.
    """

    context_ids: tuple[int, ...]
    step: StepBatch
    repeats: int
    waited_ns: int = 0

    def grow(self, steps: int) -> None:
        """Note that `steps` steps have run: the decoding contexts are longer."""
        step = self.step
        self.step = step._replace(decoding_context_tokens=step.decoding_context_tokens + steps * step.decoding)


@dataclass(frozen=True)
class Use:
    """What the active requests and the adapter caches occupy now, for reports.

    `known` adapters are kept in host memory outside the caches, in `known_bytes`.
    """

    active: int
    waiting: int = 0
    paused: int = 0
    kv_blocks: int = 0
    host_pages: int = 0
    device_pages: int = 0
    host_evictions: int = 0
    device_evictions: int = 0
    known: int = 0
    known_bytes: int = 0


class Planning(Protocol):
    """Decides which requests run next. An engine asks for a batch, and reports when a step of it is over.

    `died` is why the engine's loop has ended; nothing is planned then, and nobody is told.
    """

    queue: WaitingQueue
    failures: list[Failure]
    fault: str | None
    died: str | None

    def plan(self, now_ns: int) -> Batch | None:
        """Return the next batch with its adapters on the device; None if nothing can run until something changes."""

    def generation_ids(self) -> tuple[int, ...]:
        """Return the ids of the requests that decode in the last planned batch."""

    def take_tokens(self, now_ns: int, ended: Collection[int]) -> tuple[Sequence[int], Sequence[Ending]]:
        """Account for a step of that batch; return (ids with their first token, endings)."""

    def steps_to_ending(self) -> int:
        """Return the number of steps of that batch up to the first ending."""

    def skip(self, steps: int) -> None:
        """Account for steps of that batch in which only lengths changed."""

    def is_active(self, request_id: int) -> bool:
        """Return True if a request was fetched and has not ended."""

    def drop(self, request_id: int, now_ns: int) -> bool:
        """End an active request without an ending; return False if it is not active."""

    def prefetch(self, task_id: int, rows: tuple[Row, ...], payload: object | None) -> None:
        """Put an adapter into the host cache before any request. Raises StoreError if it does not fit."""

    def lose_idle_adapters(self) -> None:
        """Evict from the host cache every adapter that no request holds."""

    def remove_adapter(self, task_id: int) -> bool:
        """Remove an adapter from the engine's memory; return False if it is not there, or the engine cannot."""

    def drain_reads(self) -> list[int]:
        """Return the adapters that the last plan read from files; none if requests bring them."""

    def has_adapter(self, task_id: int) -> bool:
        """Return True if a request with this id alone would find its adapter."""

    def payload(self, task_id: int) -> object | None:
        """Return the weights that a task is computed with, or None."""

    def generated(self, request_id: int) -> int:
        """Return how many tokens a request has; 0 if it is not active."""

    def progress(self) -> dict[int, int]:
        """Return the tokens of each active request by id."""

    def use(self) -> Use:
        """Return what is occupied now."""
