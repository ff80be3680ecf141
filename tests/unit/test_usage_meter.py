"""The meter of usage: whose time is whose, by sums done on paper."""

from __future__ import annotations

from fractions import Fraction

from sidecar.access.usage.meter import NOBODY, OTHERS, ROWS_MAX, Meter, Rows, tenant_shown

S = 10**9
SQL, CHAT = ("acme", "sql", "v1", "b0"), ("globex", "sql", "v1", "b0")
UNUSED, FREE = (NOBODY, "sql", "v1", "b0"), (NOBODY, "", "", "b0")


def engine(seats: int = 4, slots: int = 2) -> Meter:
    meter = Meter()
    meter.engine("b0", seats, slots, True, 0)
    return meter


def seats(rows: Rows) -> dict[tuple[str, ...], float]:
    return {key: used.seat_ns / S for key, used in rows.items() if used.seat_ns}


def slots(rows: Rows) -> dict[tuple[str, ...], float]:
    return {key: used.slot_ns / S for key, used in rows.items() if used.slot_ns}


def test_a_run_uses_its_seats_and_the_rest_is_free() -> None:
    """Of 4 seats for 10 s, acme uses 2 for 3 s and globex 1 for 5 s."""
    meter = engine()
    meter.began(1, SQL, 2, (), 1 * S)
    meter.began(2, CHAT, 1, (), 2 * S)
    meter.ended(1, 4 * S)
    meter.ended(2, 7 * S)
    rows = meter.cut(10 * S).rows()
    assert seats(rows) == {SQL: 6, CHAT: 5, FREE: 40 - 11}
    assert rows[FREE].engine_ns == 10 * S


def test_a_stay_is_shared_by_seat_time() -> None:
    """A version is in 2 pages for 8 s; acme used it for 3 seat-seconds, globex for 1."""
    meter = engine(slots=3)
    meter.came("sql", "b0", 2, UNUSED, 1 * S)
    meter.began(1, SQL, 3, ("sql",), 2 * S)
    meter.ended(1, 3 * S)
    meter.began(2, CHAT, 1, ("sql",), 5 * S)
    meter.ended(2, 6 * S)
    meter.gone("sql", 9 * S)
    assert slots(meter.cut(10 * S).rows()) == {SQL: 12, CHAT: 4, FREE: 30 - 16}


def test_shares_add_up_to_the_last_nanosecond() -> None:
    """Three tenants use a stay of 1,000,000,007 ns by 1 : 1 : 1; the parts are whole and differ by one at most."""
    meter = engine()
    meter.came("sql", "b0", 1, UNUSED, 0)
    keys = [(name, "sql", "v1", "b0") for name in ("a", "b", "c")]
    for number, key in enumerate(keys):
        meter.began(number, key, 1, ("sql",), 0)
        meter.ended(number, 1000)
    meter.gone("sql", 1_000_000_007)
    rows = meter.cut(1_000_000_007).rows()
    parts = [rows[key].slot_ns for key in keys]
    assert sum(parts) == 1_000_000_007
    assert all(abs(part - Fraction(1_000_000_007, 3)) < 1 for part in parts)


def test_what_nobody_used_in_a_period_is_nobodys() -> None:
    """The same stay: used in the first period, by nobody in the second one, and used again in the third."""
    meter = engine(slots=1)
    meter.came("sql", "b0", 1, UNUSED, 0)
    meter.began(1, SQL, 1, ("sql",), 0)
    meter.ended(1, 1 * S)
    assert slots(meter.cut(10 * S).rows()) == {SQL: 10}
    assert slots(meter.cut(20 * S).rows()) == {UNUSED: 10}
    meter.began(2, CHAT, 1, ("sql",), 21 * S)
    assert slots(meter.cut(30 * S).rows()) == {CHAT: 10}, "it still runs"


