"""The adapter caches, with the invariants of TensorRT-LLM's loraCacheTest.cpp and peftCacheManagerTest.cpp."""

import random

import pytest

from sidecar.lab.engine.cache import CLAIM_FAILED, NO_DONE_TASKS, ClaimError, LoraCache, PageList, Status
from sidecar.lab.engine.pages import Geometry, Row, pages_needed
from sidecar.lab.engine.peft import EnsureError, PeftCache, StoreError, TaskNotCached
from tests.kit.emulator_cases import reference_geometry, reference_rows

HOST_PAGES, DEVICE_PAGES = 15, 11  # 2 * 8 * 128 and 2 * 8 * 92 rows of two slots in pages of 288
ROWS = reference_rows()


def reference_cache(put_workers: int = 1) -> PeftCache:
    """The pair of caches of the reference tests."""
    return PeftCache(reference_geometry(), HOST_PAGES, DEVICE_PAGES, put_workers)


def small_cache(pages: int) -> LoraCache:
    """A cache in which a row of rank r takes r pages."""
    return LoraCache(pages, Geometry({0: (8, 8)}, range(64), page_width=16, slots_per_page=1))


def rows_of(pages: int) -> tuple[Row, ...]:
    """An adapter of so many pages in the small cache."""
    return tuple(Row(0, layer, 1) for layer in range(pages))


def assert_pages_add_up(cache: LoraCache) -> None:
    """No page belongs to two adapters, and every used one belongs to one."""
    held = [page for task in (*cache.in_progress, *cache.done) for page in cache.entry(task).page_ids]
    assert len(held) == len(set(held)) == cache.pages_used


def put_done(cache: LoraCache, task_id: int, pages: int = 1) -> None:
    """An adapter that was put, loaded and completed."""
    cache.put(task_id, rows_of(pages), f"weights {task_id}")
    cache.finish_load(task_id)
    cache.mark_done(task_id)


def test_pages_are_claimed_in_order():
    """LoraCachePageManagerTest: 8 pages in blocks of 6 and 2 are claimed ascending across the blocks.

    A claim of more than is left gets nothing, and a released page is the first to be claimed again. Blocks are an
    allocation detail and not modelled.
    """
    pages = PageList(8)
    first = pages.claim(1)
    assert first == (0,)
    assert pages.claim(7) == (1, 2, 3, 4, 5, 6, 7)
    assert pages.claim(1) is None
    pages.release(first)
    assert pages.claim(1) == (0,)


def test_put_and_get():
    """basicPutGet: a task is missing, then put and loaded; its rows lie where the page walk says, in its pages.

    copyTask: the copy on the other cache has the same table and the same payload. Tensor contents are not modelled:
    the payload stands for them.
    """
    base = reference_geometry()
    geometry = Geometry(base.dims, base.layers, page_width=64, slots_per_page=64)
    peft = PeftCache(geometry, 16, 16)
    assert peft.host.status(1234) is Status.MISSING
    peft.add_request(0, 1234, ROWS, "weights")
    assert peft.host.status(1234) is Status.PROCESSING
    peft.ensure_batch([1234])
    assert peft.host.status(1234) is Status.LOADED
    table = peft.host.table(1234)
    row = table[19]
    assert (row.page, row.slot, row.in_size, row.out_size) == (1, 0, 64, 32)
    assert (row.module_id, row.layer, row.rank, row.slots) == (9, 1, 4, 2)
    assert peft.device.table(1234) == table
    assert peft.device.entry(1234).payload == "weights"


def test_table_names_the_pages_claimed():
    """The table of an adapter speaks of the cache's page ids, whichever were free."""
    cache = small_cache(4)
    put_done(cache, 1)
    put_done(cache, 2, pages=2)
    assert [row.page for row in cache.table(2)] == [1, 2]


def test_eviction_is_by_least_recent_completion():
    """The victim is the task that completed longest ago, however recently it was put or bumped before that."""
    cache = small_cache(3)
    for task_id in (1, 2, 3):
        cache.put(task_id, rows_of(1), None)
        cache.finish_load(task_id)
    for task_id in (2, 3, 1):
        cache.mark_done(task_id)
    assert cache.done == (1, 3, 2)
    put_done(cache, 4)
    assert [cache.status(task_id) is Status.MISSING for task_id in (1, 2, 3)] == [False, True, False]
    assert cache.evictions == 1


def test_completing_twice_does_not_refresh():
    """A done task that is marked done again keeps its place in the line of victims."""
    cache = small_cache(2)
    put_done(cache, 1)
    put_done(cache, 2)
    cache.mark_done(1)
    assert cache.done == (2, 1)


def test_all_done_keeps_the_order():
    """When all become done at once, the most recently used one is evicted last."""
    cache = small_cache(3)
    for task_id in (1, 2, 3):
        cache.put(task_id, rows_of(1), None)
        cache.finish_load(task_id)
    cache.bump(1)
    assert cache.in_progress == (1, 3, 2)
    cache.mark_all_done()
    assert cache.done == (1, 3, 2)


