"""`python -m tests.golden.add_miss_counts NAME`: add an eviction policy's counts to those that are checked in.

They are the counts of its reference in `references`, not of the policy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.golden.references import REFERENCES
from tests.golden.traces import CASES

PATH = Path(__file__).with_name("miss_counts.json")


def main(name: str) -> None:
    checked_in = json.loads(PATH.read_text())
    for case, made in CASES.items():
        counts = {at: len(REFERENCES[name](made.trace, size_bytes)) for at, size_bytes in made.capacities.items()}
        checked_in[case][name] = counts
    PATH.write_text("{\n" + ",\n".join(_written(case, rows) for case, rows in checked_in.items()) + "\n}\n")


def _written(case: str, rows: dict[str, Any]) -> str:
    """Return a case with a line for each policy."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(counts)}" for name, counts in rows.items())
    return f" {json.dumps(case)}: {{\n{lines}\n }}"


if __name__ == "__main__":
    main(sys.argv[1])
