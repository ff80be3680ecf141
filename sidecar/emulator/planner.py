"""Which requests run next: fetch from the queue, schedule, pause, bring the batch's adapters to the device.

One pass of TensorRT-LLM's executor loop before its step (`executorImpl.cpp`,
`trtGptModelInflightBatching.cpp`). An error of a fetch ends one request; an error after it ends every active
request.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, replace

from sidecar.emulator.messages import Failure, Request, StepBatch, StepCost
from sidecar.emulator.pages import Row, footprint
from sidecar.emulator.peft import EnsureError, PeftCache, StoreError, TaskNotCached
from sidecar.emulator.scheduler import (
    SCHEDULERS,
    Active,
    Room,
    Schedule,
    arrival_order,
    micro_batch,
    steps_that_fit,
)
from sidecar.emulator.spec import MAX_UTILIZATION, EngineSpec
from sidecar.emulator.validation import Rejected, check_adapter, check_dtype, check_lengths, tokens_allowed
from sidecar.emulator.waiting import WaitingQueue

FETCH_ERROR = "Encountered an error when fetching new request: "
FORWARD_ERROR = "Encountered an error in forwardAsync function: "


class ForwardError(Exception):
    """The engine's step failed: every active request ends."""


@dataclass(slots=True, eq=False)
class Batch:
    """The requests of an iteration, what its step costs from, and how often it can be run again unchanged.

    `waited_ns` is the time until its adapters were on the device: part of its first run only.
    """

    context: list[Active]
    generation: list[Active]
    step: StepBatch
    context_ids: tuple[int, ...]
    generation_ids: tuple[int, ...]
    repeats: int
    waited_ns: int = 0


