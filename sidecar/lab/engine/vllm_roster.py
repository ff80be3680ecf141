"""vLLM's scheduler, kept up to date instead of planned anew.

As in `Roster` a step costs no work for each request: lengths follow from the number of steps. So do KV blocks:
a decoding sequence needs a new one when its length passes a multiple of the block size, so sequences are
counted by where in a block they began, and each step takes one class of them. Only when blocks run short are
the running requests walked one by one.
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

Place = tuple[int, int]


class VllmRoster(VllmIntake):
    """What `VllmPlanner` does, by changes.

    At most one running request still reads its context, the last one; the others decode, which takes no more
    seats than a step has tokens. For each that decodes `_begun` has its tokens less the steps so far.
    """

    def __init__(self, spec: EngineSpec, cost: StepCost) -> None:
        super().__init__(spec, cost)
        self._steps = 0
        self._running: dict[int, Sequence] = {}
        self._begun: dict[int, int] = {}
        self._places: dict[int, int] = {}
        self._admitted = 0
        self._reading: list[tuple[Sequence, int]] = []
        self._ends: list[tuple[int, int]] = []
        self._phases = [0] * spec.tokens_per_block
        self._contexts_tokens = 0
        self._blocks_free = spec.kv_blocks
        self._adapters = Tally()
        self._line = WaitingRequests()
        self._front = 0

    def plan(self, now_ns: int) -> Batch | None:
        """The next step, its adapters on the GPU; None when nothing can run until something changes."""
        # What nobody uses any more can be pushed out by the loads that come now.
        self._slots.change([], sorted(self._adapters.drain_changes()[1]))
        self._fetch()
        self._fail_all()
        is_complete = self._schedule_running()
        if is_complete:
            self._schedule_waiting()
        if not self._begun and not self._reading and not self._loading:
            return None
        moved = self._slots.change(*map(sorted, self._adapters.drain_changes()))
        repeats = self._repeats() if is_complete and not self._reading and not self._loading else 0
        completing = (sequence for sequence, tokens in self._reading if sequence.computed + tokens == sequence.length)
        ids = tuple(sequence.request_id for sequence in completing)
        return Batch(ids, self._step(), repeats, self._loading_ns + self._moved_ns(moved))

    def generation_ids(self) -> tuple[int, ...]:
        """Who decodes in the step that was planned last."""
        return tuple(request_id for request_id in self._running if request_id in self._begun)

    def take_tokens(self, now_ns: int, ended: Collection[int] = ()) -> tuple[list[int], list[Ending]]:
        """A step is over: who decodes, and whose context is complete, has one more token."""
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
        for sequence in sorted((self._running[request_id] for request_id in over), key=self._place):
            self._current(sequence)
            reason = "eos" if sequence.request_id in ended else sequence.reason
            endings.append(Ending(sequence.request_id, sequence.generated, reason))
            self._release(sequence)
        return started, endings

    def steps_to_ending(self) -> int:
        """Steps of the batch up to the one with which its first request ends."""
        while self._ends and not self._is_true_end():
            heappop(self._ends)
        return self._ends[0][0] - self._steps if self._ends else 1

    def skip(self, steps: int) -> None:
        """So many steps of the batch have run in which nothing but its lengths changed."""
        self._grow(steps)

    def _grow(self, steps: int) -> None:
        """Everything that decodes becomes so much longer, and takes the blocks for it."""
        size, decoding = self.spec.tokens_per_block, len(self._begun)
        rounds, rest = divmod(steps, size)
        needed = rounds * decoding + sum(self._needed(step) for step in range(self._steps, self._steps + rest))
        self._blocks_free -= needed
        self._contexts_tokens += steps * decoding
        self._steps += steps

    def _needed(self, steps: int) -> int:
        """Blocks that decoding takes in the step after so many."""
        return self._phases[-steps % self.spec.tokens_per_block]

    def _repeats(self) -> int:
        """How often the batch runs again before somebody ends or KV blocks run short."""
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
        if not self._line.remove(sequence):
            self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """A running sequence gives its seat, its blocks and its adapter back."""
        del self._running[sequence.request_id]
        del self._places[sequence.request_id]
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
        self._line.add(sequence)

    def _running_count(self) -> int:
        return len(self._running)

    def _current(self, sequence: Sequence) -> Sequence:
        begun = self._begun.get(sequence.request_id)
        if begun is not None:
            sequence.generated = begun + self._steps
            sequence.computed = sequence.length - 1
        return sequence

    def _place(self, sequence: Sequence) -> int:
        return self._places[sequence.request_id]

    def _schedule_running(self) -> bool:
        """Let the running ones go on; False if somebody was preempted."""
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
        """Give blocks in the order of running; who lacks some takes those of the last one, at worst its own.

        One that still reads its context is the last, so it is the first to go whoever lacks blocks.
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
        self._line.add(sequence)

    def _schedule_waiting(self) -> None:
        spec = self.spec
        budget = spec.max_tokens_per_step - len(self._begun) - sum(tokens for _, tokens in self._reading)
        free = self._blocks_free - self._needed(self._steps)
        free -= sum(self._blocks_for(sequence, tokens) for sequence, tokens in self._reading)
        while budget and self._line and len(self._running) < spec.max_batch_size:
            is_full = len(self._adapters.counts) >= spec.device_pages
            sequence = self._line.first_of(self._adapters.counts) if is_full else self._line.first()
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
        """A waiting sequence takes a seat."""
        self._line.remove(sequence)
        self._admitted += 1
        self._places[sequence.request_id] = self._admitted
        self._running[sequence.request_id] = sequence
        if sequence.task_id is not None:
            self._adapters.enter(sequence.task_id, self._modules)

    def _decode(self, sequence: Sequence) -> None:
        """A context is complete: its sequence has a token, and one more with every step from now on."""
        sequence.generated += 1
        sequence.is_decoding, sequence.is_preempted = True, False
        self._begun[sequence.request_id] = sequence.generated - self._steps
        self._contexts_tokens += sequence.length
        self._phases[(sequence.computed - self._steps) % self.spec.tokens_per_block] += 1
        heappush(self._ends, (self._steps + sequence.ends_after - sequence.generated, sequence.request_id))

    def _is_true_end(self) -> bool:
        """Whether the first of the endings is that of a sequence which decodes since then."""
        end, request_id = self._ends[0]
        begun = self._begun.get(request_id)
        return begun is not None and begun + end == self._running[request_id].ends_after

    def _tokens_for(self, sequence: Sequence, budget: int) -> int:
        """Tokens of a sequence that a step computes."""
        return min(sequence.length - sequence.computed, budget)

    def _blocks_for(self, sequence: Sequence, tokens: int) -> int:
        """Blocks that so many more tokens of a sequence take."""
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
    """Waiting sequences by order and, apart, by adapter. Places of those that have left are dropped when met."""

    def __init__(self) -> None:
        self._waiting: dict[int, Sequence] = {}
        self._places: list[Place] = []
        self._by_task: dict[int | None, list[Place]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """A sequence waits at its order."""
        place = (sequence.order, sequence.request_id)
        self._waiting[sequence.request_id] = sequence
        if len(self._places) > 64 + 2 * len(self._waiting):
            self._places = [place for place in self._places if self._is_here(place)]
            heapify(self._places)
        heappush(self._places, place)
        heappush(self._by_task.setdefault(sequence.task_id, []), place)

    def remove(self, sequence: Sequence) -> bool:
        """A sequence leaves; False when it is not here."""
        return self._waiting.pop(sequence.request_id, None) is not None

    def first(self) -> Sequence | None:
        """The first of all."""
        place = self._head(self._places)
        return None if place is None else self._waiting[place[1]]

    def first_of(self, task_ids: Iterable[int]) -> Sequence | None:
        """The first one that has one of these adapters, or none."""
        first = self._head_of(None)
        for task_id in task_ids:
            place = self._head_of(task_id)
            if place is not None and (first is None or place < first):
                first = place
        return None if first is None else self._waiting[first[1]]

    def _head_of(self, task_id: int | None) -> Place | None:
        places = self._by_task.get(task_id)
        if places is None:
            return None
        place = self._head(places)
        if place is None:
            del self._by_task[task_id]
        return place

    def _head(self, places: list[Place]) -> Place | None:
        while places and not self._is_here(places[0]):
            heappop(places)
        return places[0] if places else None

    def _is_here(self, place: Place) -> bool:
        sequence = self._waiting.get(place[1])
        return sequence is not None and sequence.order == place[0]
