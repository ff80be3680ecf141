"""vLLM's two tiers of adapters: GPU slots and the CPU cache behind them, both by least recent use.

An adapter takes one slot whatever its rank. Those of running requests are in use; the others leave in the
order of their last use, from the GPU to the CPU's tier alone and from there for good. Every step touches the
adapters of its batch in both tiers, so the GPU always holds the most recently used ones of what the CPU has
(`lora/worker_manager.py`, `lora/model_manager.py`). A load that comes while all slots are in use waits on the
CPU; vLLM takes a slot for a moment.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple


class Moved(NamedTuple):
    """Adapters that were read into the CPU cache, and those that were copied to the GPU."""

    read: list[int]
    copied: list[int]


class AdapterSlots:
    """Which adapters are on the GPU and in the CPU cache."""

    def __init__(self, on_gpu: int, on_cpu: int) -> None:
        self.gpu_evictions = 0
        self.cpu_evictions = 0
        self._gpu_size = on_gpu
        self._cpu_size = on_cpu
        self._in_use: dict[int, None] = {}
        # Not in use, the least recently used first: on the GPU, and on the CPU only.
        self._gpu: OrderedDict[int, None] = OrderedDict()
        self._cpu: OrderedDict[int, None] = OrderedDict()

    @property
    def on_gpu(self) -> int:
        """Slots that hold an adapter."""
        return len(self._in_use) + len(self._gpu)

    @property
    def on_cpu(self) -> int:
        """Adapters in the CPU cache: those on the GPU too."""
        return self.on_gpu + len(self._cpu)

    def change(self, entering: Sequence[int], leaving: Sequence[int]) -> Moved:
        """Some adapters are in use now and others are not; both in order of id.

        One that is in use may enter again. That there are slots for all in use is the caller's part.
        """
        moved = Moved([], [])
        for task_id in leaving:
            del self._in_use[task_id]
            self._gpu[task_id] = None
        for task_id in entering:
            if task_id not in self._in_use:
                self._bring(task_id, moved)
                self._in_use[task_id] = None
        self._shrink()
        return moved

    def load(self, task_id: int) -> Moved:
        """An adapter is wanted soon: the most recently used one that is not in use."""
        moved = Moved([], [])
        if task_id not in self._in_use:
            self._bring(task_id, moved)
            self._gpu[task_id] = None
            self._shrink()
        return moved

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
