"""Incremental planning for guaranteed_no_evict and strict_fifo.

A started request decodes in every step until it ends, and nothing else changes its neighbours' positions. So a step
needs no work per request: lengths follow from the number of steps, endings are in a heap by the step of their end,
reservations and adapters are counted when a request starts and ends. The walk over pending requests continues where it
stopped: those it passed over lack adapter pages, which only appear when the last request of some adapter ends.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection
from heapq import heappop, heappush

from sidecar.lab.engine.batch import Batch
from sidecar.lab.engine.intake import ForwardError, Intake, ending_of
from sidecar.lab.engine.messages import Ending
from sidecar.lab.engine.peft import EnsureError
from sidecar.lab.engine.scheduler import Active, arrival_order, blocks_to_completion
from sidecar.lab.engine.spec import EngineSpec
from sidecar.lab.engine.tally import Tally
from sidecar.pace.cost import StepBatch, StepCost


class Roster(Intake):
    """Plans what `Planner` plans for these schedulers, by changes; with `is_strict` no request is passed over.

    The seats must not exceed the tokens of a step: then everything that started decodes in every step.
    """

    def __init__(self, spec: EngineSpec, cost: StepCost, is_strict: bool = False) -> None:
        super().__init__(spec, cost)
        self._is_strict = is_strict
        self._steps = 0
        # The steps before each started request's first token, by id, in the order of starting.
        self._begun: dict[int, int] = {}
        self._ends: list[tuple[int, int]] = []
        self._context: list[Active] = []
        self._contexts_tokens = 0
        self._blocks_free = spec.kv_blocks
        self._pages_free = self._room.device_pages
        self._adapters = Tally()
        self._priorities: dict[float, int] = {}
        self._pending: list[Active] = []
        self._passed = 0
        self._passed_blocks = 0

    def plan(self, now_ns: int) -> Batch | None:
        """Return the next batch with its adapters on the device; None if nothing can run until something changes."""
        while True:
            is_changed = self._fetch(now_ns) > 0
            decoding, contexts_tokens = len(self._begun), self._contexts_tokens
            context = self._context = self._start_pending() if self._pending else []
            if context or decoding:
                try:
                    self._check_step(context)
                    return self._batch(decoding, contexts_tokens, now_ns)
                except (EnsureError, ForwardError) as error:
                    is_changed |= self._fail_all(str(error), now_ns)
            if not is_changed:
                return None

    def generation_ids(self) -> tuple[int, ...]:
        """Return the ids of the requests that decode in the last planned batch."""
        context = {request.request_id for request in self._context}
        decoding = [self.by_id[request_id] for request_id in self._begun if request_id not in context]
        return tuple(request.request_id for request in sorted(decoding, key=_decoding_order))

    def release(self, request: Active, now_ns: int) -> None:
        """Free the seat, the KV blocks and the adapter of a request that is over."""
        request_id = request.request_id
        del self.by_id[request_id]
        self._count_priority(request.priority, -1)
        begun = self._begun.pop(request_id, None)
        if begun is None:
            self._pending.remove(request)
            self._look_again()
        else:
            self._contexts_tokens -= request.input_tokens + self._steps - begun
            self._blocks_free += blocks_to_completion(request, self.spec.tokens_per_block)
            if request.task_id is not None and self._adapters.leave(request.task_id):
                self._pages_free += request.pages
                self._look_again()
        self._let_go(request, now_ns)

    def take_tokens(self, now_ns: int, ended: Collection[int] = ()) -> tuple[list[int], list[Ending]]:
        """Account for a step; return (ids with their first token, endings in the order of the active list)."""
        self._steps += 1
        self._contexts_tokens += len(self._begun)
        started = []
        for request in self._context:
            request.started = True
            started.append(request.request_id)
        self._context = []
        over = {request_id: self.by_id[request_id] for request_id in ended if request_id in self._begun}
        while self._ends and self._ends[0][0] <= self._steps:
            request_id = self._ends[0][1]
            if self._is_true_end():
                over[request_id] = self.by_id[request_id]
            heappop(self._ends)
        ordered = sorted(over.values(), key=arrival_order) if len(over) > 1 else list(over.values())
        for request in ordered:
            request.generated = self._steps - self._begun[request.request_id]
            self.release(request, now_ns)
        return started, [ending_of(request, ended) for request in ordered]

    def steps_to_ending(self) -> int:
        """Return the number of steps of the batch up to the first ending."""
        while not self._is_true_end():
            heappop(self._ends)
        return self._ends[0][0] - self._steps

    def skip(self, steps: int) -> None:
        """Account for steps of the batch in which only lengths changed."""
        self._steps += steps
        self._contexts_tokens += steps * len(self._begun)

    def generated(self, request_id: int) -> int:
        """Return how many tokens a request has; 0 if it is not active."""
        begun = self._begun.get(request_id)
        return 0 if begun is None else self._steps - begun

    def _active(self) -> list[Active]:
        for request_id, begun in self._begun.items():
            self.by_id[request_id].generated = self._steps - begun
        return sorted(self.by_id.values(), key=arrival_order)

    def _join(self, request: Active) -> None:
        self._count_priority(request.priority, 1)
        pending = self._pending
        if not pending or arrival_order(pending[-1]) < arrival_order(request):
            pending.append(request)
        else:
            pending.insert(bisect_right(pending, arrival_order(request), key=arrival_order), request)
            self._look_again()

    def _lowest_priority(self) -> float | None:
        return min(self._priorities, default=None)

    def _count_priority(self, priority: float, change: int) -> None:
        count = self._priorities.get(priority, 0) + change
        if count:
            self._priorities[priority] = count
        else:
            del self._priorities[priority]

    def _look_again(self) -> None:
        """Reset the walk: pending requests that were passed over may fit now."""
        self._passed = self._passed_blocks = 0

    def _start_pending(self) -> list[Active]:
        """Start the pending requests that fit; return them sorted by adapter."""
        spec, pending = self.spec, self._pending
        if self._passed_blocks > self._blocks_free:
            return []
        joining: list[Active] = []
        tokens, at = len(self._begun), self._passed
        while at < len(pending) and len(self._begun) < spec.max_batch_size:
            request = pending[at]
            blocks = blocks_to_completion(request, spec.tokens_per_block)
            if blocks > self._blocks_free:
                break
            if not self._has_pages(request):
                if self._is_strict:
                    break
                self._passed_blocks = max(self._passed_blocks, blocks)
                at += 1
                continue
            if tokens and tokens + request.input_tokens > spec.max_tokens_per_step:
                break
            tokens += request.input_tokens
            del pending[at]
            self._start(request, blocks)
            joining.append(request)
        self._passed = at
        if len(joining) > 1:
            joining.sort(key=_adapter_order)
        return joining

    def _has_pages(self, request: Active) -> bool:
        task_id = request.task_id
        return task_id is None or request.pages <= self._pages_free or task_id in self._adapters.counts

    def _start(self, request: Active, blocks: int) -> None:
        self._begun[request.request_id] = self._steps
        heappush(self._ends, (self._steps + max(1, request.ends_after), request.request_id))
        self._contexts_tokens += request.input_tokens
        self._blocks_free -= blocks
        task_id = request.task_id
        if task_id is not None and self._adapters.enter(task_id, self._module_kinds):
            self._pages_free -= request.pages

    def _is_true_end(self) -> bool:
        """Return True if the first of the endings is that of a running request and not of a cancelled one."""
        end, request_id = self._ends[0]
        begun = self._begun.get(request_id)
        return begun is not None and begun + max(1, self.by_id[request_id].ends_after) == end

    def _batch(self, decoding: int, contexts_tokens: int, now_ns: int) -> Batch:
        context, adapters = self._context, self._adapters
        step = StepBatch(
            self._contexts_tokens - contexts_tokens,
            len(context),
            decoding,
            contexts_tokens,
            len(adapters.counts),
            adapters.requests,
            adapters.modules(),
        )
        ids = tuple(request.request_id for request in context)
        repeats = 0 if context or self._may_fetch(*self._window()) else self.steps_to_ending()
        return Batch(ids, step, repeats, self._ensure(now_ns))

    def _ensure(self, now_ns: int) -> int:
        entering, leaving = self._adapters.drain_changes()
        if self.peft is None or not (entering or leaving):
            return 0
        ensured = self.peft.change_batch(sorted(entering), sorted(leaving), now_ns)
        if ensured is None:
            ensured = self.peft.ensure_batch(self._adapters.counts, now_ns)
        return ensured.ready_ns - now_ns + self._copies_ns(ensured.copied_slots)


def _adapter_order(request: Active) -> int:
    return -1 if request.task_id is None else request.task_id


def _decoding_order(request: Active) -> tuple[int, float, int]:
    return (_adapter_order(request), -request.priority, request.arrival)
