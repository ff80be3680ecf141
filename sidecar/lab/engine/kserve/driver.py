"""The task that owns the engine: begin an iteration, execute it, wait until its time is over, deliver.

Handlers leave commands in an inbox that is emptied between iterations, as the executor's own loop looks at its queue
and at cancellations; nothing else touches the engine.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from sidecar.lab.engine.engine import Engine
from sidecar.lab.engine.kserve.compute import Compute
from sidecar.lab.engine.kserve.errors import FETCH_ERROR, BackendError
from sidecar.lab.engine.kserve.faults import Faults
from sidecar.lab.engine.kserve.served import ServedLog
from sidecar.lab.engine.kserve.work import Progress, Work
from sidecar.lab.engine.messages import Failure, Iteration, QueueFull, Request

_LATE_NS = 5_000_000
"""A step begins where the last one was planned to end if it is no later than this: sleeps overshoot."""
_IDLE_NS = 1_000_000
"""The shortest wait while the engine has work that it cannot schedule."""


class Executor(Protocol):
    """Runs requests: one engine's driver, or several equal instances."""

    @property
    def engine(self) -> Engine:
        """The engine, or the first of them."""

    @property
    def has_log_probs(self) -> bool:
        """True if requests may ask for log probabilities."""

    def has_adapter(self, task_id: int) -> bool:
        """Return True if a request with this id alone would find its adapter, whichever engine it goes to."""

    async def submit(self, work: Work) -> None:
        """Hand over a request. Raises BackendError if the queue is full or the executor has stopped."""

    def cancel(self, request_ids: Sequence[int]) -> None:
        """Ask for requests to be ended; unknown ones are ignored."""