def test_full_with_nothing_done():
    """Without a done task a claim fails with the engine's text and changes nothing."""
    cache = small_cache(2)
    cache.put(1, rows_of(1), None)
    with pytest.raises(ClaimError) as error:
        cache.put(2, rows_of(2), None)
    assert str(error.value) == NO_DONE_TASKS == "Cache is full. There are no done tasks to evict"
    assert cache.status(2) is Status.MISSING
    assert cache.pages_used == 1


def test_full_with_too_little_done():
    """With some done tasks but not enough, every done task is evicted and the claim fails all the same."""
    cache = small_cache(5)
    cache.put(1, rows_of(2), None)
    put_done(cache, 2)
    put_done(cache, 3)
    with pytest.raises(ClaimError) as error:
        cache.put(4, rows_of(4), None)
    assert str(error.value) == CLAIM_FAILED
    assert cache.done == ()
    assert cache.pages_used == 2
    assert cache.evictions == 2


def test_weights_sent_again_are_ignored():
    """Putting a cached task bumps it and keeps the weights it has."""
    cache = small_cache(2)
    put_done(cache, 1)
    assert cache.put(1, rows_of(2), "other weights") is False
    assert cache.entry(1).payload == "weights 1"
    assert cache.in_progress == (1,)


def test_completed_while_loading():
    """A task completed before its load ended cannot be evicted until then; a new request takes that back."""
    cache = small_cache(1)
    cache.put(1, rows_of(1), None)
    cache.mark_done(1)
    assert cache.is_done(1)
    with pytest.raises(ClaimError, match="no done tasks"):
        cache.put(2, rows_of(1), None)
    cache.bump(1)
    cache.mark_done(1)
    cache.finish_load(1)
    assert cache.done == (1,)


def test_missing_task_then_weights():
    """addRequestPeftMissingTask: an id alone that is not cached is told so exactly; with weights the same id works."""
    peft = reference_cache()
    with pytest.raises(TaskNotCached) as error:
        peft.add_request(0, 1234)
    text = "LoRA task 1234 not found in cache. Please send LoRA weights with request"
    assert str(error.value) == text
    assert (peft.active, peft.paused) == ({}, {})
    peft.add_request(0, 1234, ROWS, "weights")
    assert peft.is_cached(1234)


def test_capacity_of_host_and_device():
    """putToCapacity: 15 adapters fit on the host, the 16th finds no done task; on the device the 12th fails.

    All requests stay active and the device is not reset, so nothing is ever done.
    """
    peft = reference_cache()
    for task_id in range(15):
        peft.add_request(task_id, task_id, ROWS, task_id)
    with pytest.raises(StoreError) as error:
        peft.add_request(15, 15, ROWS, 15)
    assert str(error.value) == f"Error storing task=15 in PEFT cache -- {NO_DONE_TASKS}"
    assert 15 not in peft.active
    for task_id in range(11):
        peft.ensure_batch([task_id], reset=False)
    for task_id in range(11, 15):
        with pytest.raises(EnsureError) as failed:
            peft.ensure_batch([task_id], reset=False)
        assert str(failed.value) == f"Caught exception during copyTask ensure batch -- {NO_DONE_TASKS}"


@pytest.mark.parametrize("ranks", [(8,), (8, 16)])
@pytest.mark.parametrize("seed", range(5))
def test_random_batches_get_the_right_contents(seed: int, ranks: tuple[int, ...]):
    """gptManagerSim: 128 adapters, 500 random requests, batches of 4, weights only when not cached: never a wrong one.

    A fifth of the requests use no adapter. With two ranks an adapter takes one or two pages.
    """
    choose = random.Random(seed)
    peft = reference_cache(put_workers=4)
    batch: list[tuple[int, int | None]] = []
    for request_id in range(500):
        drawn = choose.randrange(128 + 32)
        task_id = drawn if drawn < 128 else None
        batch.append((request_id, task_id))
        if task_id is not None:
            rows = None if peft.is_cached(task_id) else reference_rows(ranks[task_id % len(ranks)])
            peft.add_request(request_id, task_id, rows, f"weights {task_id}", now_ns=request_id, put_ns=10)
        if len(batch) < 4:
            continue
        tasks = [task for _, task in batch if task is not None]
        peft.ensure_batch(tasks, request_id)
        for task in tasks:
            assert peft.device.entry(task).payload == f"weights {task}"
            table = peft.device.table(task)
            assert len(table) == len(ROWS)
            assert table[-1].rank == ranks[task % len(ranks)]
        for done_id, task in batch:
            peft.mark_request_done(done_id, task, request_id)
        batch.clear()
        assert_pages_add_up(peft.host)
        assert_pages_add_up(peft.device)
    assert peft.host.evictions > 100
    assert peft.device.evictions > 100
    assert (peft.active, peft.paused) == ({}, {})


