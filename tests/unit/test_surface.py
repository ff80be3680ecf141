"""What a user can do is what could be done before, but for the differences that are listed with a reason.

After a change that is wanted: `python -m tools.surface --compare tests/golden/before/surface.json --changes
tests/golden/before/surface_changes.json --accept REASON`.
"""

from __future__ import annotations

import json
from pathlib import Path

from tools.surface import Difference, differences, judged, surface

BEFORE = Path(__file__).parents[1] / "golden" / "before"


def test_nothing_is_lost_or_changed_unlisted() -> None:
    before = json.loads((BEFORE / "surface.json").read_text())
    changes = json.loads((BEFORE / "surface_changes.json").read_text())
    assert [entry for entry in changes if not entry["reason"]] == []
    now = json.loads(json.dumps(surface()))
    unlisted, idle = judged(differences(before, now), changes)
    assert [str(difference) for difference in unlisted] == []
    assert idle == [], "listed as a difference, and it is none"


def test_differences_are_told_by_their_paths() -> None:
    before = {"a": {"x": 1, "y": ["p", "q"]}, "b": {"gone": {"help": "h"}}}
    after = {"a": {"x": 2, "y": ["q", "r"]}, "b": {}, "c": None}
    assert differences(before, after) == [
        Difference("a/x", "changed", 1, 2),
        Difference("a/y/p", "lost"),
        Difference("a/y/r", "added"),
        Difference("b/gone", "lost", {"help": "h"}),
        Difference("c", "added"),
    ]


def test_an_entry_covers_its_path_and_values_only() -> None:
    found = [Difference("keys/backends[].url", "changed", "", "x"), Difference("keys/backends[].id", "lost", "i")]
    exact = {"path": "keys/backends[].url", "change": "changed", "before": "", "after": "x", "reason": "r"}
    assert judged(found, [exact]) == (found[1:], [])
    assert judged(found, [exact | {"after": "y"}]) == (found, [exact | {"after": "y"}])
    wide = {"path": "keys/*", "change": "lost", "reason": "r"}
    assert judged(found, [exact, wide]) == ([], [])
    assert judged(found[:1], [wide]) == (found[:1], [wide])
