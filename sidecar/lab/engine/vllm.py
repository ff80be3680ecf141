"""The common part of both ways of planning for vLLM: requests, refusals, and adapters.

vLLM has no fetch window: all requests wait in its scheduler, first come first served whatever their priority. Adapters
are registered by a load call (here a request with rows and no new tokens, which takes no seat) or by rows that come
with a request; a registered one that left the CPU cache is read again when a step needs it, and the step waits for
that. Prefix caching, speculation and pipelines are not modelled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from sidecar.lab.engine.batch import Use
from sidecar.lab.engine.messages import Ending, Failure, Request
from sidecar.lab.engine.pages import Row, ceil_div, footprint
from sidecar.lab.engine.spec import EngineSpec
from sidecar.lab.engine.validation import Rejected, check_model_length, check_ranks, tokens_allowed
from sidecar.lab.engine.waiting import WaitingQueue
from sidecar.pace.cost import StepCost

ENGINE_DIED = "EngineCore encountered an issue. See stack trace (above) for the root cause."
"""What the engine says; what a client is told differs by version and front end."""


@dataclass(slots=True, eq=False)
class Sequence:
    """A request in the scheduler. `order` is its position in the queue; `computed` tokens of it are in KV `blocks`.

    A preempted one loses its blocks and is computed again, including its output so far.
    """

    request_id: int
    order: int
    input_tokens: int
    ends_after: int
    reason: str
    task_id: int | None = None
    computed: int = 0
    generated: int = 0
    blocks: int = 0
    is_decoding: bool = False
    is_preempted: bool = False

    @property
    def length(self) -> int:
        """Tokens of the sequence so far."""
        return self.input_tokens + self.generated


@dataclass(frozen=True)
class Registered:
    """An adapter that was loaded once: the bytes that its copies move, and its number of module kinds."""

    size_bytes: int
    modules: int
    payload: object | None


class VllmIntake(ABC):
    """The queue, the sequences and the adapters of a vLLM engine."""

    def __init__(self, spec: EngineSpec, cost: StepCost) -> None:
        self.spec = spec
        self.queue = WaitingQueue()
        self.failures: list[Failure] = []
        self.fault: str | None = None
        self.died: str | None = None
        self._cost = cost
        self._by_id: dict[int, Sequence] = {}
        self._slots = AdapterSlots(spec.device_pages, spec.host_pages)
        self._registered: dict[int, Registered] = {}
        self._loading: list[int] = []
        self._loading_ns = 0
        self._reads: list[int] = []

    def is_active(self, request_id: int) -> bool:
        """Return True if a request is in the scheduler."""
        return request_id in self._by_id

    def drop(self, request_id: int, now_ns: int) -> bool:
        """End a request without an ending; return False if it is not here."""
        sequence = self._by_id.get(request_id)
        if sequence is not None:
            self._release(sequence)
        return sequence is not None

    def prefetch(self, task_id: int, rows: tuple[Row, ...], payload: object | None) -> None:
        """Register an adapter and load it at once."""
        self._register(task_id, rows, payload)
        self._slots.load(task_id)

    def remove_adapter(self, task_id: int) -> bool:
        """Remove an adapter from the GPU and the CPU cache; return False if it is in neither."""
        return self._slots.remove(task_id)

    def lose_idle_adapters(self) -> None:
        """Do nothing: vLLM by itself finds an adapter again that left its CPU cache."""
        return

    def drain_reads(self) -> list[int]:
        """Return the adapters that the last plan read into the CPU cache, for load calls and for its step."""
        reads, self._reads = self._reads, []
        return reads

    def has_adapter(self, task_id: int) -> bool:
        """Return True if a request with this id alone would find its adapter."""
        return task_id in self._registered

    def payload(self, task_id: int) -> object | None:
        """Return the weights that a task is computed with, or None."""
        registered = self._registered.get(task_id)
        return None if registered is None else registered.payload

    def generated(self, request_id: int) -> int:
        """Return how many tokens a request has; 0 if it is not here."""
        sequence = self._by_id.get(request_id)
        return 0 if sequence is None else self._current(sequence).generated

    def progress(self) -> dict[int, int]:
        """Return the tokens of each request that has any, by id."""
        sequences = [self._current(sequence) for sequence in self._by_id.values()]
        return {sequence.request_id: sequence.generated for sequence in sequences if sequence.generated}

    def use(self) -> Use:
        """Return what the sequences and the adapters occupy now."""
        sequences = [self._current(sequence) for sequence in self._by_id.values()]
        running = self._running_count()
        return Use(
            active=running,
            waiting=len(sequences) - running,
            paused=sum(sequence.is_preempted for sequence in sequences),
            kv_blocks=sum(self._blocks(sequence.computed) for sequence in sequences),
            host_pages=self._slots.on_cpu,
            device_pages=self._slots.on_gpu,
            host_evictions=self._slots.cpu_evictions,
            device_evictions=self._slots.gpu_evictions,
        )

    @abstractmethod
    def _release(self, sequence: Sequence) -> None:
        """Free the seat, the KV blocks and the adapter of a sequence that is over."""

    @abstractmethod
    def _join(self, sequence: Sequence) -> None:
        """Add a request to the end of the queue."""

    @abstractmethod
    def _running_count(self) -> int:
        """Return how many sequences hold a seat."""

    @abstractmethod
    def _current(self, sequence: Sequence) -> Sequence:
        """Return the sequence with its counts up to date."""

    def _blocks(self, tokens: int) -> int:
        return ceil_div(tokens, self.spec.tokens_per_block)

    def _fetch(self) -> bool:
        """Take all requests from the queue; return True if there were any."""
        self._reads.clear()
        if not self.queue:
            return False
        taken = [self.queue.pop() for _ in range(len(self.queue))]
        for request, arrival in sorted(taken, key=_arrival):
            try:
                self._admit(request, arrival)
            except Rejected as error:
                self.failures.append(Failure(request.request_id, str(error)))
        return True

    def _admit(self, request: Request, arrival: int) -> None:
        task_id = request.task_id if self.spec.lora_modules else None
        if task_id is not None:
            self._find_adapter(task_id, request)
        if task_id is not None and not request.max_new_tokens:
            self._loading.append(request.request_id)
            self._loading_ns += self._moved_ns(self._slots.load(task_id))
            return
        check_model_length(request, self.spec)
        allowed = tokens_allowed(request, self.spec)
        stops = request.stop_after is not None and request.stop_after <= allowed
        ends_after = max(1, request.stop_after or 1) if stops else allowed
        sequence = Sequence(
            request.request_id, arrival, request.input_tokens, ends_after, "eos" if stops else "length", task_id
        )
        self._by_id[request.request_id] = sequence
        self._join(sequence)

    def _find_adapter(self, task_id: int, request: Request) -> None:
        if task_id in self._registered:
            return
        if request.rows is None:
            raise Rejected(f"The model `{task_id}` does not exist.")
        check_ranks(request.rows, self.spec)
        self._register(task_id, request.rows, request.weights)

    def _register(self, task_id: int, rows: tuple[Row, ...], payload: object | None) -> None:
        size = footprint(rows, self.spec.geometry)
        self._registered[task_id] = Registered(size.slots * self.spec.slot_bytes, size.module_kinds, payload)

    def _modules(self, task_id: int) -> int:
        return self._registered[task_id].modules

    def _change(self, entering: Collection[int], leaving: Collection[int]) -> Moved:
        """Change which adapters are in use, and bring those back that are and were removed; return what moved."""
        moved, again = self._slots.change(entering, leaving), self._slots.bring_again()
        return Moved(moved.read + again, moved.copied + again)

    def _moved_ns(self, moved: Moved) -> int:
        """Return the time of all reads and copies, for which a step waits one after another."""
        sizes = self._registered
        self._reads += moved.read
        read_ns = sum(self._cost.adapter_put_ns(sizes[task_id].size_bytes) for task_id in moved.read)
        return read_ns + sum(self._cost.adapter_copy_ns(sizes[task_id].size_bytes) for task_id in moved.copied)

    def _fail_all(self) -> bool:
        """Fail everything in the scheduler after an injected fault; return True if there was one."""
        if self.fault is None or not self._by_id:
            return False
        text, self.fault = self.fault, None
        for sequence in sorted(self._by_id.values(), key=queue_order):
            self._release(sequence)
            self.failures.append(Failure(sequence.request_id, f"{ENGINE_DIED} {text}"))
        return True

    def _drain_loads(self) -> list[Ending]:
        """Return the load calls that ended with this iteration."""
        loads, self._loading = self._loading, []
        self._loading_ns = 0
        return [Ending(request_id, 0, "loaded") for request_id in loads]


def queue_order(sequence: Sequence) -> int:
    """Return the sort key of the queue: first come first served, preempted ones before all."""
    return sequence.order


def _arrival(taken: tuple[Request, int]) -> int:
    return taken[1]


class Moved(NamedTuple):
    """Adapters that were read into the CPU cache, and those that were copied to the GPU."""

    read: list[int]
    copied: list[int]


class AdapterSlots:
    """The adapters on the GPU and in the CPU cache."""

    def __init__(self, on_gpu: int, on_cpu: int) -> None:
        self.gpu_evictions = 0
        self.cpu_evictions = 0
        self._gpu_size = on_gpu
        self._cpu_size = on_cpu
        self._in_use: dict[int, None] = {}
        self._removed: set[int] = set()
        """Removed ones that are in use."""
        # Not in use, least recently used first: on the GPU, and on the CPU only.
        self._gpu: OrderedDict[int, None] = OrderedDict()
        self._cpu: OrderedDict[int, None] = OrderedDict()

    @property
    def on_gpu(self) -> int:
        """Slots that hold an adapter."""
        return len(self._in_use) + len(self._gpu)

    @property
    def on_cpu(self) -> int:
        """Adapters in the CPU cache, including those on the GPU."""
        return self.on_gpu + len(self._cpu)

    def change(self, entering: Collection[int], leaving: Collection[int]) -> Moved:
        """Change which adapters are in use, both lists in order of id, and return what moved.

        One in use may enter again. The caller ensures that there are slots for all in use.
        """
        moved = Moved([], [])
        for task_id in leaving:
            del self._in_use[task_id]
            if task_id in self._removed:
                self._removed.discard(task_id)
            else:
                self._gpu[task_id] = None
        for task_id in entering:
            if task_id not in self._in_use:
                self._bring(task_id, moved)
                self._in_use[task_id] = None
        self._shrink()
        return moved

    def load(self, task_id: int) -> Moved:
        """Load an adapter that will be needed soon, as the most recently used one that is not in use."""
        moved = Moved([], [])
        if task_id not in self._in_use:
            self._bring(task_id, moved)
            self._gpu[task_id] = None
            self._shrink()
        return moved

    def remove(self, task_id: int) -> bool:
        """Remove an adapter; return False if it is not here. One that is in use is needed again by the next step."""
        if task_id in self._in_use:
            self._removed.add(task_id)
            return True
        return any(tier.pop(task_id, 0) is None for tier in (self._gpu, self._cpu))

    def bring_again(self) -> list[int]:
        """Bring the removed ones that are in use back, and return them: they are read and copied."""
        again = sorted(self._removed)
        self._removed.clear()
        return again

    def _bring(self, task_id: int, moved: Moved) -> None:
        if task_id in self._gpu:
            del self._gpu[task_id]
            return
        moved.copied.append(task_id)
        if task_id in self._cpu:
            del self._cpu[task_id]
        else:
            moved.read.append(task_id)

    def _shrink(self) -> None:
        while self._gpu and self.on_gpu > self._gpu_size:
            task_id, _ = self._gpu.popitem(last=False)
            self._cpu[task_id] = None
            self.gpu_evictions += 1
        while self._cpu and self.on_cpu > self._cpu_size:
            self._cpu.popitem(last=False)
            self.cpu_evictions += 1
