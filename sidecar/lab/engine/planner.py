"""Which requests run next: fetch from the queue, schedule, pause, bring the batch's adapters to the device.

It is one pass of TensorRT-LLM's executor loop before its step (`executorImpl.cpp`, `trtGptModelInflightBatching.cpp`).
An error in a fetch ends one request; an error after it ends every active request. Every batch is planned from all
active requests: the only way for `max_utilization`, and the reference for `Roster`, which plans incrementally.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection
from itertools import chain

from sidecar.lab.engine.batch import Batch
from sidecar.lab.engine.intake import ForwardError, Intake, ending_of
from sidecar.lab.engine.messages import Ending
from sidecar.lab.engine.peft import EnsureError
from sidecar.lab.engine.scheduler import (
    SCHEDULERS,
    Active,
    Schedule,
    arrival_order,
    micro_batch,
    steps_that_fit,
)
from sidecar.lab.engine.spec import MAX_UTILIZATION, EngineSpec
from sidecar.pace.cost import StepBatch, StepCost


class Planner(Intake):
    """Plans each batch anew; with `jump` it tells how often a batch can be repeated unchanged."""

    def __init__(self, spec: EngineSpec, cost: StepCost, jump: bool) -> None:
        super().__init__(spec, cost)
        self.active: list[Active] = []
        self._jump = jump
        self._schedule = SCHEDULERS[spec.scheduler]
        self._context: list[Active] = []
        self._generation: list[Active] = []

    def plan(self, now_ns: int) -> Batch | None:
        """Return the next batch with its adapters on the device; None if nothing can run until something changes."""
        while True:
            is_changed = self._fetch(now_ns) > 0
            batch = None
            try:
                schedule = self._schedule(self.active, self._room)
                is_changed |= self._pause(schedule.paused, now_ns)
                batch = self._pick(schedule)
                if batch is not None:
                    batch.waited_ns = self._ensure(now_ns)
            except (EnsureError, ForwardError) as error:
                batch = None
                is_changed |= self._fail_all(str(error), now_ns)
            if batch is not None or not is_changed:
                return batch

    def generation_ids(self) -> tuple[int, ...]:
        """Return the ids of the requests that decode in the last planned batch."""
        return tuple(request.request_id for request in self._generation)

    def release(self, request: Active, now_ns: int) -> None:
        """Free the seat, the KV blocks and the adapter of a request that is over."""
        del self.by_id[request.request_id]
        self.active.remove(request)
        self._let_go(request, now_ns)

    def take_tokens(self, now_ns: int, ended: Collection[int] = ()) -> tuple[list[int], list[Ending]]:
        """Account for a step in which each request got one token; return (ids with their first token, endings).

        Endings are in the order of the active list, which decides the adapter that counts as completed last.
        """
        started = [request.request_id for request in self._context if request.generated == 0]
        over = []
        for request in chain(self._context, self._generation):
            request.generated += 1
            request.started = True
            request.paused = False
            if request.generated >= request.ends_after or request.request_id in ended:
                over.append(request)
        over.sort(key=arrival_order)
        for request in over:
            self.release(request, now_ns)
        return started, [ending_of(request, ended) for request in over]

    def steps_to_ending(self) -> int:
        """Return the number of steps of the batch up to the first ending."""
        return min(request.ends_after - request.generated for request in chain(self._context, self._generation))

    def skip(self, steps: int) -> None:
        """Account for steps of the batch in which only lengths changed."""
        for request in self._generation:
            request.generated += steps

    def _active(self) -> list[Active]:
        return self.active

    def _join(self, request: Active) -> None:
        insort(self.active, request, key=arrival_order)

    def _lowest_priority(self) -> float | None:
        return self.active[-1].priority if self.active else None

    def _pause(self, paused: list[Active], now_ns: int) -> bool:
        for request in paused:
            request.started = False
            request.paused = True
            if self.peft is not None:
                self.peft.mark_request_done(request.request_id, request.task_id, now_ns, pause=True)
        return bool(paused)

    def _pick(self, schedule: Schedule) -> Batch | None:
        spec = self.spec
        context, generation = micro_batch(schedule.fitting, spec.max_batch_size, spec.max_tokens_per_step)
        self._context, self._generation = context, generation
        if not context and not generation:
            return None
        self._check_step(context)
        return Batch(
            tuple(request.request_id for request in context),
            self._step_batch(context, generation),
            self._repeats(schedule.fitting),
        )

    def _repeats(self, fitting: list[Active]) -> int:
        """Return how often after this time the batch can run unchanged if nothing ends."""
        if self._context or not self._jump or self._may_fetch(*self._window()):
            return 0
        first_end = self.steps_to_ending()
        if self.spec.scheduler != MAX_UTILIZATION:
            return first_end
        return steps_that_fit(fitting, self._generation, self._room, first_end) - 1

    def _step_batch(self, context: list[Active], generation: list[Active]) -> StepBatch:
        tasks = [request.task_id for request in context + generation if request.task_id is not None]
        distinct = dict.fromkeys(tasks)
        return StepBatch(
            sum(request.length for request in context),
            len(context),
            len(generation),
            sum(request.length for request in generation),
            len(distinct),
            len(tasks),
            max((self._module_kinds(task_id) for task_id in distinct), default=0),
        )

    def _ensure(self, now_ns: int) -> int:
        if self.peft is None:
            return 0
        tasks = [request.task_id for request in self._context + self._generation if request.task_id is not None]
        ensured = self.peft.ensure_batch(tasks, now_ns)
        return ensured.ready_ns - now_ns + self._copies_ns(ensured.copied_slots)
