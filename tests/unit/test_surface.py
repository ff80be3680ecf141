"""What a user can do is what `tests/golden/surface.json` says; a change that is meant writes that file again.

`python -m tools.surface --write tests/golden/surface.json`.
"""

from __future__ import annotations

import json
from pathlib import Path

from tools.surface import Difference, differences, surface

SNAPSHOT = Path(__file__).parents[1] / "golden" / "surface.json"


def test_nothing_is_lost_or_changed_unseen() -> None:
    now = json.loads(json.dumps(surface()))
    assert [str(difference) for difference in differences(json.loads(SNAPSHOT.read_text()), now)] == []


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