class Planner:
    """The queue, the active requests and the adapter caches of an engine."""

    def __init__(self, spec: EngineSpec, cost: StepCost, jump: bool) -> None:
        self.spec = spec
        self.queue = WaitingQueue()
        self.active: list[Active] = []
        self.by_id: dict[int, Active] = {}
        self.failures: list[Failure] = []
        self.fault: str | None = None
        self._cost = cost
        self._jump = jump
        self._schedule = SCHEDULERS[spec.scheduler]
        self._cache_dtype: str | None = None
        self._size_caches(spec)

    def _size_caches(self, spec: EngineSpec) -> None:
        self.peft = _peft_cache(spec)
        self._slot_bytes = spec.slot_bytes if spec.lora_modules else 0
        self._room = Room(spec.max_batch_size, spec.kv_blocks, spec.tokens_per_block, spec.device_pages)

    def plan(self, now_ns: int) -> Batch | None:
        """The next batch, its adapters on the device; None when nothing can run until something changes."""
        while True:
            is_changed = self._fetch(now_ns) > 0
            batch = None
            try:
                schedule = self._schedule(self.active, self._room)
                is_changed |= self._pause(schedule.paused, now_ns)
                batch = self._pick(schedule)
                if batch is not None:
                    batch.waited_ns = self._ensure(batch, now_ns)
            except (EnsureError, ForwardError) as error:
                batch = None
                is_changed |= self._fail_all(str(error), now_ns)
            if batch is not None or not is_changed:
                return batch

    def prefetch(self, task_id: int, rows: tuple[Row, ...], payload: object | None) -> None:
        """Put an adapter into the host cache before any request; raises StoreError when there is no room."""
        if self.peft is not None:
            self._choose_dtype(self.spec.dtype)
            self.peft.prefetch(task_id, rows, payload)

    def release(self, request: Active, now_ns: int) -> None:
        """A request is over: its seat, its KV blocks and its hold on its adapter are free."""
        del self.by_id[request.request_id]
        self.active.remove(request)
        if self.peft is not None:
            self.peft.mark_request_done(request.request_id, request.task_id, now_ns)

    def _fetch(self, now_ns: int) -> int:
        """Move requests from the queue to the active list; returns how many were taken, failed ones included.

        Up to the free seats, and beyond them those of a higher priority than the lowest active one. A failed one does
        not free its place for this pass.
        """
        seats, lowest = self._window()
        taken = 0
        while self._may_fetch(seats - taken, lowest):
            request, arrival = self.queue.pop()
            taken += 1
            self._admit(request, arrival, now_ns)
        return taken

    def _window(self) -> tuple[int, float | None]:
        """Free seats, and the lowest priority among the active requests."""
        lowest = self.active[-1].priority if self.active else None
        return self.spec.max_batch_size - len(self.active), lowest

    def _may_fetch(self, seats: int, lowest: float | None) -> bool:
        priority = self.queue.priority()
        return priority is not None and (seats > 0 or (lowest is not None and priority > lowest))

    def _admit(self, request: Request, arrival: int, now_ns: int) -> None:
        try:
            check_lengths(request, self.spec)
            pages = self._hold_adapter(request, now_ns)
        except TaskNotCached as error:
            self.failures.append(Failure(request.request_id, str(error)))
            return
        except (Rejected, StoreError) as error:
            self.failures.append(Failure(request.request_id, f"{FETCH_ERROR}{error}"))
            return
        active = Active(
            request.request_id,
            request.priority,
            arrival,
            request.input_tokens,
            tokens_allowed(request, self.spec),
            request.task_id if self.peft else None,
            pages,
        )
        self.by_id[request.request_id] = active
        insort(self.active, active, key=arrival_order)

    def _hold_adapter(self, request: Request, now_ns: int) -> int:
        if self.peft is None:
            return 0
        check_adapter(request, self.spec)
        if request.task_id is None:
            return 0
        if request.rows is not None:
            self._choose_dtype(request.dtype or self.spec.dtype)
        put_ns = 0
        if request.rows is not None and not self.peft.is_cached(request.task_id):
            slots = footprint(request.rows, self.spec.geometry).slots
            put_ns = self._cost.adapter_put_ns(slots * self._slot_bytes)
        self.peft.add_request(request.request_id, request.task_id, request.rows, request.weights, now_ns, put_ns)
        return self.peft.pages_of(request.task_id)

    def _choose_dtype(self, dtype: str) -> None:
        """The first weights decide the dtype of both caches, which are still empty: their bytes hold other pages."""
        check_dtype(dtype, self.spec.dtype, self._cache_dtype)
        if self._cache_dtype is None and dtype != self.spec.dtype:
            self._size_caches(replace(self.spec, dtype=dtype))
        self._cache_dtype = dtype

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
        if not context and not generation:
            return None
        self._check_step(context)
        repeats = self._repeats(schedule.fitting, context, generation)
        return Batch(
            context,
            generation,
            self._step_batch(context, generation),
            tuple(request.request_id for request in context),
            tuple(request.request_id for request in generation),
            repeats,
        )

    def _check_step(self, context: list[Active]) -> None:
        if self.fault is not None:
            text, self.fault = self.fault, None
            raise ForwardError(text)
        limit = self.spec.max_tokens_per_step
        for request in context:
            if request.input_tokens > limit:
                raise ForwardError(
                    "[TensorRT-LLM][ERROR] Assertion failed: The number of context tokens "
                    f"({request.input_tokens}) exceeds the limit value ({limit})"
                )

    def _repeats(self, fitting: list[Active], context: list[Active], generation: list[Active]) -> int:
        """How often after this time the batch can run unchanged, if nothing ends."""
        if context or not self._jump or self._may_fetch(*self._window()):
            return 0
        first_end = min(request.max_new_tokens - request.generated for request in generation)
        if self.spec.scheduler != MAX_UTILIZATION:
            return first_end
        return steps_that_fit(fitting, generation, self._room, first_end) - 1

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

    def _module_kinds(self, task_id: int) -> int:
        entry = self.peft.entry(task_id) if self.peft is not None else None
        return entry.module_kinds if entry is not None else 0

    def _ensure(self, batch: Batch, now_ns: int) -> int:
        if self.peft is None:
            return 0
        tasks = [request.task_id for request in batch.context + batch.generation if request.task_id is not None]
        ensured = self.peft.ensure_batch(tasks, now_ns)
        copies_ns = sum(self._cost.adapter_copy_ns(slots * self._slot_bytes) for slots in ensured.copied_slots)
        return ensured.ready_ns - now_ns + copies_ns

    def _fail_all(self, text: str, now_ns: int) -> bool:
        failed = list(self.active)
        for request in failed:
            self.release(request, now_ns)
            self.failures.append(Failure(request.request_id, f"{FORWARD_ERROR}{text}"))
        return bool(failed)


def _peft_cache(spec: EngineSpec) -> PeftCache | None:
    if not spec.lora_modules:
        return None
    return PeftCache(spec.geometry, spec.host_pages, spec.device_pages, spec.lora_put_workers)
