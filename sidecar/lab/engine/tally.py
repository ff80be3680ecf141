"""The adapters that running requests use, counted when a request starts and ends."""

from __future__ import annotations

from collections.abc import Callable


class Tally:
    """Running requests by adapter, the adapters that came and went since the last look, and their module counts.

    `requests` is the number of running requests with an adapter.
    """

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.requests = 0
        self._modules: dict[int, int] = {}
        self._having: dict[int, int] = {}
        self._entered: dict[int, None] = {}
        self._left: dict[int, None] = {}

    def enter(self, task_id: int, modules_of: Callable[[int], int]) -> bool:
        """Count a request of an adapter that starts; return True if it is the only one."""
        self.requests += 1
        count = self.counts.get(task_id, 0)
        self.counts[task_id] = count + 1
        if count:
            return False
        modules = self._modules[task_id] = modules_of(task_id)
        self._having[modules] = self._having.get(modules, 0) + 1
        self._left.pop(task_id, None)
        self._entered[task_id] = None
        return True

    def leave(self, task_id: int) -> bool:
        """Count a request of an adapter that is over; return True if it was the last."""
        self.requests -= 1
        count = self.counts[task_id] - 1
        if count:
            self.counts[task_id] = count
            return False
        del self.counts[task_id]
        modules = self._modules.pop(task_id)
        self._having[modules] -= 1
        if not self._having[modules]:
            del self._having[modules]
        self._entered.pop(task_id, None)
        self._left[task_id] = None
        return True

    def modules(self) -> int:
        """Return the largest number of module kinds of one adapter in use."""
        return max(self._having, default=0)

    def drain_changes(self) -> tuple[list[int], list[int]]:
        """Return the adapters that came into use since the last call, and those that went out of use.

        An adapter that left and came back in between counts as having come.
        """
        changes = list(self._entered), list(self._left)
        self._entered.clear()
        self._left.clear()
        return changes
