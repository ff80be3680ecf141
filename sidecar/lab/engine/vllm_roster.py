"""Incremental planning for vLLM's scheduler.

As in `Roster` a step needs no work per request: lengths follow from the number of steps. So do KV blocks: a decoding
sequence needs a new one when its length passes a multiple of the block size, so sequences are counted by where in a
block they began, and each step takes one class of them. The running requests are walked one by one only when blocks run
short.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from heapq import heapify, heappop, heappush

from sidecar.lab.engine.batch import Batch
from sidecar.lab.engine.messages import Ending
from sidecar.lab.engine.spec import EngineSpec
from sidecar.lab.engine.tally import Tally
from sidecar.lab.engine.vllm import Sequence, VllmIntake
from sidecar.pace.cost import StepBatch, StepCost

Entry = tuple[int, int]
"""(order, request id)."""


class VllmRoster(VllmIntake):
    """Plans what `VllmPlanner` plans, by changes.

    At most one running request, the last one, still reads its context; the others decode, which takes no more seats
    than a step has tokens. `_begun` holds for each decoding one its tokens less the steps so far.
    """

    def __init__(self, spec: EngineSpec, cost: StepCost) -> None:
        super().__init__(spec, cost)
        self._steps = 0
        self._running: dict[int, Sequence] = {}
        self._begun: dict[int, int] = {}
        self._admissions: dict[int, int] = {}
        self._admitted = 0
        self._reading: list[tuple[Sequence, int]] = []
        self._ends: list[tuple[int, int]] = []
        self._phases = [0] * spec.tokens_per_block
        self._contexts_tokens = 0
        self._blocks_free = spec.kv_blocks
        self._adapters = Tally()
        self._waiting = WaitingRequests()
        self._front = 0

    def plan(self, now_ns: int) -> Batch | None:
        """Return the next step with its adapters on the GPU; None if nothing can run until something changes."""
        # Adapters without users can be evicted by the loads that follow.
        self._slots.change([], sorted(self._adapters.drain_changes()[1]))
        self._fetch()
        self._fail_all()
        is_complete = self._schedule_running()
        if is_complete:
            self._schedule_waiting()
        if not self._begun and not self._reading and not self._loading:
            return None
        moved = self._change(*map(sorted, self._adapters.drain_changes()))
        repeats = self._repeats() if is_complete and not self._reading and not self._loading else 0
        completing = (sequence for sequence, tokens in self._reading if sequence.computed + tokens == sequence.length)
        ids = tuple(sequence.request_id for sequence in completing)
        return Batch(ids, self._step(), repeats, self._loading_ns + self._moved_ns(moved))

    def generation_ids(self) -> tuple[int, ...]:
        """Return the ids of the requests that decode in the last planned step."""
        return tuple(request_id for request_id in self._running if request_id in self._begun)

    def take_tokens(self, now_ns: int, ended: Collection[int] = ()) -> tuple[list[int], list[Ending]]:
        """Account for a step in which decoding sequences and those with a complete context got one token."""
        self._grow(1)
        started, endings = [], self._drain_loads()
        for sequence, tokens in self._reading:
            self._blocks_free -= self._blocks_for(sequence, tokens)
            sequence.computed += tokens
            if sequence.computed == sequence.length:
                if not sequence.generated:
                    started.append(sequence.request_id)
                self._decode(sequence)
        self._reading = []
        over = {request_id: None for request_id in ended if request_id in self._begun}
        while self._ends and self._ends[0][0] <= self._steps:
            if self._is_true_end():
                over[self._ends[0][1]] = None
            heappop(self._ends)
        for sequence in sorted((self._running[request_id] for request_id in over), key=self._admission):
            self._current(sequence)
            reason = "eos" if sequence.request_id in ended else sequence.reason
            endings.append(Ending(sequence.request_id, sequence.generated, reason))
            self._release(sequence)
        return started, endings

    def steps_to_ending(self) -> int:
        """Return the number of steps of the batch up to the first ending."""
        while self._ends and not self._is_true_end():
            heappop(self._ends)
        return self._ends[0][0] - self._steps if self._ends else 1

    def skip(self, steps: int) -> None:
        """Account for steps of the batch in which only lengths changed."""
        self._grow(steps)

    def _grow(self, steps: int) -> None:
        """Lengthen everything that decodes by `steps` tokens, and take the blocks for it."""
        size, decoding = self.spec.tokens_per_block, len(self._begun)
        rounds, rest = divmod(steps, size)
        needed = rounds * decoding + sum(self._needed(step) for step in range(self._steps, self._steps + rest))
        self._blocks_free -= needed
        self._contexts_tokens += steps * decoding
        self._steps += steps

    def _needed(self, steps: int) -> int:
        """Return the blocks that decoding takes in the step after this many."""
        return self._phases[-steps % self.spec.tokens_per_block]

    def _repeats(self) -> int:
        """Return how often the batch repeats before a request ends or KV blocks run short."""
        limit = self.steps_to_ending()
        free = self._blocks_free - self._needed(self._steps)
        rounds, free = divmod(free, len(self._begun))
        steps = rounds * self.spec.tokens_per_block
        while steps < limit:
            free -= self._needed(self._steps + 1 + steps)
            if free < 0:
                break
            steps += 1
        return min(steps, limit)

    def _release(self, sequence: Sequence) -> None:
        del self._by_id[sequence.request_id]
        if not self._waiting.remove(sequence):
            self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Give back the seat, the blocks and the adapter of a running sequence."""
        del self._running[sequence.request_id]
        del self._admissions[sequence.request_id]
        begun = self._begun.pop(sequence.request_id, None)
        if begun is not None:
            sequence.generated = begun + self._steps
            sequence.computed = sequence.length - 1
            self._contexts_tokens -= sequence.length
            self._phases[(sequence.computed - self._steps) % self.spec.tokens_per_block] -= 1
        self._blocks_free += self._blocks(sequence.computed)
        sequence.is_decoding = False
        if sequence.task_id is not None:
            self._adapters.leave(sequence.task_id)

    def _join(self, sequence: Sequence) -> None:
        self._waiting.add(sequence)

    def _running_count(self) -> int:
        return len(self._running)

    def _current(self, sequence: Sequence) -> Sequence:
        begun = self._begun.get(sequence.request_id)
        if begun is not None:
            sequence.generated = begun + self._steps
            sequence.computed = sequence.length - 1
        return sequence

    def _admission(self, sequence: Sequence) -> int:
        return self._admissions[sequence.request_id]

    def _schedule_running(self) -> bool:
        """Let the running requests continue; return False if one was preempted."""
        self._reading = []
        needed = self._needed(self._steps)
        last = next(reversed(self._running.values()), None)
        tokens = 0
        if last is not None and last.request_id not in self._begun:
            tokens = self._tokens_for(last, self.spec.max_tokens_per_step - len(self._begun))
            needed += self._blocks_for(last, tokens)
        if needed > self._blocks_free:
            self._preempt_for_room()
            return False
        if last is not None and tokens:
            self._reading.append((last, tokens))
        return True

    def _preempt_for_room(self) -> None:
        """Give blocks in running order; a request that lacks some takes those of the last one, at worst its own.

        One that still reads its context is the last, so it is the first to be preempted whichever lacks blocks.
        """
        order = list(self._running.values())
        if order[-1].request_id not in self._begun:
            self._preempt(order.pop())
        taken = 0
        while order:
            sequence = self._current(order.pop(0))
            needed = self._blocks_for(sequence, 1)
            while order and taken + needed > self._blocks_free:
                self._preempt(order.pop())
            if taken + needed > self._blocks_free:
                self._preempt(sequence)
            taken += needed

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        self._front -= 1
        sequence.order, sequence.computed, sequence.is_preempted = self._front, 0, True
        self._waiting.add(sequence)

    def _schedule_waiting(self) -> None:
        spec = self.spec
        budget = spec.max_tokens_per_step - len(self._begun) - sum(tokens for _, tokens in self._reading)
        free = self._blocks_free - self._needed(self._steps)
        free -= sum(self._blocks_for(sequence, tokens) for sequence, tokens in self._reading)
        while budget and self._waiting and len(self._running) < spec.max_batch_size:
            is_full = len(self._adapters.counts) >= spec.device_pages
            sequence = self._waiting.first_of(self._adapters.counts) if is_full else self._waiting.first()
            if sequence is None:
                return
            tokens = self._tokens_for(sequence, budget)
            needed = self._blocks_for(sequence, tokens)
            if needed > free:
                return
            budget -= tokens
            free -= needed
            self._enter(sequence)
            self._reading.append((sequence, tokens))

    def _enter(self, sequence: Sequence) -> None:
        """Give a waiting sequence a seat."""
        self._waiting.remove(sequence)
        self._admitted += 1
        self._admissions[sequence.request_id] = self._admitted
        self._running[sequence.request_id] = sequence
        if sequence.task_id is not None:
            self._adapters.enter(sequence.task_id, self._modules)

    def _decode(self, sequence: Sequence) -> None:
        """Start to decode a sequence with a complete context: it has a token, and gets one more with every step."""
        sequence.generated += 1
        sequence.is_decoding, sequence.is_preempted = True, False
        self._begun[sequence.request_id] = sequence.generated - self._steps
        self._contexts_tokens += sequence.length
        self._phases[(sequence.computed - self._steps) % self.spec.tokens_per_block] += 1
        heappush(self._ends, (self._steps + sequence.ends_after - sequence.generated, sequence.request_id))

    def _is_true_end(self) -> bool:
        """Return True if the first of the endings is that of a sequence that has decoded since then."""
        end, request_id = self._ends[0]
        begun = self._begun.get(request_id)
        return begun is not None and begun + end == self._running[request_id].ends_after

    def _tokens_for(self, sequence: Sequence, budget: int) -> int:
        """Return the tokens of a sequence that a step computes."""
        return min(sequence.length - sequence.computed, budget)

    def _blocks_for(self, sequence: Sequence, tokens: int) -> int:
        """Return the blocks that `tokens` more tokens of a sequence take."""
        return self._blocks(sequence.computed + tokens) - self._blocks(sequence.computed)

    def _step(self) -> StepBatch:
        adapters = self._adapters
        return StepBatch(
            sum(tokens for _, tokens in self._reading),
            len(self._reading),
            len(self._begun),
            self._contexts_tokens,
            len(adapters.counts),
            adapters.requests,
            adapters.modules(),
        )


