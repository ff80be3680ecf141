"""The pure model of an engine's loop: queue, adapter caches, scheduler, iterations; TensorRT-LLM's or vLLM's.

Time is an argument. An engine is driven in one of three ways:

* `begin` and `finish`, around an executor that computes tokens, in real time;
* `advance`, on the cost model alone. While the batch stays the same it does not fetch, schedule or move adapters: it
  only adds up step times. The outputs and their times are those of single steps;
* `run`, which is `advance` for a simulator: it stops at the first step end at which a request started or ended,
  before the next iteration, and reports nothing of the steps in between.

Not modelled: chunked context in TensorRT-LLM, KV reuse, beams, pipeline parallelism, more than one micro-batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

from sidecar.lab.engine.batch import Batch
from sidecar.lab.engine.flavours import planning_of
from sidecar.lab.engine.messages import Counters, Ending, Event, Failure, Iteration, Output, QueueFull, Request
from sidecar.lab.engine.pages import Row
from sidecar.lab.engine.peft import StoreError
from sidecar.lab.engine.spec import EngineSpec
from sidecar.pace.cost import StepBatch, StepCost

__all__ = [
    "Counters",
    "Ending",
    "Engine",
    "Event",
    "Failure",
    "Iteration",
    "Output",
    "QueueFull",
    "Request",
    "Row",
    "StoreError",
]

CANCELLED = "Request was cancelled"

# Measured step times dip by a thousandth here and there as contexts grow; the bound on an event's time allows for ten.
STEADY = 0.99


class Engine:
    """An engine without its GPU, of the kind that the spec's scheduler names.

    With `jump` False every iteration is planned anew: the reference that jumping must equal.
    """

    def __init__(self, spec: EngineSpec, cost: StepCost, jump: bool = True) -> None:
        self.spec = spec
        self._cost = cost
        self._planner = planning_of(spec, cost, jump)
        self._leaving: list[int] = []
        self._batch: Batch | None = None
        # True while planning again would give the same batch, or again nothing.
        self._is_settled = False
        self._running: Batch | None = None
        self._ends_ns = 0
        self._clock_ns = 0
        self._iterations = 0
        self._is_run = False
        self._events: deque[Event] = deque()

    def submit(self, request: Request, now_ns: int) -> None:
        """Queue a request; it is checked when it is fetched.

        When driving with `advance`, call `advance(now_ns)` first; an engine driven with `run` catches up with `now_ns`
        by itself. Raises QueueFull, and ValueError for an id in use.
        """
        self._catch_up(now_ns)
        queue, limit = self._planner.queue, self.spec.max_queue
        if self._planner.is_active(request.request_id) or request.request_id in queue:
            raise ValueError(f"request id {request.request_id} is in use")
        if limit and len(queue) >= limit:
            raise QueueFull(f"Maximum queue size of {limit} has been reached, please try again later")
        queue.push(request)
        self._disturb(now_ns)

    def cancel(self, request_id: int, now_ns: int) -> None:
        """Drop a request: at once if it waits, after the running iteration if it is active.

        Unknown ids are ignored. The adapter is released as if the request had finished.
        """
        self._catch_up(now_ns)
        if self._planner.queue.discard(request_id):
            self._planner.failures.append(Failure(request_id, CANCELLED, cancelled=True))
        elif self._planner.is_active(request_id) and request_id not in self._leaving:
            self._leaving.append(request_id)
        else:
            return
        self._disturb(now_ns)
        if self._running is None:
            self._release_leaving(now_ns)

    def prefetch(self, task_id: int, rows: tuple[Row, ...], weights: object | None) -> None:
        """Put an adapter into the host cache at start, as `lora_prefetch_dir` does.

        It cannot be evicted before a request of its id has ended. Raises StoreError if the cache is full.
        """
        self._planner.prefetch(task_id, rows, weights)

    def break_next_step(self, text: str) -> None:
        """Inject a fault: make the next step fail as a whole with this text."""
        self._planner.fault = text
        self._is_settled = False

    def freeze(self, now_ns: int, for_ns: int) -> None:
        """Inject a fault: let `for_ns` pass without the engine, as if its process were stopped."""
        self._catch_up(now_ns)
        if self._running is not None:
            self._ends_ns += for_ns
        else:
            self._clock_ns = max(self._clock_ns, now_ns) + for_ns

    def end_loop(self, text: str) -> None:
        """End the loop for good as an exception does that it does not handle. Nobody is told."""
        self._planner.died = text
        self._is_settled = False

    def remove_adapter(self, task_id: int, now_ns: int) -> bool:
        """Remove an adapter from a vLLM engine's memory, as its Rust front end asks; return False if it is not there.

        One in use is read again for the next step.
        """
        self._catch_up(now_ns)
        self._disturb(now_ns)
        return self._planner.remove_adapter(task_id)

    def lose_idle_adapters(self) -> None:
        """Inject a fault: evict every adapter from the host cache that no request holds."""
        self._planner.lose_idle_adapters()

    def drain_failures(self) -> list[Failure]:
        """Return the requests that ended without finishing since the last call."""
        failures, self._planner.failures = self._planner.failures, []
        return failures

    def drain_reads(self) -> list[int]:
        """Return the adapters that the iteration just begun reads from files; only vLLM and PyTorch engines do that."""
        return self._planner.drain_reads()

    def begin(self, now_ns: int) -> Iteration | None:
        """Fetch, schedule and move adapters; return None if nothing can run. Call `drain_failures` afterwards."""
        batch = self._begin(now_ns)
        if batch is None:
            return None
        return Iteration(self._iterations, batch.context_ids, self._planner.generation_ids(), self._ends_ns - now_ns)

    def finish(self, iteration: Iteration, now_ns: int, ended: Collection[int] = ()) -> list[Ending]:
        """End the step: each of its requests has one more token, and `ended` have their last one; return the endings.

        Requests that reach their limit of new tokens end too.
        """
        assert self._running is not None, "no iteration is running"
        assert iteration.index == self._iterations, "not the running iteration"
        return list(self._finish(self._running, now_ns, ended)[1])

    def advance(self, until_ns: int) -> list[Output]:
        """Run up to a time and return the outputs. An iteration that ends later is finished by a later call."""
        outputs: list[Output] = []
        while True:
            if self._running is None:
                outputs.extend(Output(event.at_ns, failures=event.failures) for event in self._start(until_ns))
            if self._running is None or self._ends_ns > until_ns:
                return outputs
            batch, at_ns = self._running, self._ends_ns
            tokens = batch.context_ids + self._planner.generation_ids()
            endings = self._finish(batch, at_ns)[1]
            outputs.append(Output(at_ns, tokens, tuple(endings), tuple(self.drain_failures())))
            if ends := self._repeat(until_ns):
                tokens = self._planner.generation_ids()
                outputs.extend(Output(end_ns, tokens) for end_ns in ends)

    def run(self, until_ns: int) -> Event | None:
        """Run to the first step end up to a time at which a first token or an ending came out; None without one.

        The next iteration has not begun then, so a request submitted at the event's time takes part in it. Requests
        that fail when they are fetched are an event of their own, at the beginning of the iteration that fetched them,
        which has begun.
        """
        self._is_run = True
        if self._events:
            return self._events.popleft() if self._events[0].at_ns <= until_ns else None
        return self._run(until_ns, until_ns)

    def next_event_ns(self) -> int | None:
        """Return a lower bound on the time of the next event of `run`; None until a request is submitted or cancelled.

        It is exact for a step in which a request starts, and otherwise as close as growing step times allow.
        """
        if self._events:
            return self._events[0].at_ns
        batch = self._running
        if batch is None:
            return None if self._is_idle() else self._clock_ns
        if not self._is_settled or self._leaving or self._planner.failures:
            return self._ends_ns
        steps = min(batch.repeats, self._planner.steps_to_ending() - 1)
        return self._ends_ns + (int(steps * self._cost.step_ns(batch.step) * STEADY) if steps else 0)

    def generated(self, request_id: int) -> int:
        """Return how many tokens a request has; 0 while it waits and for an unknown id."""
        return self._planner.generated(request_id)

    def progress(self) -> dict[int, int]:
        """Return the tokens of each active request by id."""
        return self._planner.progress()

    def next_change_ns(self) -> int | None:
        """Return the earliest time at which `advance` can have output; None until something is submitted or ends."""
        if self._running is not None:
            return self._ends_ns
        return None if self._is_idle() else self._clock_ns

    def has_adapter(self, task_id: int) -> bool:
        """Return True if a request with this id alone would find its adapter."""
        return self._planner.has_adapter(task_id)

    def payload(self, task_id: int) -> object | None:
        """Return the weights that the engine computes a task with, or None."""
        return self._planner.payload(task_id)

    @property
    def died(self) -> str | None:
        """Why the engine's loop has ended without a word to anyone; None while it runs."""
        return self._planner.died

    @property
    def counters(self) -> Counters:
        """The values that the engine's gauges show now."""
        batch, use = self._batch, self._planner.use()
        context = len(batch.context_ids) if batch else 0
        generation = batch.step.decoding if batch else 0
        return Counters(
            active=use.active,
            waiting=len(self._planner.queue) + use.waiting,
            scheduled=context + generation,
            context=context,
            generation=generation,
            paused=use.paused,
            context_tokens=batch.step.context_tokens if batch else 0,
            kv_max_blocks=self.spec.kv_blocks,
            kv_used_blocks=use.kv_blocks,
            iteration_counter=self._iterations,
            host_pages_used=use.host_pages,
            device_pages_used=use.device_pages,
            host_evictions=use.host_evictions,
            device_evictions=use.device_evictions,
            known_adapters=use.known,
            known_bytes=use.known_bytes,
        )

    def _begin(self, now_ns: int) -> Batch | None:
        assert self._running is None, "an iteration is running"
        self._clock_ns = now_ns
        waited_ns = 0
        if not self._is_settled:
            self._batch = self._planner.plan(now_ns)
            self._is_settled = True
            waited_ns = self._batch.waited_ns if self._batch else 0
        elif self._batch is not None:
            self._batch.repeats -= 1
        batch = self._running = self._batch
        if batch is not None:
            self._iterations += 1
            self._ends_ns = now_ns + waited_ns + self._cost.step_ns(batch.step)
        return batch

    def _finish(self, batch: Batch, now_ns: int, ended: Collection[int] = ()) -> tuple[Sequence[int], Sequence[Ending]]:
        """End the running iteration; return (ids with their first token, endings)."""
        self._running, self._clock_ns = None, now_ns
        started, endings = self._planner.take_tokens(now_ns, ended)
        batch.grow(1)
        self._is_settled = self._is_settled and not endings and batch.repeats > 0
        self._release_leaving(now_ns)
        return started, endings

    def _is_idle(self) -> bool:
        return self._is_settled and self._batch is None and not self._planner.failures

    def _start(self, until_ns: int) -> list[Event]:
        """Begin an iteration at the clock if that is by `until_ns`; return its fetch failures as an event, if any."""
        at_ns = self._clock_ns
        if at_ns > until_ns or self._is_idle():
            return []
        self._begin(at_ns)
        return [Event(at_ns, failures=tuple(self.drain_failures()))] if self._planner.failures else []

    def _run(self, until_ns: int, begin_until_ns: int) -> Event | None:
        """Return the next event up to a time, with iterations that begin up to another time."""
        while True:
            if self._running is None:
                for event in self._start(begin_until_ns):
                    return event
            if self._running is None or self._ends_ns > until_ns:
                return None
            at_ns = self._ends_ns
            started, endings = self._finish(self._running, at_ns)
            if started or endings or self._planner.failures:
                return Event(at_ns, tuple(started), tuple(endings), tuple(self.drain_failures()))
            self._repeat(until_ns)

    def _repeat(self, until_ns: int) -> list[int]:
        """Repeat the batch while nothing can change and steps end by `until_ns`; return when the steps ended."""
        batch = self._batch
        if batch is None or not self._is_settled:
            return []
        ends = self._quiet_ends(batch.step, min(batch.repeats, self._planner.steps_to_ending() - 1), until_ns)
        if ends:
            self._planner.skip(len(ends))
            batch.grow(len(ends))
            batch.repeats -= len(ends)
            self._clock_ns = ends[-1]
            self._iterations += len(ends)
            self._is_settled = batch.repeats > 0
        return ends

    def _quiet_ends(self, step: StepBatch, limit: int, until_ns: int) -> list[int]:
        """Return the end times, up to `until_ns`, of at most `limit` steps that only decode."""
        ends: list[int] = []
        end_ns, step_ns = self._clock_ns, self._cost.step_ns
        _, _, decoding, contexts, distinct, adapted, modules = step
        while len(ends) < limit:
            end_ns += step_ns(StepBatch(0, 0, decoding, contexts, distinct, adapted, modules))
            if end_ns > until_ns:
                break
            ends.append(end_ns)
            contexts += decoding
        return ends

    def _catch_up(self, now_ns: int) -> None:
        """Run to a time at which a call comes from outside, which takes part in an iteration that begins then.

        A caller that keeps to `next_event_ns` causes no events here; any are kept for `run`.
        """
        if not self._is_run:
            return
        while (event := self._run(now_ns, now_ns - 1)) is not None:
            self._events.append(event)

    def _release_leaving(self, now_ns: int) -> None:
        leaving, self._leaving = self._leaving, []
        for request_id in leaving:
            if self._planner.drop(request_id, now_ns):
                self._planner.failures.append(Failure(request_id, CANCELLED, cancelled=True))
                self._is_settled = False

    def _disturb(self, now_ns: int) -> None:
        """Note a change from outside: plan anew, and not before now if the engine was idle."""
        self._is_settled = False
        if self._running is None and self._batch is None:
            self._clock_ns = max(self._clock_ns, now_ns)