def test_states_of_a_task():
    """updateTaskState: paused means done on the device but not on the host; the last one gone means done, still cached.

    Two requests of one task; a paused one that is resumed and ends counts once.
    """
    peft = reference_cache()
    peft.update_task_state(0, 1, terminate=True)
    assert (peft.active, peft.paused) == ({}, {})
    peft.update_task_state(0, 1, terminate=True, pause=True)
    assert (peft.active, list(peft.paused[0])) == ({}, [1])
    for _ in range(2):
        peft.update_task_state(0, 1)
        assert (list(peft.active[0]), peft.paused) == ([1], {})
    peft.add_request(12345, 1234, ROWS, "weights")
    peft.add_request(54321, 1234)
    assert list(peft.active[1234]) == [12345, 54321]
    peft.ensure_batch([1234])

    def state() -> tuple[list[int], list[int], bool, bool, bool]:
        active, paused = list(peft.active.get(1234, ())), sorted(peft.paused.get(1234, ()))
        return active, paused, peft.is_cached(1234), peft.host.is_done(1234), peft.device.is_done(1234)

    peft.mark_request_done(54321, 1234, pause=True)
    assert state() == ([12345], [54321], True, False, False)
    peft.mark_request_done(12345, 1234, pause=True)
    assert state() == ([], [12345, 54321], True, False, True)
    peft.mark_request_done(12345, 1234)
    assert state() == ([], [54321], True, False, True)
    peft.mark_request_done(54321, 1234)
    assert state() == ([], [], True, True, True)
    assert list(peft.active) == [0]


def test_only_the_first_of_two_carries_weights():
    """A task that is still loading counts as cached, so an id-only request behind the first one is let in."""
    peft = reference_cache()
    peft.add_request(1, 7, ROWS, "weights", now_ns=0, put_ns=100)
    peft.add_request(2, 7, now_ns=1)
    assert peft.host.status(7) is Status.PROCESSING
    assert list(peft.active[7]) == [1, 2]


def test_a_put_in_flight_is_not_repeated():
    """While a task waits for its first batch, weights sent with its id are not used and no worker is taken."""
    peft = reference_cache()
    peft.add_request(1, 7, ROWS, "first", now_ns=0, put_ns=100)
    peft.add_request(2, 7, ROWS, "second", now_ns=1, put_ns=100)
    ensured = peft.ensure_batch([7], now_ns=2)
    assert ensured.ready_ns == 100
    assert peft.device.entry(7).payload == "first"


def test_puts_share_the_workers():
    """Two workers load three adapters: the third begins when the first ends."""
    peft = reference_cache(put_workers=2)
    for task_id in (1, 2, 3):
        peft.add_request(task_id, task_id, ROWS, None, now_ns=0, put_ns=100)
    assert peft.ensure_batch([1, 2], now_ns=5).ready_ns == 100
    assert peft.ensure_batch([3], now_ns=100).ready_ns == 200


def test_a_batch_copies_what_is_not_there():
    """Only adapters that are not on the device are copied, by the slots that they use."""
    peft = reference_cache()
    for task_id in (1, 2):
        peft.add_request(task_id, task_id, ROWS, None)
    assert peft.ensure_batch([1]).copied_slots == (202,)
    assert peft.ensure_batch([1, 2, 2]).copied_slots == (202,)
    assert peft.ensure_batch([1, 2]).copied_slots == ()


def test_a_batch_never_evicts_itself():
    """Adapters of the batch that are done and not bumped yet may be victims, and are then copied again."""
    peft = PeftCache(reference_geometry(), 15, 2)
    for task_id in (1, 2, 3):
        peft.add_request(task_id, task_id, ROWS, None)
    peft.ensure_batch([2, 3])
    ensured = peft.ensure_batch([1, 2])
    assert len(ensured.copied_slots) == 2
    assert sorted(peft.device.in_progress) == [1, 2]


def test_the_device_keeps_what_only_the_host_lost():
    """An id sent again with other weights, while only the host had evicted it, computes with the device's copy."""
    peft = PeftCache(reference_geometry(), 1, 2)
    peft.add_request(1, 1, ROWS, "old")
    peft.ensure_batch([1])
    peft.mark_request_done(1, 1)
    peft.add_request(2, 2, ROWS, "other")
    peft.ensure_batch([2])
    peft.mark_request_done(2, 2)
    peft.add_request(3, 1, ROWS, "new")
    peft.ensure_batch([1])
    assert peft.host.entry(1).payload == "new"
    assert peft.entry(1).payload == "old"


def test_ensure_names_a_missing_task():
    """A task that the host does not have cannot be moved: the batch fails, after the others were moved."""
    peft = reference_cache()
    peft.add_request(1, 1, ROWS, None)
    with pytest.raises(EnsureError, match="can't move a missing task taskId=0"):
        peft.ensure_batch([0, 1])
    assert peft.device.status(1) is Status.LOADED


def test_pages_of_a_task():
    """A cached task's pages are its own; another's are computed from its config."""
    peft = reference_cache()
    peft.add_request(1, 1, ROWS, None)
    assert peft.pages_of(1, reference_rows(64)) == 1
    assert peft.pages_of(2, reference_rows(64)) == pages_needed(reference_rows(64), reference_geometry())
