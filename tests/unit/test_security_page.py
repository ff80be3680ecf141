"""The security page names a test for each promise and each threat, and each of them is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_promise_has_its_tests() -> None:
    """Each row of its tables names tests or targets that exist, and each file of attacks is named."""
    page = (ROOT / "docs/security.md").read_text().partition("## Promised to a client")[2]
    rows = [row for row in page.splitlines() if row.startswith("| ") and not row.endswith("| test |")]
    named = set()
    for row in rows:
        proofs = re.findall(r"`([^`]+)`", row.rsplit("|", 2)[1])
        assert proofs, row
        for proof in proofs:
            if proof.startswith("make "):
                assert re.search(rf"^{proof.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), proof
            else:
                path, _, name = proof.partition("::")
                assert (ROOT / path).is_file(), proof
                assert not name or re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text(), re.MULTILINE), proof
                named.add(path)
    of_adapters = {"tests/attack/test_fused_mlp_names.py", "tests/attack/test_unnamed_base_model.py"}
    folders = (ROOT / "tests/attack", ROOT / "tests/e2e/attack")
    attacks = {str(path.relative_to(ROOT)) for folder in folders for path in folder.glob("test_*.py")}
    assert attacks - named == of_adapters
