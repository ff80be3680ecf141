"""The kinds of engine by scheduler name, each with a plain and an incremental way of planning.

vLLM V1's scheduler, planned anew from all requests for each step (`v1/core/sched/scheduler.py`).

1. Running requests in order, each with the rest of its context or one token. One that lacks KV blocks takes those of
   the last running request, which returns to the head of the queue and is computed again; it takes its own if it is
   the last.
2. Unless a request lost its blocks, waiting requests in order. One whose adapter would be one too many beside those of
   the running ones is passed over; a lack of seats, of the step's tokens or of KV blocks ends the walk.

A context that exceeds the remaining tokens continues in the next step. Blocks are taken for what a step computes;
nothing is reserved.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

from sidecar.lab.engine.batch import Batch, Planning
from sidecar.lab.engine.messages import Ending
from sidecar.lab.engine.planner import Planner
from sidecar.lab.engine.roster import Roster
from sidecar.lab.engine.spec import (
    GUARANTEED_NO_EVICT,
    MAX_REQUESTS,
    MAX_UTILIZATION,
    STATIC_BATCH,
    STRICT_FIFO,
    TRTLLM_PYTORCH,
    VLLM,
    EngineSpec,
)
from sidecar.lab.engine.torch_backend import TorchPlanner, TorchRoster
from sidecar.lab.engine.vllm import Sequence, VllmIntake
from sidecar.lab.engine.vllm_roster import VllmRoster
from sidecar.pace.cost import StepBatch, StepCost


class VllmPlanner(VllmIntake):
    """The plain planner, which `VllmRoster` must equal."""

    def __init__(self, spec: EngineSpec, cost: StepCost) -> None:
        super().__init__(spec, cost)
        self._running: list[Sequence] = []
        self._waiting: list[Sequence] = []
        self._chunks: list[tuple[Sequence, int]] = []
        self._front = 0
        self._in_use: set[int] = set()

    def plan(self, now_ns: int) -> Batch | None:
        """Return the next step with its adapters on the GPU; None if nothing can run until something changes."""
        # Adapters without users can be evicted by the loads that follow.
        still = self._in_use & {sequence.task_id for sequence in self._running}
        self._slots.change([], sorted(self._in_use - still))
        self._in_use = still
        self._fetch()
        self._fail_all()
        budget = self._schedule_running()
        if budget is not None:
            self._schedule_waiting(budget)
        if not self._chunks and not self._loading:
            return None
        # The adapters of all running sequences, including those that got none of the step's tokens.
        in_use = {sequence.task_id for sequence in self._running if sequence.task_id is not None}
        moved = self._change(sorted(in_use - self._in_use), sorted(self._in_use - in_use))
        self._in_use = in_use
        return Batch(self._completing(), self._step(), 0, self._loading_ns + self._moved_ns(moved))

    def generation_ids(self) -> tuple[int, ...]:
        """Return the ids of the requests that decode in the last planned step."""
        return tuple(sequence.request_id for sequence, _ in self._chunks if sequence.is_decoding)

    def take_tokens(self, now_ns: int, ended: Collection[int] = ()) -> tuple[list[int], list[Ending]]:
        """Account for a step in which every sequence with a complete context got one token."""
        started, endings = [], self._drain_loads()
        for sequence, tokens in self._chunks:
            sequence.computed += tokens
            if sequence.computed < sequence.length:
                continue
            sequence.generated += 1
            sequence.is_decoding, sequence.is_preempted = True, False
            if sequence.generated == 1:
                started.append(sequence.request_id)
            if sequence.generated >= sequence.ends_after or sequence.request_id in ended:
                reason = "eos" if sequence.request_id in ended else sequence.reason
                endings.append(Ending(sequence.request_id, sequence.generated, reason))
                self._release(sequence)
        self._chunks = []
        return started, endings

    def steps_to_ending(self) -> int:
        """Return 1: this planner does not look ahead."""
        return 1

    def skip(self, steps: int) -> None:
        """Raise AssertionError: no step is skipped."""
        raise AssertionError("every step is planned anew")

    def _release(self, sequence: Sequence) -> None:
        del self._by_id[sequence.request_id]
        (self._running if sequence in self._running else self._waiting).remove(sequence)
        sequence.blocks = 0

    def _join(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def _running_count(self) -> int:
        return len(self._running)

    def _current(self, sequence: Sequence) -> Sequence:
        return sequence

    def _schedule_running(self) -> int | None:
        """Give running requests their blocks; return the step's remaining tokens, None if a request was preempted."""
        self._chunks = []
        budget = self.spec.max_tokens_per_step
        is_complete = True
        for sequence in list(self._running):
            if sequence not in self._running or not budget:
                break
            tokens = min(sequence.length - sequence.computed, budget)
            while sequence in self._running and not self._allocate(sequence, tokens):
                self._preempt(self._running[-1])
                is_complete = False
            if sequence in self._running:
                self._chunks.append((sequence, tokens))
                budget -= tokens
        return budget if is_complete else None

    def _schedule_waiting(self, budget: int) -> None:
        in_use = {sequence.task_id for sequence in self._running if sequence.task_id is not None}
        for sequence in list(self._waiting):
            if not budget or len(self._running) == self.spec.max_batch_size:
                break
            task_id = sequence.task_id
            if task_id is not None and task_id not in in_use and len(in_use) == self.spec.device_pages:
                continue
            tokens = min(sequence.length, budget)
            if not self._allocate(sequence, tokens):
                break
            self._waiting.remove(sequence)
            self._running.append(sequence)
            self._chunks.append((sequence, tokens))
            budget -= tokens
            if task_id is not None:
                in_use.add(task_id)

    def _allocate(self, sequence: Sequence, tokens: int) -> bool:
        needed = self._blocks(sequence.computed + tokens) - sequence.blocks
        if needed > self.spec.kv_blocks - sum(running.blocks for running in self._running):
            return False
        sequence.blocks += needed
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._front -= 1
        sequence.order, sequence.computed, sequence.blocks = self._front, 0, 0
        sequence.is_decoding, sequence.is_preempted = False, True
        self._waiting.insert(0, sequence)

    def _completing(self) -> tuple[int, ...]:
        """Return the ids whose context is complete after the step: they get a token."""
        return tuple(
            sequence.request_id
            for sequence, tokens in self._chunks
            if not sequence.is_decoding and sequence.computed + tokens == sequence.length
        )

    def _step(self) -> StepBatch:
        prompts = [tokens for sequence, tokens in self._chunks if not sequence.is_decoding]
        lengths = [sequence.length for sequence, _ in self._chunks if sequence.is_decoding]
        tasks = [sequence.task_id for sequence in self._running if sequence.task_id is not None]
        modules = max((self._modules(task_id) for task_id in tasks), default=0)
        return StepBatch(sum(prompts), len(prompts), len(lengths), sum(lengths), len(set(tasks)), len(tasks), modules)


