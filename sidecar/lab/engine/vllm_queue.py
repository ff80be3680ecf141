"""vLLM's waiting requests: the first one in order whose adapter may run."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heapify, heappop, heappush

from sidecar.lab.engine.vllm import Sequence

Place = tuple[int, int]


class Line:
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
