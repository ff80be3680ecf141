"""The configurations of the examples are accepted. Those of the chart are rendered and checked in tests/e2e/helm."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit.cli_runs import runner

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGURATIONS = sorted(file for file in EXAMPLES.rglob("*.yaml") if "\nkind: " not in f"\n{file.read_text()}")
"""Files that are not objects of Kubernetes."""


@pytest.mark.parametrize("file", CONFIGURATIONS, ids=lambda file: file.parent.name)
def test_it_is_accepted(file: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "custom-policy"))
    ended = runner(capfd)("config", "check", str(file))
    assert ended.code == 0, ended.err
