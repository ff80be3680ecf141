"""The capacity and micro-batch schedulers of TensorRT-LLM: which active requests run in this iteration.

After `capacityScheduler.cpp` and `microBatchScheduler.cpp`. An adapter's pages count once however many requests share
it, against **all** device pages, because a batch may evict what is not in it. The policies differ when something does
not fit:

* guaranteed_no_evict (and static_batch): a started request can always finish. A pending one that lacks KV blocks stops
  the walk; one that lacks only adapter pages is skipped, so later ones overtake it.
* max_utilization: a request that does not fit pauses the last started request behind it and tries again; with none
  behind it, the walk stops. So a lack of adapter pages blocks the queue and can pause running requests.
* max_requests, for models without a KV cache: seats only; adapter pages are ignored.
* strict_fifo, which TensorRT-LLM does not have: guaranteed_no_evict without overtaking, for comparison.

Not modelled: chunked context, KV reuse, beams, draft tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Active:
    """A fetched request. `started` means that its KV blocks are held; a paused one is not started.

    `length` is the tokens of its prompt and of its output: all are computed again after a pause. It may generate
    `max_new_tokens` and ends by itself after `stop_after` of them, if that is known.
    """

    request_id: int
    priority: float
    arrival: int
    input_tokens: int
    max_new_tokens: int
    task_id: int | None = None
    pages: int = 0
    generated: int = 0
    started: bool = False
    paused: bool = False
    stop_after: int | None = None

    @property
    def ends_after(self) -> int:
        """The output tokens after which it ends by itself."""
        return self.max_new_tokens if self.stop_after is None else min(self.stop_after, self.max_new_tokens)

    @property
    def length(self) -> int:
        """Tokens of the sequence so far."""
        return self.input_tokens + self.generated


@dataclass(frozen=True)
class Room:
    """What a batch may use: seats, KV blocks and their size, device pages."""

    seats: int
    kv_blocks: int
    tokens_per_block: int
    device_pages: int


@dataclass(frozen=True)
class Schedule:
    """What fits, in the order of the active list, and what must give up its KV blocks."""

    fitting: list[Active] = field(default_factory=list)
    paused: list[Active] = field(default_factory=list)


Scheduler = Callable[[Sequence[Active], Room], Schedule]


def arrival_order(active: Active) -> tuple[float, int]:
    """Return the sort key of the active list: priority first, then arrival."""
    return (-active.priority, active.arrival)


def blocks_held(active: Active, tokens_per_block: int) -> int:
    """Return the KV blocks of a request between two iterations; its newest token is not in the cache yet."""
    return -(-(active.length - 1) // tokens_per_block) if active.started else 0


def blocks_after_step(active: Active, tokens_per_block: int) -> int:
    """Return the KV blocks of a request once the next iteration has run."""
    return -(-active.length // tokens_per_block)


def blocks_to_completion(active: Active, tokens_per_block: int) -> int:
    """Return the KV blocks of a request that generates all it may."""
    return -(-(active.input_tokens + active.max_new_tokens) // tokens_per_block)


def guaranteed_no_evict(active: Sequence[Active], room: Room) -> Schedule:
    """Schedule all started requests, then pending ones that can run to completion beside them."""
    return _no_evict(active, room)


def strict_fifo(active: Sequence[Active], room: Room) -> Schedule:
    """Schedule as guaranteed_no_evict, but let nothing overtake a request that lacks adapter pages."""
    return _no_evict(active, room, is_strict=True)


def static_batch(active: Sequence[Active], room: Room) -> Schedule:
    """Schedule as guaranteed_no_evict, but let pending requests wait until nothing runs."""
    return _no_evict(active, room, is_static=True)


def _no_evict(active: Sequence[Active], room: Room, is_static: bool = False, is_strict: bool = False) -> Schedule:
    size = room.tokens_per_block
    fitting = [request for request in active if request.started][: room.seats]
    blocks = room.kv_blocks - sum(blocks_to_completion(request, size) for request in fitting)
    tasks = {request.task_id: request.pages for request in fitting if request.task_id is not None}
    pages = room.device_pages - sum(tasks.values())
    if is_static and fitting:
        return Schedule(fitting)
    for request in active:
        if request.started:
            continue
        blocks_needed = blocks_to_completion(request, size)
        if len(fitting) >= room.seats or blocks_needed > blocks:
            break
        is_known = request.task_id is None or request.task_id in tasks
        pages_needed = 0 if is_known else request.pages
        if pages_needed > pages:
            if is_strict:
                break
            continue
        fitting.append(request)
        blocks -= blocks_needed
        pages -= pages_needed
        if request.task_id is not None:
            tasks[request.task_id] = request.pages
    return Schedule(fitting)


def max_utilization(active: Sequence[Active], room: Room) -> Schedule:
    """Schedule as many as fit for one step; the last started ones give way to those before them."""
    size = room.tokens_per_block
    free = room.kv_blocks - sum(blocks_held(request, size) for request in active)
    pages = room.device_pages
    tasks: dict[int, None] = {}
    schedule = Schedule()
    at, end = 0, len(active)
    while at < end:
        request = active[at]
        blocks_needed = blocks_after_step(request, size) - blocks_held(request, size)
        is_known = request.task_id is None or request.task_id in tasks
        pages_needed = 0 if is_known else request.pages
        if len(schedule.fitting) < room.seats and blocks_needed <= free and pages_needed <= pages:
            schedule.fitting.append(request)
            free -= blocks_needed
            pages -= pages_needed
            if request.task_id is not None:
                tasks[request.task_id] = None
            at += 1
            continue
        end = _last_started(active, at, end)
        if end >= at:
            free += blocks_held(active[end], size)
            schedule.paused.append(active[end])
    return schedule


def _last_started(active: Sequence[Active], begin: int, end: int) -> int:
    return next((at for at in range(end - 1, begin - 1, -1) if active[at].started), begin - 1)


def max_requests(active: Sequence[Active], room: Room) -> Schedule:
    """Schedule the first requests, up to the seats."""
    return Schedule(list(active[: room.seats]))


SCHEDULERS: dict[str, Scheduler] = {
    "guaranteed_no_evict": guaranteed_no_evict,
    "max_utilization": max_utilization,
    "static_batch": static_batch,
    "max_requests": max_requests,
    "strict_fifo": strict_fifo,
    "trtllm_pytorch": guaranteed_no_evict,
}


def steps_that_fit(fitting: Sequence[Active], running: Sequence[Active], room: Room, limit: int) -> int:
    """Return how many further steps of `running` keep all of `fitting` inside the KV blocks; at most `limit`."""
    size = room.tokens_per_block
    grows = {request.request_id for request in running}
    fixed = sum(blocks_after_step(request, size) for request in fitting if request.request_id not in grows)
    lengths = [request.length for request in running]

    def fits(steps: int) -> bool:
        # The last step finds a sequence `steps - 1` tokens longer than now.
        return fixed + sum(-(-(length + steps - 1) // size) for length in lengths) <= room.kv_blocks

    if fits(limit):
        return limit
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def micro_batch(fitting: Sequence[Active], seats: int, tokens_max: int) -> tuple[list[Active], list[Active]]:
    """Return the (context, generation) requests of one step, each sorted by adapter; the first too large ends it."""
    context: list[Active] = []
    generation: list[Active] = []
    tokens = 0
    for request in fitting[:seats]:
        needed = 1 if request.started else request.length
        if tokens and tokens + needed > tokens_max:
            break
        tokens += needed
        (generation if request.started else context).append(request)
    return sorted(context, key=_adapter_order), sorted(generation, key=_adapter_order)


def _adapter_order(request: Active) -> int:
    return -1 if request.task_id is None else request.task_id
