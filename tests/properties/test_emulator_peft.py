"""Telling the adapter caches what changed in a batch comes to the same as telling them the whole batch."""

from hypothesis import given
from hypothesis import strategies as st

from sidecar.lab.engine.pages import Row
from sidecar.lab.engine.peft import PeftCache
from tests.kit.emulator_cases import tiny_spec
from tests.properties.test_emulator_advance import thorough

TASKS = range(1, 9)
batches = st.lists(st.sets(st.sampled_from(TASKS), max_size=4), max_size=40)


def cache(ranks: list[int], device_pages: int) -> PeftCache:
    """Caches whose host holds all tasks; a task has one page or two, by its rank."""
    subject = PeftCache(tiny_spec().geometry, host_pages=16, device_pages=device_pages)
    for task_id, rank in zip(TASKS, ranks, strict=True):
        rows = tuple(Row(module, layer, rank) for layer in range(2) for module in (1, 3))
        subject.add_request(task_id, task_id, rows)
    return subject


@thorough
@given(
    ranks=st.lists(st.sampled_from([8, 16, 32]), min_size=8, max_size=8),
    device_pages=st.integers(8, 10),
    sequence=batches,
)
def test_changes_equal_batches(ranks: list[int], device_pages: int, sequence: list[set[int]]):
    """The same copies, evictions and orders, whenever the pages of what was done before are enough."""
    whole, changed = cache(ranks, device_pages), cache(ranks, device_pages)
    before: set[int] = set()
    for batch in sequence:
        expected = whole.ensure_batch(batch)
        told = changed.change_batch(sorted(batch - before), sorted(before - batch))
        if told is None:
            told = changed.ensure_batch(batch)
        assert told == expected
        assert changed.device.done == whole.device.done
        assert sorted(changed.device.in_progress) == sorted(whole.device.in_progress)
        assert changed.device.pages_used == whole.device.pages_used
        assert changed.device.evictions == whole.device.evictions
        before = batch


def test_pages_of_the_last_batch_are_not_told():
    """A newcomer that needs them is left to the whole batch, where one that stays may be copied again."""
    subject = cache([8] * 8, device_pages=3)
    subject.ensure_batch([2, 5, 7])
    assert subject.change_batch([1], [5]) is None
    assert subject.device.done == ()
    assert len(subject.ensure_batch([1, 2, 7]).copied_slots) == 2
