"""TensorRT-LLM's PyTorch backend: its event loop with adapters that it loads itself, plain and incremental.

A request names an adapter by a number and a path. What was first read under a number is its adapter for ever: Python
keeps the packed weights (`PythonCopies`), and nothing forgets them. The loop puts an adapter into the C++ host cache
when the first context of a request is scheduled, outside any handler of errors: what C++ refuses there, and a file that
is not there any more, end the loop. Nobody is told then, requests keep their seats, and nothing runs (`died`).

The scheduler admits by pages of the device cache: generation first, then contexts in order, skipping those whose
adapter does not fit, without ageing. An adapter below the largest rank takes fewer pages, so more adapters than
`lora_slots` can meet. A step that only decodes runs as a CUDA graph with that many slots; with more adapters it fails,
and every active request with it.

Unlike the engine backend's loop (`Intake`), fetching checks nothing, so a request holds a seat while its adapter does
not fit; nothing of the device becomes evictable while a started request uses it; there are no priorities.

Not modelled: KV blocks taken from running requests (the V2 scheduler), overlap with the step before, more than one
rank, chunked context.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from sidecar.lab.engine.batch import Batch, Use
from sidecar.lab.engine.intake import ForwardError, Intake
from sidecar.lab.engine.messages import Failure, Request
from sidecar.lab.engine.pages import Footprint, Row, footprint
from sidecar.lab.engine.peft import EnsureError, StoreError
from sidecar.lab.engine.planner import Planner
from sidecar.lab.engine.roster import Roster
from sidecar.lab.engine.scheduler import Active
from sidecar.lab.engine.spec import EngineSpec
from sidecar.lab.engine.validation import Rejected, check_room, check_rows, tokens_allowed
from sidecar.lab.engine.waiting import WaitingQueue
from sidecar.pace.cost import StepCost

SLOTS_EXCEEDED = "Currently do not support batch with more LoRA task ID than loRA slot size!"
_PRIORITY = 0.5


class LoopEnded(Exception):
    """An exception that the event loop does not handle."""


@dataclass
class Known:
    """An adapter as it was first read: its rows, its size in pages, and what C++ will say against it.

    `size_bytes` is one packed copy; `copies` is how many Python keeps on rank 0: one by the submit thread, one by the
    loop.
    """

    rows: tuple[Row, ...]
    size: Footprint
    size_bytes: int
    flaw: str | None
    copies: int = 1
    is_in_loop: bool = False


class PythonCopies:
    """The adapters that Python has read, by number. Nothing is ever removed."""

    def __init__(self, spec: EngineSpec) -> None:
        self.known: dict[int, Known] = {}
        self._spec = spec

    def see(self, request: Request) -> Known | None:
        """Return the adapter of a request's number; its own rows count only if they are the first."""
        assert request.task_id is not None
        known = self.known.get(request.task_id)
        if known is None and request.rows is not None:
            rows = request.rows
            usable = tuple(row for row in rows if row.module_id in self._spec.modules)
            known = Known(rows, footprint(usable, self._spec.geometry), self._bytes(usable), request.flaw)
            self.known[request.task_id] = known
        return known

    @property
    def size_bytes(self) -> int:
        """Bytes of host memory that all copies take."""
        return sum(known.copies * known.size_bytes for known in self.known.values())

    def _bytes(self, rows: Sequence[Row]) -> int:
        """Return the bytes of packed rows, which are padded to the longest."""
        dims = self._spec.geometry.dims
        longest = max((row.rank * sum(dims[row.module_id]) for row in rows), default=0)
        return len(rows) * longest * self._spec.dtype_bytes


class _ArrivalQueue(WaitingQueue):
    """A queue in the order of arrival, whatever priorities requests have."""

    def push(self, request: Request) -> None:
        super().push(replace(request, priority=_PRIORITY))


