"""How requests move from the engine's queue to the active ones and later release their adapters.

It does what TensorRT-LLM's executor does when it fetches (`executorImpl.cpp`): an error there ends one request.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import replace

from sidecar.lab.engine.batch import Use
from sidecar.lab.engine.messages import Ending, Failure, Request
from sidecar.lab.engine.pages import Row, footprint
from sidecar.lab.engine.peft import PeftCache, StoreError, TaskNotCached
from sidecar.lab.engine.scheduler import Active, Room, blocks_held
from sidecar.lab.engine.spec import EngineSpec
from sidecar.lab.engine.validation import (
    Rejected,
    check_adapter,
    check_dtype,
    check_lengths,
    tokens_allowed,
)
from sidecar.lab.engine.waiting import WaitingQueue
from sidecar.pace.cost import StepCost

FETCH_ERROR = "Encountered an error when fetching new request: "
FORWARD_ERROR = "Encountered an error in forwardAsync function: "


class ForwardError(Exception):
    """The engine's step failed: every active request ends."""


class Intake(ABC):
    """The queue, the active requests and the adapter caches of an engine."""

    def __init__(self, spec: EngineSpec, cost: StepCost) -> None:
        self.spec = spec
        self.queue = WaitingQueue()
        self.by_id: dict[int, Active] = {}
        self.failures: list[Failure] = []
        self.fault: str | None = None
        self.died: str | None = None
        self._cost = cost
        self._cache_dtype: str | None = None
        self._size_caches(spec)

    def _size_caches(self, spec: EngineSpec) -> None:
        self.peft = _peft_cache(spec)
        self._slot_bytes = spec.slot_bytes if spec.lora_modules else 0
        self._room = Room(spec.max_batch_size, spec.kv_blocks, spec.tokens_per_block, spec.device_pages)

    def prefetch(self, task_id: int, rows: tuple[Row, ...], payload: object | None) -> None:
        """Put an adapter into the host cache before any request. Raises StoreError if it does not fit."""
        if self.peft is not None:
            self._choose_dtype(self.spec.dtype)
            self.peft.prefetch(task_id, rows, payload)

    def lose_idle_adapters(self) -> None:
        """Evict from the host cache every adapter that no request holds."""
        if self.peft is not None:
            self.peft.host.evict_done()

    def remove_adapter(self, task_id: int) -> bool:
        """Return False: this engine only evicts."""
        return False

    def drain_reads(self) -> list[int]:
        """Return nothing: requests bring their adapters."""
        return []

    @abstractmethod
    def release(self, request: Active, now_ns: int) -> None:
        """Free the seat, the KV blocks and the adapter of a request that is over."""

    @abstractmethod
    def _active(self) -> list[Active]:
        """Return the active requests by priority and arrival, with current token counts."""

    def is_active(self, request_id: int) -> bool:
        """Return True if a request was fetched and has not ended."""
        return request_id in self.by_id

    def generated(self, request_id: int) -> int:
        """Return how many tokens a request has; 0 if it is not active."""
        request = self.by_id.get(request_id)
        return 0 if request is None else request.generated

    def progress(self) -> dict[int, int]:
        """Return the tokens of each active request by id."""
        return {request.request_id: request.generated for request in self._active()}

    def has_adapter(self, task_id: int) -> bool:
        """Return True if a request with this id alone would find its adapter."""
        return self.peft is not None and self.peft.is_cached(task_id)

    def payload(self, task_id: int) -> object | None:
        """Return the weights that a task is computed with, the device's copy or else the host's; None without any."""
        entry = self.peft.entry(task_id) if self.peft is not None else None
        return entry.payload if entry is not None else None

    def use(self) -> Use:
        """Return what the active requests and the adapter caches occupy now."""
        active, peft = self._active(), self.peft
        return Use(
            active=len(active),
            paused=sum(request.paused for request in active),
            kv_blocks=sum(blocks_held(request, self.spec.tokens_per_block) for request in active),
            host_pages=peft.host.pages_used if peft else 0,
            device_pages=peft.device.pages_used if peft else 0,
            host_evictions=peft.host.evictions if peft else 0,
            device_evictions=peft.device.evictions if peft else 0,
        )

    def drop(self, request_id: int, now_ns: int) -> bool:
        """End an active request without an ending; return False if it is not active."""
        request = self.by_id.get(request_id)
        if request is not None:
            self.release(request, now_ns)
        return request is not None

    @abstractmethod
    def _join(self, request: Active) -> None:
        """Add a fetched request to those that wait to be scheduled."""

    @abstractmethod
    def _lowest_priority(self) -> float | None:
        """Return the lowest priority among the active requests."""

    def _fetch(self, now_ns: int) -> int:
        """Move requests from the queue to the active list; return how many were taken, failed ones included.

        Requests are taken up to the free seats; beyond them, only those of a higher priority than the lowest active
        one. A failed one does not free its seat in this pass.
        """
        if not self.queue:
            return 0
        seats, lowest = self._window()
        taken = 0
        while self._may_fetch(seats - taken, lowest):
            request, arrival = self.queue.pop()
            taken += 1
            self._admit(request, arrival, now_ns)
        return taken

    def _window(self) -> tuple[int, float | None]:
        """Return the free seats and the lowest priority among the active requests."""
        return self.spec.max_batch_size - len(self.by_id), self._lowest_priority()

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
            stop_after=request.stop_after,
        )
        self.by_id[request.request_id] = active
        self._join(active)

    def _hold_adapter(self, request: Request, now_ns: int) -> int:
        if self.peft is None:
            return 0
        self._check_adapter(request)
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

    def _check_adapter(self, request: Request) -> None:
        """Refuse rows that the engine cannot use; rows in its cache have passed before."""
        cached = (
            self.peft.host.entry(request.task_id) if self.peft is not None and request.task_id is not None else None
        )
        if cached is None or cached.rows is not request.rows:
            check_adapter(request, self.spec)

    def _choose_dtype(self, dtype: str) -> None:
        """Fix the dtype of both caches by the first weights. Both are empty then: their bytes hold other pages."""
        check_dtype(dtype, self.spec.dtype, self._cache_dtype)
        if self._cache_dtype is None and dtype != self.spec.dtype:
            self._size_caches(replace(self.spec, dtype=dtype))
        self._cache_dtype = dtype

    def _let_go(self, request: Active, now_ns: int) -> None:
        """Release the request's hold on its adapter."""
        if self.peft is not None:
            self.peft.mark_request_done(request.request_id, request.task_id, now_ns)

    def _check_step(self, context: list[Active]) -> None:
        """Raise ForwardError for an injected fault, or for a prompt that no step can hold."""
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

    def _module_kinds(self, task_id: int) -> int:
        entry = self.peft.entry(task_id) if self.peft is not None else None
        return entry.module_kinds if entry is not None else 0

    def _copies_ns(self, copied_slots: Collection[int]) -> int:
        return sum(self._cost.adapter_copy_ns(slots * self._slot_bytes) for slots in copied_slots)

    def _fail_all(self, text: str, now_ns: int) -> bool:
        failed = list(self._active())
        for request in failed:
            self.release(request, now_ns)
            self.failures.append(Failure(request.request_id, f"{FORWARD_ERROR}{text}"))
        return bool(failed)


def ending_of(request: Active, ended: Collection[int]) -> Ending:
    """Return how a request ended: at its limit, or before it at the end of its text."""
    is_over = request.request_id in ended or request.stop_after == request.generated
    return Ending(request.request_id, request.generated, "eos" if is_over else "length")


def _peft_cache(spec: EngineSpec) -> PeftCache | None:
    if not spec.lora_modules:
        return None
    return PeftCache(spec.geometry, spec.host_pages, spec.device_pages, spec.lora_put_workers)
