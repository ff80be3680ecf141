"""Records as they are written: nothing of an adapter's shape is lost, however it is written."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as some

from sidecar.core.facts import Adapter, Row
from sidecar.errors import Invalid, Reason, Refused
from sidecar.state.records import Record, added, check_not_paused, paused_for, promoted, rolled_back
from sidecar.state.written import UnreadableRecord, from_json, to_json

ROWS = some.lists(
    some.builds(
        Row, some.sampled_from(("attn_q", "mlp_gate")), some.integers(1, 2), some.integers(0, 2),
        some.sampled_from((8, 16)), some.just(64), some.just(64),
    ),
    max_size=8,
).map(tuple)  # fmt: skip


def record(rows: tuple[Row, ...]) -> Record:
    made, _ = added(None, "sql", Adapter("d" * 64, "base", rows, "float16"), "/sql", now=1.0)
    return made


@given(ROWS)
def test_any_shape_comes_back(rows: tuple[Row, ...]) -> None:
    """Rows in any order, of any layers, are read as they were written."""
    assert from_json("sql", to_json(record(rows))) == record(rows)


def test_layers_that_are_alike_are_written_once() -> None:
    """A usual adapter weighs little; what earlier releases wrote, row for row, is read too."""
    rows = tuple(Row(name, number, layer, 16, 64, 64) for layer in range(32) for number, name in enumerate("abcdefg"))
    text = to_json(record(rows))
    assert len(text) < 700
    assert from_json("sql", text) == record(rows)
    old = json.loads(text)
    old["versions"][0]["rows"] = [[r.module, r.module_id, r.layer, r.rank, r.in_dim, r.out_dim] for r in rows]
    assert from_json("sql", json.dumps(old)) == record(rows)


# Pauses.


def test_a_pause_is_kept_and_one_that_is_not_there_is_not_written() -> None:
    """With an end and without one, in strict JSON; a record without a pause stays as earlier releases write it."""
    plain = record(())
    assert "paused_until" not in to_json(plain)
    for until in (1790000000.5, inf):
        paused = replace(plain, paused_until=until)
        written = to_json(paused)
        json.loads(written, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
        assert from_json("sql", written) == paused


@pytest.mark.parametrize("until", ['"soon"', "true", "[]", "{}"])
def test_a_pause_that_is_no_time_is_unreadable(until: str) -> None:
    with pytest.raises(UnreadableRecord):
        from_json("sql", to_json(record(()))[:-1] + f', "paused_until": {until}}}')


NOON = datetime(2026, 11, 28, 12, tzinfo=UTC).timestamp()


def test_a_paused_name_is_refused_until_its_time() -> None:
    """The refusal says until when and whom to ask; a retry can help, after a minute at most."""
    made, _ = added(None, "sql", record(()).adapter, "/sql", now=1.0, labels=(("owner", "the ml team"),))
    paused = replace(made, paused_until=NOON + 90)
    for now, retry_s in ((NOON, 60.0), (NOON + 80, 10.0)):
        with pytest.raises(Refused) as refused:
            check_not_paused(paused, now)
        assert refused.value.reason is Reason.PAUSED
        assert refused.value.retry_after_s == retry_s
        assert refused.value.message == (
            'the operators have paused adapter "sql" until 2026-11-28 12:01:30 UTC; send the request again then, or '
            "ask the ml team"
        )
    check_not_paused(paused, NOON + 90)
    assert (paused_for(paused, NOON), paused_for(paused, NOON + 90), paused_for(made, NOON)) == (90, None, None)


@pytest.mark.parametrize("until", [inf, 1e300, 1e13])
def test_a_pause_without_an_end(until: float) -> None:
    """Also one whose end no calendar has: it names the operator, and a client tries again each minute."""
    with pytest.raises(Refused, match=r"until they resume it; .* ask your operator") as refused:
        check_not_paused(replace(record(()), paused_until=until), NOON)
    assert refused.value.retry_after_s == 60.0


def grown_to(versions: int) -> Record:
    """Return a name of which so many versions were registered, each promoted at once."""
    made = record(())
    for number in range(2, versions + 1):
        adapter = Adapter(f"{number}" * 64, "base", (), "float16")
        made, _ = added(made, "sql", adapter, f"/{number}", now=float(number))
    return made


def test_a_second_rollback_does_not_return_to_what_the_first_one_left() -> None:
    """It says which versions there are; a version is named to go back further, or to that one nevertheless."""
    back = rolled_back(grown_to(3))
    assert (back.current, back.previous, back.withdrawn) == (2, None, {3})
    there = (
        r"rolled back to v2 already, from v3; its versions are v1, v2 \(current\), v3 \(withdrawn\); .* sql --to v1$"
    )
    with pytest.raises(Invalid, match=there):
        rolled_back(back)
    assert (rolled_back(back, to=1).current, rolled_back(back, to=1).withdrawn) == (1, {2, 3})
    assert (rolled_back(back, to=3).current, rolled_back(back, to=3).withdrawn) == (3, {2})
    with pytest.raises(Invalid, match="stands for v2 already"):
        rolled_back(back, to=2)
    assert from_json("sql", to_json(back)) == back


def test_a_version_that_was_left_stays_withdrawn_until_it_is_promoted() -> None:
    """The next promotion can be undone; a canary that a rollback ends is withdrawn, too."""
    fixed, _ = added(rolled_back(grown_to(3)), "sql", Adapter("e" * 64, "base", (), "float16"), "/sql", now=9.0)
    assert (fixed.current, fixed.previous, fixed.withdrawn) == (4, 2, {3})
    assert rolled_back(fixed).current == 2
    assert not promoted(rolled_back(grown_to(3)), 3).withdrawn
    tried = promoted(fixed, 1, percent=10)
    assert (rolled_back(tried).current, rolled_back(tried).withdrawn) == (4, {1, 3})
    assert rolled_back(rolled_back(tried)).current == 2


def test_new_versions_leave_a_pause_as_it_is() -> None:
    """Whoever publishes in the meantime: the name stays paused until the operator's time."""
    paused = replace(record(()), paused_until=inf)
    grown, _ = added(paused, "sql", Adapter("e" * 64, "base", (), "float16"), "/sql", now=2.0)
    assert (grown.current, grown.paused_until) == (2, inf)
    assert rolled_back(grown).paused_until == inf
