"""One of TensorRT-LLM's two LoRA caches: pages, and two lists of tasks.

A task (an adapter) is *in progress* while requests may need it and *done* after its last one completed. Only done
tasks are evicted, the least recently completed first. After `loraCache.cpp`, with its two ways of being full:

* nothing is done: the claim fails and nothing changes;
* something is done, but not enough: **every** done task is evicted and the claim fails all the same, because the
  engine's emptiness test looks at an iterator that its loop shadows.

Lists are ordered dicts whose last key is the list's front.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum

from sidecar.lab.engine import pages
from sidecar.lab.engine.pages import Footprint, Geometry, Placement, Row

NO_DONE_TASKS = "Cache is full. There are no done tasks to evict"
CLAIM_FAILED = "[TensorRT-LLM][ERROR] Assertion failed: pageIds.has_value()"


class ClaimError(Exception):
    """Pages could not be claimed; the text is the engine's."""


class Status(Enum):
    """The state of a task in a cache."""

    MISSING = "missing"
    PROCESSING = "processing"
    LOADED = "loaded"


@dataclass(slots=True, eq=False)
class Entry:
    """A cached adapter: its pages, its size, and whether it may be evicted.

    `done` on an entry that is not loaded yet takes effect when its load ends.
    """

    task_id: int
    rows: tuple[Row, ...]
    payload: object | None
    page_ids: tuple[int, ...]
    slots: int
    module_kinds: int
    loaded: bool = False
    in_progress: bool = True
    done: bool = False

    @property
    def size(self) -> Footprint:
        """The adapter's size in any cache of the same geometry."""
        return Footprint(len(self.page_ids), self.slots, self.module_kinds)


class PageList:
    """Free pages by id: claimed from the front, released to the front."""

    def __init__(self, pages_total: int) -> None:
        self._free = deque(range(pages_total))
        self.total = pages_total

    def __len__(self) -> int:
        return len(self._free)

    def claim(self, count: int) -> tuple[int, ...] | None:
        """Return the next `count` pages, or None if there are fewer."""
        if count > len(self._free):
            return None
        return tuple(self._free.popleft() for _ in range(count))

    def release(self, page_ids: Iterable[int]) -> None:
        """Give pages back; the last one given back is claimed next."""
        self._free.extendleft(page_ids)


class LoraCache:
    """A page cache of adapters with eviction by least recent completion."""

    def __init__(self, pages_total: int, geometry: Geometry) -> None:
        self.geometry = geometry
        self.evictions = 0
        self._free = PageList(pages_total)
        self._entries: dict[int, Entry] = {}
        self._in_progress: OrderedDict[int, None] = OrderedDict()
        self._done: OrderedDict[int, None] = OrderedDict()
        self._done_pages = 0

    @property
    def pages_claimable(self) -> int:
        """Pages that are free or hold done tasks."""
        return len(self._free) + self._done_pages

    @property
    def pages_total(self) -> int:
        """Pages of the cache, free or not."""
        return self._free.total

    @property
    def pages_used(self) -> int:
        """Pages that hold adapters, done ones included."""
        return self._free.total - len(self._free)

    @property
    def in_progress(self) -> tuple[int, ...]:
        """Tasks that cannot be evicted, most recently used first."""
        return tuple(reversed(self._in_progress))

    @property
    def done(self) -> tuple[int, ...]:
        """Tasks that can be evicted, most recently completed first; victims come from the end."""
        return tuple(reversed(self._done))

    def entry(self, task_id: int) -> Entry | None:
        """Return the entry of a task, or None."""
        return self._entries.get(task_id)

    def status(self, task_id: int) -> Status:
        """Return whether a task is here, and whether its weights are."""
        entry = self._entries.get(task_id)
        if entry is None:
            return Status.MISSING
        return Status.LOADED if entry.loaded else Status.PROCESSING

    def is_done(self, task_id: int) -> bool:
        """Return True if a task is here and may be evicted, or may be when its load ends."""
        entry = self._entries.get(task_id)
        return entry is not None and entry.done

    def put(self, task_id: int, rows: tuple[Row, ...], payload: object | None, size: Footprint | None = None) -> bool:
        """Claim pages for an adapter of a `size` that follows from `rows`; return True if it is new and must be loaded.

        A task that is here already is bumped and keeps its weights; the given ones are ignored. Raises ClaimError.
        """
        if task_id in self._entries:
            self.bump(task_id)
            return False
        needed = size or pages.footprint(rows, self.geometry)
        page_ids = self._claim(needed.pages)
        self._entries[task_id] = Entry(task_id, rows, payload, page_ids, needed.slots, needed.module_kinds)
        self._in_progress[task_id] = None
        return True

    def finish_load(self, task_id: int) -> None:
        """Note that the weights are in their pages; a task completed meanwhile becomes done now."""
        entry = self._entries[task_id]
        entry.loaded = True
        if entry.done:
            self.mark_done(task_id)

    def bump(self, task_id: int) -> None:
        """Move a needed task to the front of those in progress."""
        entry = self._entries.get(task_id)
        if entry is None:
            return
        if entry.in_progress:
            del self._in_progress[task_id]
        else:
            del self._done[task_id]
            self._done_pages -= len(entry.page_ids)
        self._in_progress[task_id] = None
        entry.in_progress = True
        entry.done = False

    def mark_done(self, task_id: int) -> None:
        """Note that a task's last request completed; unknown and done tasks stay as they are."""
        entry = self._entries.get(task_id)
        if entry is None:
            return
        entry.done = True
        if entry.in_progress and entry.loaded:
            del self._in_progress[task_id]
            self._done[task_id] = None
            self._done_pages += len(entry.page_ids)
            entry.in_progress = False

    def mark_all_done(self) -> None:
        """Mark all tasks in progress as done, in the same order."""
        for task_id in tuple(self._in_progress):
            self.mark_done(task_id)

    def evict_done(self) -> None:
        """Evict every done task."""
        if self._done:
            self._evict(self._done_pages)

    def table(self, task_id: int) -> tuple[Placement, ...]:
        """Return the placement of each row of a task; pages are ids of this cache."""
        entry = self._entries[task_id]
        placements = pages.place(entry.rows, self.geometry)
        return tuple(replace(row, page=entry.page_ids[row.page]) for row in placements)

    def _claim(self, count: int) -> tuple[int, ...]:
        if count > len(self._free):
            self._evict(count - len(self._free))
        page_ids = self._free.claim(count)
        if page_ids is None:
            raise ClaimError(CLAIM_FAILED)
        return page_ids

    def _evict(self, pages_missing: int) -> None:
        if not self._done:
            raise ClaimError(NO_DONE_TASKS)
        while self._done and pages_missing > 0:
            task_id, _ = self._done.popitem(last=False)
            victim = self._entries.pop(task_id)
            self._done_pages -= len(victim.page_ids)
            self._free.release(victim.page_ids)
            pages_missing -= len(victim.page_ids)
            self.evictions += 1