Plans = Callable[[EngineSpec, StepCost], Planning]


@dataclass(frozen=True)
class Flavour:
    """`plain` plans every step anew; `quick` plans the same steps with less work, if all that run fit a step."""

    plain: Plans
    quick: Plans


_plain = partial(Planner, jump=False)
_jumping = partial(Planner, jump=True)

FLAVOURS: dict[str, Flavour] = {
    GUARANTEED_NO_EVICT: Flavour(_plain, Roster),
    STRICT_FIFO: Flavour(_plain, partial(Roster, is_strict=True)),
    MAX_UTILIZATION: Flavour(_plain, _jumping),
    STATIC_BATCH: Flavour(_plain, _jumping),
    MAX_REQUESTS: Flavour(_plain, _jumping),
    VLLM: Flavour(VllmPlanner, VllmRoster),
    TRTLLM_PYTORCH: Flavour(partial(TorchPlanner, jump=False), TorchRoster),
}


def planning_of(spec: EngineSpec, cost: StepCost, jump: bool) -> Planning:
    """Return an engine's planner; without `jump` the plain one, which the other must equal."""
    flavour = FLAVOURS[spec.scheduler]
    is_quick = jump and spec.max_batch_size <= spec.max_tokens_per_step
    return flavour.quick(spec, cost) if is_quick else flavour.plain(spec, cost)
