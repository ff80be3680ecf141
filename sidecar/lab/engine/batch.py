"""What an engine's planner hands to it: the next batch, and who it asks for it."""

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
    """An iteration: whose prompts it ends, what its step costs from, and how often it can be run again unchanged.

    `waited_ns` is the time until its adapters were on the device: part of its first run only.
    """

    context_ids: tuple[int, ...]
    step: StepBatch
    repeats: int
    waited_ns: int = 0

    def grow(self, steps: int) -> None:
        """So many steps have run: what decodes has longer contexts."""
        step = self.step
        self.step = step._replace(decoding_context_tokens=step.decoding_context_tokens + steps * step.decoding)


@dataclass(frozen=True)
class Use:
    """What the active requests and the adapter caches occupy now, and who waits beside the queue; for reports."""

    active: int
    waiting: int = 0
    paused: int = 0
    kv_blocks: int = 0
    host_pages: int = 0
    device_pages: int = 0
    host_evictions: int = 0
    device_evictions: int = 0


class Planning(Protocol):
    """Which requests run next. An engine asks for a batch, and tells when a step of it is over."""

    queue: WaitingQueue
    failures: list[Failure]
    fault: str | None

    def plan(self, now_ns: int) -> Batch | None:
        """The next batch, its adapters on the device; None when nothing can run until something changes."""

    def generation_ids(self) -> tuple[int, ...]:
        """Who decodes in the batch that was planned last."""

    def take_tokens(self, now_ns: int, ended: Collection[int]) -> tuple[Sequence[int], Sequence[Ending]]:
        """A step of that batch is over: who had their first token, and who their last one."""

    def steps_to_ending(self) -> int:
        """Steps of that batch up to the one with which its first request ends."""

    def skip(self, steps: int) -> None:
        """So many steps of that batch have run in which nothing but its lengths changed."""

    def is_active(self, request_id: int) -> bool:
        """Whether a request is here and no longer in the queue."""

    def drop(self, request_id: int, now_ns: int) -> bool:
        """End an active request without an ending; False when it is not active."""

    def prefetch(self, task_id: int, rows: tuple[Row, ...], payload: object | None) -> None:
        """Put an adapter into the host cache before any request; raises StoreError when there is no room."""

    def lose_idle_adapters(self) -> None:
        """Evict from the host cache every adapter that no request holds."""

    def drain_reads(self) -> list[int]:
        """Adapters that the last plan read from their files; none where requests bring them."""

    def has_adapter(self, task_id: int) -> bool:
        """Whether a request with this id alone would find its adapter."""

    def payload(self, task_id: int) -> object | None:
        """The weights that a task is computed with; None without any."""

    def generated(self, request_id: int) -> int:
        """Tokens that a request has; 0 when it is not active."""

    def progress(self) -> dict[int, int]:
        """Tokens of each active request by id."""

    def use(self) -> Use:
        """What is occupied now."""
