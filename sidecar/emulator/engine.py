"""The pure model of a TensorRT-LLM executor: queue, adapter caches, capacity scheduler, iterations.

Time is an argument. There are two ways to drive an engine, and one engine is driven in one of them:

* `begin` and `finish`, around an executor that computes tokens, in real time;
* `advance`, which runs on the cost model alone. While the batch stays the same it neither fetches nor
  schedules nor moves adapters: it only adds up step times. The outputs and their times are those of single
  steps.

Not modelled: chunked context, KV reuse, beams, pipeline parallelism, more than one micro-batch.
"""

from __future__ import annotations

from collections.abc import Collection

from sidecar.emulator.messages import (
    Counters,
    Ending,
    Failure,
    Iteration,
    Output,
    QueueFull,
    Request,
    StepBatch,
    StepCost,
)
from sidecar.emulator.pages import Row
from sidecar.emulator.peft import StoreError
from sidecar.emulator.planner import Batch, Planner
from sidecar.emulator.scheduler import Active, arrival_order, blocks_held
from sidecar.emulator.spec import EngineSpec

__all__ = [
    "Counters",
    "Ending",
    "Engine",
    "Failure",
    "Iteration",
    "Output",
    "QueueFull",
    "Request",
    "Row",
    "StepBatch",
    "StepCost",
    "StoreError",
]

CANCELLED = "Request was cancelled"


