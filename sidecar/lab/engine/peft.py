"""The pair of LoRA caches of an engine and the requests that hold their adapters, after `peftCacheManager.cpp`.

An adapter enters the host cache when a request with weights is fetched, and the device cache when a batch needs it. It
stays in progress on the host while any request of it is active or paused, on the device only while one is active; every
batch begins with all of the device done. Loads into the host cache run on put workers. A load that has ended is noticed
at the next call, which is equivalent, because nothing else looks at it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sidecar.lab.engine import pages
from sidecar.lab.engine.cache import ClaimError, Entry, LoraCache, Status
from sidecar.lab.engine.pages import Geometry, Row


class TaskNotCached(Exception):
    """A request brought an id only and the host cache does not have it; the client gets the text unchanged."""


class StoreError(Exception):
    """A request's adapter could not be stored in the host cache."""


class EnsureError(Exception):
    """A batch's adapters could not be brought to the device: the engine fails as a whole."""


@dataclass(frozen=True)
class Ensured:
    """The result of bringing a batch's adapters to the device: the time its loads end, and the slots of each copy."""

    ready_ns: int
    copied_slots: tuple[int, ...]


class PeftCache:
    """Host and device cache of adapters, with the requests that use them."""

    def __init__(self, geometry: Geometry, host_pages: int, device_pages: int, put_workers: int = 1) -> None:
        self.host = LoraCache(host_pages, geometry)
        self.device = LoraCache(device_pages, geometry)
        self.active: dict[int, dict[int, None]] = {}
        self.paused: dict[int, dict[int, None]] = {}
        self._puts: dict[int, int] = {}
        self._loads: list[tuple[int, int, int]] = []
        self._loads_begun = 0
        self._workers = [0] * put_workers

    def is_cached(self, task_id: int) -> bool:
        """Return True if the host has an adapter or is loading it."""
        return self.host.status(task_id) is not Status.MISSING

    def pages_of(self, task_id: int, rows: Iterable[Row] | None = None) -> int:
        """Return the pages of an adapter: the cached one's, else computed from `rows`."""
        entry = self.host.entry(task_id)
        if entry is not None:
            return len(entry.page_ids)
        return pages.pages_needed(rows or (), self.host.geometry)

    def entry(self, task_id: int) -> Entry | None:
        """Return the entry that the engine computes with: the device's copy, else the host's.

        They differ after an id was sent again with other weights while only the host had lost it.
        """
        return self.device.entry(task_id) or self.host.entry(task_id)

    def add_request(
        self,
        request_id: int,
        task_id: int,
        rows: tuple[Row, ...] | None = None,
        payload: object | None = None,
        now_ns: int = 0,
        put_ns: int = 0,
    ) -> None:
        """Let a fetched request hold its adapter, storing it if the request brought it.

        While an earlier put of the same id waits for its first batch, the given weights are not used. Raises
        TaskNotCached and changes nothing, or StoreError; after either the request holds nothing.
        """
        self.settle(now_ns)
        if rows is None and not self.is_cached(task_id):
            raise TaskNotCached(f"LoRA task {task_id} not found in cache. Please send LoRA weights with request")
        self.update_task_state(task_id, request_id)
        if task_id in self._puts:
            return
        try:
            is_new = rows is not None and self.host.put(task_id, rows, payload)
        except ClaimError as error:
            self.update_task_state(task_id, request_id, terminate=True)
            raise StoreError(f"Error storing task={task_id} in PEFT cache -- {error}") from error
        if rows is None:
            self.host.bump(task_id)
        self._puts[task_id] = self._load(task_id, now_ns, put_ns) if is_new else self._loaded_at(task_id)

    def prefetch(self, task_id: int, rows: tuple[Row, ...], payload: object | None) -> None:
        """Store an adapter that no request asked for.

        It is in progress, so it cannot be evicted, until a request of its id has come and ended. Raises StoreError.
        """
        try:
            self.host.put(task_id, rows, payload)
        except ClaimError as error:
            raise StoreError(f"Error storing task={task_id} in PEFT cache -- {error}") from error
        self.host.finish_load(task_id)

    def ensure_batch(self, task_ids: Iterable[int], now_ns: int = 0, reset: bool = True) -> Ensured:
        """Bring a batch's adapters to the device in the order of their ids, evicting done ones.

        With `reset` every task of the device becomes done first. Raises the first EnsureError after trying all.
        """
        if reset:
            self.reset_device()
        failure: EnsureError | None = None
        ready_ns = now_ns
        copied: list[int] = []
        for task_id in sorted(set(task_ids)):
            ready_ns = max(ready_ns, self._puts.pop(task_id, now_ns), self._loaded_at(task_id))
            self.settle(ready_ns)
            try:
                copied.extend(self._copy(task_id))
            except ClaimError as error:
                text = f"Caught exception during copyTask ensure batch -- {error}"
                failure = failure or EnsureError(text)
        if failure is not None:
            raise failure
        return Ensured(ready_ns, tuple(copied))

    def change_batch(self, entering: Sequence[int], leaving: Sequence[int], now_ns: int = 0) -> Ensured | None:
        """Do what `ensure_batch` does for a batch that differs from the last one by these tasks, in order of id.

        Returns None and does nothing if pages might have to come from tasks of the last batch: then a task that stays
        can lose its pages to one with a lower id, and `ensure_batch` must decide.
        """
        if sum(map(self._pages_on_device, entering)) > self.device.pages_claimable:
            return None
        ensured = self.ensure_batch(entering, now_ns, reset=False)
        for task_id in leaving:
            self.device.mark_done(task_id)
        return ensured

    def reset_device(self) -> None:
        """Make every task of the device evictable: those of the last batch behind the others, in order of id."""
        for task_id in sorted(self.device.in_progress):
            self.device.mark_done(task_id)

    def mark_request_done(self, request_id: int, task_id: int | None, now_ns: int = 0, pause: bool = False) -> None:
        """Release the adapter of a request that ended or, with `pause`, was paused, as far as that allows."""
        if task_id is not None:
            self.settle(now_ns)
            self.update_task_state(task_id, request_id, terminate=True, pause=pause)

    def update_task_state(self, task_id: int, request_id: int, terminate: bool = False, pause: bool = False) -> None:
        """Move a request between active, paused and gone, and release its adapter if it was the last.

        With no active request left the task is done on the device, with no paused one either also on the host.
        """
        if not terminate:
            self.active.setdefault(task_id, {})[request_id] = None
            _discard(self.paused, task_id, request_id)
            return
        _discard(self.active, task_id, request_id)
        if pause:
            self.paused.setdefault(task_id, {})[request_id] = None
        else:
            _discard(self.paused, task_id, request_id)
        if task_id in self.active:
            return
        self.device.mark_done(task_id)
        if task_id not in self.paused:
            self._puts.pop(task_id, None)
            self.host.mark_done(task_id)

    def settle(self, now_ns: int) -> None:
        """Note the loads that have ended by now."""
        while self._loads and self._loads[0][0] <= now_ns:
            self.host.finish_load(heapq.heappop(self._loads)[2])

    def _load(self, task_id: int, now_ns: int, put_ns: int) -> int:
        begin_ns = max(heapq.heappop(self._workers), now_ns)
        heapq.heappush(self._workers, begin_ns + put_ns)
        self._loads_begun += 1
        heapq.heappush(self._loads, (begin_ns + put_ns, self._loads_begun, task_id))
        return begin_ns + put_ns

    def _loaded_at(self, task_id: int) -> int:
        return next((ready_ns for ready_ns, _, loading in self._loads if loading == task_id), 0)

    def _pages_on_device(self, task_id: int) -> int:
        """Return the pages that an adapter takes on the device: a copy there stays whatever the host has now."""
        entry = self.device.entry(task_id)
        return self.pages_of(task_id) if entry is None else len(entry.page_ids)

    def _copy(self, task_id: int) -> tuple[int, ...]:
        entry = self.host.entry(task_id)
        if entry is None:
            raise ClaimError(f"can't move a missing task taskId={task_id}")
        self.host.bump(task_id)
        if not self.device.put(task_id, entry.rows, entry.payload, entry.size):
            return ()
        self.device.finish_load(task_id)
        return (entry.slots,)


def _discard(holders: dict[int, dict[int, None]], task_id: int, request_id: int) -> None:
    requests = holders.get(task_id)
    if requests is not None:
        requests.pop(request_id, None)
        if not requests:
            del holders[task_id]