class WaitingRequests:
    """Waiting sequences by order and, separately, by adapter. Stale heap entries are dropped at the top."""

    def __init__(self) -> None:
        self._waiting: dict[int, Sequence] = {}
        self._heap: list[Entry] = []
        self._by_task: dict[int | None, list[Entry]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Add a sequence at its order."""
        entry = (sequence.order, sequence.request_id)
        self._waiting[sequence.request_id] = sequence
        if len(self._heap) > 64 + 2 * len(self._waiting):
            self._heap = [entry for entry in self._heap if self._is_here(entry)]
            heapify(self._heap)
        heappush(self._heap, entry)
        heappush(self._by_task.setdefault(sequence.task_id, []), entry)

    def remove(self, sequence: Sequence) -> bool:
        """Remove a sequence; return False if it is not here."""
        return self._waiting.pop(sequence.request_id, None) is not None

    def first(self) -> Sequence | None:
        """Return the first sequence of all, or None."""
        entry = self._head(self._heap)
        return None if entry is None else self._waiting[entry[1]]

    def first_of(self, task_ids: Iterable[int]) -> Sequence | None:
        """Return the first sequence with one of these adapters or without one, or None."""
        first = self._head_of(None)
        for task_id in task_ids:
            entry = self._head_of(task_id)
            if entry is not None and (first is None or entry < first):
                first = entry
        return None if first is None else self._waiting[first[1]]

    def _head_of(self, task_id: int | None) -> Entry | None:
        heap = self._by_task.get(task_id)
        if heap is None:
            return None
        entry = self._head(heap)
        if entry is None:
            del self._by_task[task_id]
        return entry

    def _head(self, heap: list[Entry]) -> Entry | None:
        while heap and not self._is_here(heap[0]):
            heappop(heap)
        return heap[0] if heap else None

    def _is_here(self, entry: Entry) -> bool:
        sequence = self._waiting.get(entry[1])
        return sequence is not None and sequence.order == entry[0]
