"""What commands print with --json, and what clients are told of errors, is what it was when it was last recorded.

If a change is meant, record it with `python -m tests.golden.make_commands` or `make_errors` and read the difference.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.golden import make_commands, make_errors


async def test_each_command_prints_what_it_did(tmp_path: Path) -> None:
    recorded, printed = json.loads(make_commands.RECORDED.read_text()), await make_commands.told(tmp_path)
    assert list(printed) == list(recorded)
    for line, output in printed.items():
        assert output == recorded[line], line


async def test_each_front_tells_what_it_did(tmp_path: Path) -> None:
    recorded, told = json.loads(make_errors.RECORDED.read_text()), await make_errors.told(tmp_path)
    assert told.keys() == recorded.keys()
    for error, by_front in told.items():
        for front, what in by_front.items():
            assert what == recorded[error][front], f"{front}: {error}"
