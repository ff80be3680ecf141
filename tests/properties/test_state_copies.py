"""Copies of a registry, merged in any order: all end alike, with the newest of each name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as some

from sidecar.state.redis.copy import TOMBSTONES_MS, Copy
from sidecar.state.redis.entries import Entry, Head, entry_of, head_of, newer, value_of
from tests.kit.registries import record

NAMES = ("a", "b", "c")


@some.composite
def entries(draw: some.DrawFn) -> tuple[str, Entry]:
    """Draw an entry; what a revision and token stand for is always the same content."""
    name, revision, token = draw(some.sampled_from(NAMES)), draw(some.integers(1, 6)), draw(some.sampled_from("0f"))
    content = record(name, revision * 16 + int(token, 16)) if (revision + int(token, 16)) % 3 else None
    return name, Entry(Head(revision, token, draw(some.integers(revision, 20)), 0), content)


@given(some.lists(entries(), max_size=20), some.randoms(use_true_random=False))
def test_the_order_of_merging_does_not_matter(written: list[tuple[str, Entry]], random: object) -> None:
    """However entries come to two copies, both hold the newest of each name, and have told of no older one."""
    one, two = Copy(), Copy()
    for name, entry in written:
        before = one.head(name)
        change = one.take(name, entry)
        assert (change is None) or (newer(entry.head, before) and one.get(name) == change.record)
    random.shuffle(written)  # type: ignore[attr-defined]
    for name, entry in written:
        two.take(name, entry)
    for name in NAMES:
        heads = [entry.head[:2] for of, entry in written if of == name]
        newest = max(heads, default=(0, ""))
        assert one.head(name)[:2] == two.head(name)[:2] == newest
        assert one.get(name) == two.get(name)
    assert one.records() == two.records()


@given(some.lists(entries(), max_size=20), some.lists(entries(), max_size=20))
def test_what_is_put_back_makes_both_sides_alike(here: list[tuple[str, Entry]], there: list[tuple[str, Entry]]) -> None:
    """After taking what is newer there and putting back what is newer here, nothing is newer on either side."""
    mine, stored = Copy(), Copy()
    for copy, written in ((mine, here), (stored, there)):
        for name, entry in written:
            copy.take(name, entry)
    heads = {name: stored.head(name) for name in NAMES if stored.head(name).revision}
    back = list(mine.newer_than(heads))
    assert [entry.head for _, entry in back] == sorted(entry.head for _, entry in back)
    for name, entry in back:
        stored.take(name, entry)
    for name, entry in there:
        mine.take(name, entry)
    assert mine.records() == stored.records()
    assert not list(mine.newer_than({name: stored.head(name) for name in NAMES}))


@given(entries())
def test_an_entry_is_read_as_it_was_written(pair: tuple[str, Entry]) -> None:
    """Head and record come back."""
    name, entry = pair
    assert entry_of(name, value_of(entry)) == entry
    assert head_of(value_of(entry)) == entry.head


def test_forgotten_names_are_remembered_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest tombstones go when there are too many or they are a week old; a name that came again is none."""
    monkeypatch.setattr("sidecar.state.redis.copy.TOMBSTONES_MAX", 3)
    copy = Copy()
    for number in range(1, 6):
        copy.take(f"n{number}", Entry(Head(number, "0", number, number), None))
    assert [copy.head(f"n{number}").revision for number in range(1, 6)] == [0, 0, 3, 4, 5]
    copy.take("n3", Entry(Head(6, "0", 6, 6), record("n3")))
    late = TOMBSTONES_MS + 5
    copy.take("late", Entry(Head(7, "0", 7, late), None))
    assert [copy.head(name).revision for name in ("n3", "n4", "n5", "late")] == [6, 0, 5, 7]