class Driver:
    """Runs one engine in real time. It is made and used in one event loop.

    `check` returns the executor's error text for a request whose tensors are refused before it is queued. `instance` is
    the engine's number in its server, for the log.
    """

    def __init__(
        self,
        engine: Engine,
        compute: Compute,
        faults: Faults,
        log: ServedLog,
        check: Callable[[Work], str | None],
        slow_factor: float = 1.0,
        instance: int = 0,
    ) -> None:
        self.engine = engine
        self.reported_ns = 0
        """When the last iteration ended; an engine writes its gauges then."""
        self._instance = instance
        self._compute = compute
        self._faults = faults
        self._log = log
        self._check = check
        self._slow_factor = slow_factor
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = asyncio.Event()
        self._works: dict[int, Work] = {}
        self._opened: dict[int, Work] = {}
        self._taking: dict[int, asyncio.Future[None]] = {}
        self._broken: str | None = None
        self._planned_end_ns = 0
        self._iterations = 0

    @property
    def has_log_probs(self) -> bool:
        """True if requests may ask for log probabilities."""
        return self._compute.has_log_probs

    def has_adapter(self, task_id: int) -> bool:
        """Return True if a request with this id alone would find its adapter."""
        return self.engine.has_adapter(task_id)

    async def submit(self, work: Work) -> None:
        """Hand a request to the executor's queue. Raises BackendError if it is full or the executor has stopped."""
        if self._broken is not None:
            raise BackendError(self._broken)
        taken = asyncio.get_running_loop().create_future()
        self._taking[work.request_id] = taken
        try:
            self._post(partial(self._submit, work, taken))
            await taken
        finally:
            del self._taking[work.request_id]

    def cancel(self, request_ids: Sequence[int]) -> None:
        """Ask the executor to end requests; unknown ones are ignored."""
        for request_id in request_ids:
            self._post(partial(self._cancel, request_id))

    async def run(self) -> None:
        """Run until cancelled. An error ends the loop and every request with its text."""
        try:
            while not self._faults.frozen(self._iterations):
                await self._iterate()
            await asyncio.Event().wait()
        except Exception as error:
            self._break(f"Encountered an error in forwardAsync function: {error}")
            raise

    async def _iterate(self) -> None:
        while self._inbox:
            self._inbox.popleft()()
        iteration = self.engine.begin(_now_ns())
        self._fail(self.engine.drain_failures())
        if iteration is None:
            await self._idle()
        else:
            await self._execute(iteration)

    async def _execute(self, iteration: Iteration) -> None:
        ids = (*iteration.context, *iteration.generation)
        started_ns = self._start_ns()
        self._open_new(ids, started_ns)
        tokens = await self._compute.step(ids)
        self._planned_end_ns = started_ns + int(iteration.duration_ns * self._slow_factor)
        await asyncio.sleep(max(0, self._planned_end_ns - _now_ns()) / 1e9)
        self._iterations += 1
        self._deliver(iteration, tokens)
        self.reported_ns = _now_ns()

    def _deliver(self, iteration: Iteration, tokens: dict[int, int]) -> None:
        now_ns = _now_ns()
        ended = [i for i, token in tokens.items() if token == self._works[i].generation.end_id]
        endings = {ending.request_id for ending in self.engine.finish(iteration, now_ns, ended)}
        stopped = set(ended)
        for request_id, token in tokens.items():
            work = self._works[request_id]
            _stamp(work, now_ns)
            delivered = None if request_id in stopped else token
            if delivered is not None:
                self._record(work, delivered)
            final = request_id in endings
            if final:
                self._forget(work, "done")
            work.sink(Progress(work, delivered, final))
        self._fail(self.engine.drain_failures())

    def _record(self, work: Work, token: int) -> None:
        work.tokens.append(token)
        if work.generation.log_probs:
            work.log_probs.append(self._compute.log_prob_of(work.request_id, token))

    def _cancel(self, request_id: int) -> None:
        self.engine.cancel(request_id, _now_ns())

    def _submit(self, work: Work, taken: asyncio.Future[None]) -> None:
        if taken.cancelled():
            return
        work.arrival_ns = _now_ns()
        self._works[work.request_id] = work
        error = self._check(work) or self._faults.at_put(work)
        if error is None:
            error = self._queue(work, taken)
        if not taken.done():
            taken.set_result(None)
        if error is not None:
            self._end_with_error(work, error)

    def _queue(self, work: Work, taken: asyncio.Future[None]) -> str | None:
        """Queue a request that passed its checks; return the executor's error if its adapter cannot be computed."""
        try:
            payload = self._compute.payload_of(work) if work.brings_weights else None
        except ValueError as error:
            return f"{FETCH_ERROR}{error}"
        try:
            self.engine.submit(self._request(work, payload), work.arrival_ns)
        except QueueFull as full:
            self._forget(work, "error", str(full))
            taken.set_exception(BackendError(str(full)))
            return None
        broken = self._faults.at_first_step(work)
        if broken is not None:
            self.engine.break_next_step(broken)
        return None

    def _request(self, work: Work, payload: object | None) -> Request:
        """Return a request as the engine receives it."""
        return Request(
            request_id=work.request_id,
            input_tokens=len(work.generation.tokens),
            max_new_tokens=work.generation.max_new_tokens,
            task_id=work.task_id,
            rows=work.rows if work.brings_weights else None,
            weights=payload,
        )

    def _open_new(self, ids: Sequence[int], now_ns: int) -> None:
        for request_id in ids:
            if request_id in self._opened:
                continue
            work = self._works[request_id]
            work.scheduled_ns = max(work.arrival_ns, now_ns)
            self._compute.open(work, self._payload(work))
            self._opened[request_id] = work

    def _payload(self, work: Work) -> object | None:
        """Return what a request's adapter is computed with."""
        return None if work.task_id is None else self.engine.payload(work.task_id)

    def _break(self, error: str) -> None:
        self._broken = error
        for taken in self._taking.values():
            if not taken.done():
                taken.set_exception(BackendError(error))
        for work in list(self._works.values()):
            self._end_with_error(work, error)

    def _fail(self, failures: Sequence[Failure]) -> None:
        for failure in failures:
            work = self._works.get(failure.request_id)
            if work is None:
                continue
            if failure.cancelled:
                self._forget(work, "cancelled")
                work.sink(Progress(work, final=True))
            else:
                self._end_with_error(work, failure.text)

    def _end_with_error(self, work: Work, error: str) -> None:
        self._forget(work, "error", error)
        work.sink(Progress(work, final=True, error=error))

    def _forget(self, work: Work, outcome: str, error: str | None = None) -> None:
        work.ended = True
        del self._works[work.request_id]
        self._opened.pop(work.request_id, None)
        self._compute.close(work.request_id)
        self._log.add(work, outcome, error, self._instance)

    def _post(self, command: Callable[[], None]) -> None:
        self._inbox.append(command)
        self._wake.set()

    async def _idle(self) -> None:
        """Wait for a command, or until a load in the engine's put workers ends."""
        self._planned_end_ns = 0
        self._wake.clear()
        if self._inbox:
            return
        change_ns = self.engine.next_change_ns()
        if change_ns is None:
            await self._wake.wait()
            return
        wait_ns = max(_IDLE_NS, change_ns - _now_ns())
        try:
            async with asyncio.timeout(wait_ns / 1e9):
                await self._wake.wait()
        except TimeoutError:
            return

    def _start_ns(self) -> int:
        now_ns = _now_ns()
        return self._planned_end_ns if 0 <= now_ns - self._planned_end_ns < _LATE_NS else now_ns


def _stamp(work: Work, now_ns: int) -> None:
    work.first_token_ns = work.first_token_ns or now_ns
    work.last_token_ns = now_ns


def _now_ns() -> int:
    return time.monotonic_ns()