def test_a_run_over_the_end_of_a_period_counts_in_both() -> None:
    meter = engine()
    meter.came("sql", "b0", 1, UNUSED, 0)
    meter.began(1, SQL, 1, ("sql",), 8 * S)
    assert seats(meter.cut(10 * S).rows())[SQL] == 2
    meter.ended(1, 15 * S)
    rows = meter.cut(20 * S).rows()
    assert seats(rows)[SQL] == 5
    assert slots(rows)[SQL] == 10


def test_a_look_changes_nothing() -> None:
    """Whoever looks in between, as each write does, gets the sums so far, and the period ends with the same."""
    looked, other = engine(), engine()
    for meter in (looked, other):
        meter.came("sql", "b0", 1, UNUSED, 0)
        meter.began(1, SQL, 1, ("sql",), 1 * S)
        if meter is looked:
            rows = meter.snapshot(3 * S).rows()
            assert seats(rows) == {SQL: 2, FREE: 10}
            assert slots(rows) == {SQL: 3, FREE: 3}
        meter.ended(1, 5 * S)
        meter.began(2, CHAT, 1, ("sql",), 6 * S)
    assert looked.cut(9 * S).rows() == other.cut(9 * S).rows()


def test_a_backend_that_is_down_has_no_time() -> None:
    """It is up for 10 s, down for 20 s and up for 5 s, and its runs end with it."""
    meter = engine()
    meter.began(1, SQL, 1, (), 6 * S)
    meter.lost("b0", 10 * S)
    meter.engine("b0", 0, 0, False, 10 * S)
    meter.engine("b0", 4, 2, True, 30 * S)
    rows = meter.cut(35 * S).rows()
    assert rows[FREE].engine_ns == 15 * S
    assert seats(rows) == {SQL: 4, FREE: 4 * 15 - 4}


def test_more_in_use_than_there_is_leaves_nothing_free() -> None:
    """A gauge shows 1 seat while 3 run: the time of all 3 counts, and no seat is free for less than no time."""
    meter = engine(seats=4)
    meter.began(1, SQL, 3, (), 0)
    meter.engine("b0", 1, 2, True, 2 * S)
    meter.ended(1, 6 * S)
    assert seats(meter.cut(8 * S).rows()) == {SQL: 18, FREE: 1 * 2 + 1 * 2}


def test_no_tenant_can_take_the_name_of_idle_time() -> None:
    names = ["", "(idle)", "\\(idle)", "(none)", "(others)", "acme"]
    shown = [tenant_shown(name) for name in names]
    assert len(set(shown)) == len(names)
    assert NOBODY not in shown
    assert OTHERS not in shown


def test_invented_tenants_take_no_rows_from_those_that_are_served() -> None:
    """Whoever sends nothing but refused requests under made-up names fills a part of the rows only."""
    meter = engine()
    for number in range(2 * ROWS_MAX):
        meter.settled((f"made-up-{number}", "sql", "v1", ""), "refused", (0, 0))
    meter.began(1, SQL, 1, (), 0)
    meter.ended(1, 5 * S)
    rows = meter.cut(5 * S).rows()
    assert seats(rows)[SQL] == 5
    assert len(rows) < ROWS_MAX / 2
    assert sum(used.requests.get("refused", 0) for used in rows.values()) == 2 * ROWS_MAX


def test_a_million_tenants_do_not_grow_memory() -> None:
    """Clients may claim any tenant. Those after the bound share a row for each adapter; nothing is left uncounted."""
    meter = engine()
    requests = ROWS_MAX + 5000
    for number in range(requests):
        key = (f"t{number}", "sql", "v1", "b0")
        meter.began(number, key, 1, (), number)
        meter.ended(number, number + 1)
        meter.settled(key, "ok", (1, 1))
    rows = meter.cut(requests).rows()
    assert len(rows) <= ROWS_MAX + 2
    assert sum(used.requests.get("ok", 0) for used in rows.values()) == requests
    assert rows[OTHERS, "sql", "v1", "b0"].seat_ns == 5000
