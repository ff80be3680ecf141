"""The generated protobuf code is that of the checked-in definitions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_generated_code_is_current(tmp_path: Path) -> None:
    """`make proto` would change nothing."""
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable}
    subprocess.run(["sh", str(ROOT / "proto" / "generate.sh")], check=True, env=environment)
    generated = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(generated) == 11
    for path in generated:
        assert (tmp_path / path).read_text() == (ROOT / path).read_text(), f"{path} is stale: run make proto"
