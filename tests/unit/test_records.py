"""Records as they are written: nothing of an adapter's shape is lost, however it is written."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as some

from sidecar.core.facts import Adapter, Row
from sidecar.state.records import Record, added
from sidecar.state.written import from_json, to_json

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