class TorchIntake(Intake):
    """What the PyTorch backend does differently, for either way of planning."""

    _context: list[Active]

    def __init__(self, spec: EngineSpec, cost: StepCost, **options: bool) -> None:
        super().__init__(spec, cost, **options)
        self.queue = _ArrivalQueue()
        self.copies = PythonCopies(spec)
        self._brought: dict[int, Request] = {}
        self._reads: list[int] = []
        self._errors = 0

    def _unless_died(self, plan: Callable[[int], Batch | None], now_ns: int) -> Batch | None:
        """Return the next batch with its adapters on the device; None if nothing can run, for ever if it died."""
        self._reads.clear()
        if self.died is not None:
            return None
        try:
            return plan(now_ns)
        except LoopEnded as error:
            self.died = str(error)
            return None

    def use(self) -> Use:
        """Return what is occupied now, Python's copies of adapters included."""
        return replace(super().use(), known=len(self.copies.known), known_bytes=self.copies.size_bytes)

    def drain_reads(self) -> list[int]:
        """Return the adapters that the loop reads from files before the planned step."""
        reads, self._reads = self._reads, []
        return reads

    def _admit(self, request: Request, arrival: int, now_ns: int) -> None:
        task_id = request.task_id if self.peft is not None else None
        try:
            check_room(request, self.spec)
            known = None if task_id is None else self.copies.see(request)
            if task_id is not None and known is None:
                raise Rejected(f"Failed to load LoRA adapter: nothing was ever read for {task_id}")
        except Rejected as error:
            self.failures.append(Failure(request.request_id, str(error)))
            return
        pages = 0 if known is None else known.size.pages
        active = Active(
            request.request_id,
            request.priority,
            arrival,
            request.input_tokens,
            tokens_allowed(request, self.spec),
            task_id,
            pages,
            stop_after=request.stop_after,
        )
        if task_id is not None:
            self._brought[request.request_id] = request
        self.by_id[request.request_id] = active
        self._join(active)

    def _let_go(self, request: Active, now_ns: int) -> None:
        self._brought.pop(request.request_id, None)
        super()._let_go(request, now_ns)

    def _ensure(self, now_ns: int) -> int:
        """Bring the adapters of the step's contexts to the device; return how long the loop stands still for that.

        Those of the requests that decode are there: they stay in progress until their requests are over.
        """
        if self.peft is None:
            return 0
        fresh = [request for request in self._context if request.task_id is not None]
        stalled_ns = sum(self._add(request, now_ns) for request in fresh)
        try:
            ensured = self.peft.ensure_batch([_task(request) for request in fresh], now_ns, reset=False)
        except EnsureError as error:
            raise LoopEnded(str(error)) from error
        return stalled_ns + max(0, ensured.ready_ns - now_ns) + self._copies_ns(ensured.copied_slots)

    def _add(self, request: Active, now_ns: int) -> int:
        """Put a request's adapter into the C++ host cache unless it is there; return the time that a read takes."""
        assert self.peft is not None
        task_id = _task(request)
        known, brought = self.copies.known[task_id], self._brought[request.request_id]
        rows, stalled_ns = None, 0
        if not self.peft.is_cached(task_id):
            rows = known.rows
            if brought.weights is None and not known.is_in_loop:
                stalled_ns = self.spec.lora_load_ns
                self._reads.append(task_id)
                known.is_in_loop, known.copies = True, 2
            self._check(known, brought.dtype)
        put_ns = self._cost.adapter_put_ns(known.size.slots * self._slot_bytes) if rows is not None else 0
        try:
            self.peft.add_request(request.request_id, task_id, rows, brought.weights, now_ns, put_ns)
        except StoreError as error:
            raise LoopEnded(str(error)) from error
        return stalled_ns

    def _check(self, known: Known, dtype: str | None) -> None:
        """Raise LoopEnded for weights that C++ refuses to store."""
        try:
            check_rows(known.rows, self.spec)
            if known.flaw is not None:
                raise Rejected(known.flaw)
            self._choose_dtype(dtype or self.spec.dtype)
        except Rejected as error:
            raise LoopEnded(str(error)) from error

    def _check_step(self, context: list[Active]) -> None:
        super()._check_step(context)
        slots = self.spec.lora_slots
        if slots is not None and not context and len(self._decoding_tasks()) > slots:
            raise ForwardError(SLOTS_EXCEEDED)

    def _decoding_tasks(self) -> Collection[int]:
        """Return the adapters of the requests that decode in a step without contexts."""
        raise NotImplementedError

    def _fail_all(self, text: str, now_ns: int) -> bool:
        failed = list(self._active())
        for request in failed:
            self.release(request, now_ns)
            self.failures.append(Failure(request.request_id, text))
        self._errors += 1
        limit = self.spec.step_errors_max
        if limit is not None and self._errors >= limit:
            raise LoopEnded(f"Fatal error: {self._errors} steps have failed, the last one with: {text}")
        return bool(failed)


class TorchPlanner(TorchIntake, Planner):
    """Plans each batch anew: the reference."""

    def plan(self, now_ns: int) -> Batch | None:
        return self._unless_died(super().plan, now_ns)

    def _decoding_tasks(self) -> Collection[int]:
        return {request.task_id for request in self._generation if request.task_id is not None}


class TorchRoster(TorchIntake, Roster):
    """Plans the same by changes."""

    def plan(self, now_ns: int) -> Batch | None:
        return self._unless_died(super().plan, now_ns)

    def _decoding_tasks(self) -> Collection[int]:
        return self._adapters.counts


def _task(request: Active) -> int:
    assert request.task_id is not None
    return request.task_id