class Engine:
    """A TensorRT-LLM executor without its GPU.

    With `jump` false every iteration plans anew: the reference that jumping must equal.
    """

    def __init__(self, spec: EngineSpec, cost: StepCost, jump: bool = True) -> None:
        self.spec = spec
        self._cost = cost
        self._planner = Planner(spec, cost, jump)
        self._leaving: list[int] = []
        self._batch: Batch | None = None
        # True while planning again would give the same batch, or again nothing.
        self._is_settled = False
        self._running: Iteration | None = None
        self._running_until_ns = 0
        self._clock_ns = 0
        self._iterations = 0

    def submit(self, request: Request, now_ns: int) -> None:
        """Queue a request; it is checked when it is fetched.

        When driving with `advance`, call `advance(now_ns)` first. Raises QueueFull, and ValueError for an id
        in use.
        """
        queue, limit = self._planner.queue, self.spec.max_queue
        if request.request_id in self._planner.by_id or request.request_id in queue:
            raise ValueError(f"request id {request.request_id} is in use")
        if limit and len(queue) >= limit:
            raise QueueFull(f"Maximum queue size of {limit} has been reached, please try again later")
        queue.push(request)
        self._disturb(now_ns)

    def cancel(self, request_id: int, now_ns: int) -> None:
        """Drop a request: at once when it waits, after the running iteration when it is active.

        Ids that are not known are ignored. Its adapter is released as if it had finished.
        """
        if self._planner.queue.discard(request_id):
            self._planner.failures.append(Failure(request_id, CANCELLED, cancelled=True))
        elif request_id in self._planner.by_id and request_id not in self._leaving:
            self._leaving.append(request_id)
        else:
            return
        self._disturb(now_ns)
        if self._running is None:
            self._release_leaving(now_ns)

    def prefetch(self, task_id: int, rows: tuple[Row, ...], weights: object | None) -> None:
        """Put an adapter into the host cache at start, as `lora_prefetch_dir` does.

        It cannot be evicted before a request of its id has ended. Raises StoreError when the cache is full.
        """
        self._planner.prefetch(task_id, rows, weights)

    def break_next_step(self, text: str) -> None:
        """Make the next step fail as a whole with this text: a fault, to test clients with."""
        self._planner.fault = text
        self._is_settled = False

    def drain_failures(self) -> list[Failure]:
        """What ended without finishing since the last call."""
        failures, self._planner.failures = self._planner.failures, []
        return failures

    def begin(self, now_ns: int) -> Iteration | None:
        """Fetch, schedule and move adapters; None when nothing can run. Look at `drain_failures` after it."""
        assert self._running is None, "an iteration is running"
        self._clock_ns = now_ns
        waited_ns = 0
        if not self._is_settled:
            self._batch = self._planner.plan(now_ns)
            self._is_settled = True
            waited_ns = self._batch.waited_ns if self._batch else 0
        elif self._batch is not None:
            self._batch.repeats -= 1
        if self._batch is None:
            return None
        return self._run(self._batch, now_ns, waited_ns)

    def finish(self, iteration: Iteration, now_ns: int, ended: Collection[int] = ()) -> list[Ending]:
        """The step is over: each of its requests has one more token, and `ended` had their last one.

        Requests that reach their limit of new tokens end too.
        """
        assert iteration is self._running, "not the running iteration"
        assert self._batch is not None
        batch, self._running, self._clock_ns = self._batch, None, now_ns
        endings = self._take_tokens(batch, now_ns, ended)
        step = batch.step
        contexts = step.decoding_context_tokens + step.decoding
        batch.step = step._replace(decoding_context_tokens=contexts)
        self._is_settled = self._is_settled and not endings and batch.repeats > 0
        self._release_leaving(now_ns)
        return endings

    def advance(self, until_ns: int) -> list[Output]:
        """Run up to a time. An iteration that began by then and ends later is finished by a later call."""
        outputs: list[Output] = []
        while True:
            if self._running is None and not self._start(until_ns, outputs):
                return outputs
            if self._running_until_ns > until_ns:
                return outputs
            self._complete(outputs)
            if self._is_settled and self._batch is not None:
                self._repeat(self._batch, until_ns, outputs)

    def next_change_ns(self) -> int | None:
        """The earliest time at which `advance` can have output; None until someone submits or cancels."""
        if self._running is not None:
            return self._running_until_ns
        return None if self._is_idle() else self._clock_ns

    def payload(self, task_id: int) -> object | None:
        """The weights that the engine computes a task with; None when it has none.

        The device's copy, else the host's.
        """
        peft = self._planner.peft
        entry = peft.entry(task_id) if peft is not None else None
        return entry.payload if entry is not None else None

    @property
    def counters(self) -> Counters:
        """What the engine's gauges show now."""
        active, batch, peft = self._planner.active, self._batch, self._planner.peft
        context = len(batch.context_ids) if batch else 0
        generation = len(batch.generation_ids) if batch else 0
        return Counters(
            active=len(active),
            waiting=len(self._planner.queue),
            scheduled=context + generation,
            context=context,
            generation=generation,
            paused=sum(request.paused for request in active),
            context_tokens=batch.step.context_tokens if batch else 0,
            kv_max_blocks=self.spec.kv_blocks,
            kv_used_blocks=sum(blocks_held(request, self.spec.tokens_per_block) for request in active),
            iteration_counter=self._iterations,
            host_pages_used=peft.host.pages_used if peft else 0,
            device_pages_used=peft.device.pages_used if peft else 0,
            host_evictions=peft.host.evictions if peft else 0,
            device_evictions=peft.device.evictions if peft else 0,
        )

    def _run(self, batch: Batch, now_ns: int, waited_ns: int) -> Iteration:
        self._iterations += 1
        duration_ns = waited_ns + self._cost.step_ns(batch.step)
        self._running = Iteration(self._iterations, batch.context_ids, batch.generation_ids, duration_ns)
        self._running_until_ns = now_ns + duration_ns
        return self._running

    def _take_tokens(self, batch: Batch, now_ns: int, ended: Collection[int]) -> list[Ending]:
        over = []
        for request in (*batch.context, *batch.generation):
            request.generated += 1
            request.started = True
            request.paused = False
            if request.generated >= request.max_new_tokens or request.request_id in ended:
                over.append(request)
        # In the order of the active list: it decides which adapter counts as completed last.
        over.sort(key=arrival_order)
        for request in over:
            self._planner.release(request, now_ns)
        return [_ending(request, ended) for request in over]

    def _is_idle(self) -> bool:
        return self._is_settled and self._batch is None and not self._planner.failures

    def _start(self, until_ns: int, outputs: list[Output]) -> bool:
        """Begin an iteration at the clock; False when there is none to begin by `until_ns`."""
        at_ns = self._clock_ns
        if at_ns > until_ns:
            return False
        begun = not self._is_idle() and self.begin(at_ns) is not None
        if self._planner.failures:
            outputs.append(Output(at_ns, failures=tuple(self.drain_failures())))
        if not begun:
            self._clock_ns = until_ns
        return begun

    def _complete(self, outputs: list[Output]) -> None:
        iteration, at_ns = self._running, self._running_until_ns
        assert iteration is not None
        endings = self.finish(iteration, at_ns)
        tokens = iteration.context + iteration.generation
        outputs.append(Output(at_ns, tokens, tuple(endings), tuple(self.drain_failures())))

    def _repeat(self, batch: Batch, until_ns: int, outputs: list[Output]) -> None:
        """Run the batch again as long as nothing can change: no ending, KV blocks for all, not past `until_ns`."""
        last = min(request.max_new_tokens - request.generated for request in batch.generation)
        limit = min(batch.repeats, last - 1)
        at_ns, step, step_ns, ids = self._clock_ns, batch.step, self._cost.step_ns, batch.generation_ids
        _, _, decoding, contexts, distinct, adapted, modules = step
        steps = 0
        while steps < limit:
            end_ns = at_ns + step_ns(step)
            if end_ns > until_ns:
                break
            at_ns = end_ns
            steps += 1
            outputs.append(Output(at_ns, ids))
            contexts += decoding
            step = StepBatch(0, 0, decoding, contexts, distinct, adapted, modules)
        for request in batch.generation:
            request.generated += steps
        batch.step = step
        batch.repeats -= steps
        self._clock_ns = at_ns
        self._iterations += steps
        self._is_settled = batch.repeats > 0

    def _release_leaving(self, now_ns: int) -> None:
        leaving, self._leaving = self._leaving, []
        for request_id in leaving:
            request = self._planner.by_id.get(request_id)
            if request is not None:
                self._planner.release(request, now_ns)
                self._planner.failures.append(Failure(request_id, CANCELLED, cancelled=True))
                self._is_settled = False

    def _disturb(self, now_ns: int) -> None:
        """Something changed from outside: plan anew, and not before now if there was nothing to do."""
        self._is_settled = False
        if self._running is None and self._batch is None:
            self._clock_ns = max(self._clock_ns, now_ns)


def _ending(request: Active, ended: Collection[int]) -> Ending:
    reason = "eos" if request.request_id in ended else "length"
    return Ending(request.request_id, request.generated, reason)
