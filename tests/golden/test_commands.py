"""What commands print with --json is what they printed when it was last recorded."""

from __future__ import annotations

import json
from pathlib import Path

from tests.golden.make_commands import RECORDED, told


async def test_each_command_prints_what_it_did(tmp_path: Path) -> None:
    """If a change is meant, record it with `python -m tests.golden.make_commands` and read the difference."""
    recorded, printed = json.loads(RECORDED.read_text()), await told(tmp_path)
    assert list(printed) == list(recorded)
    for line, output in printed.items():
        assert output == recorded[line], line
