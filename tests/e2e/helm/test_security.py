"""checkov finds nothing in what the chart renders, but for what tests/e2e/helm/checkov.yaml explains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.e2e.helm.installed import HelmInstalled
from tests.e2e.helm.rendering import EXAMPLES, Renderer

SKIPPED = Path(__file__).parent / "checkov.yaml"


@pytest.fixture(scope="module")
def failed(tools: HelmInstalled, newest: Renderer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Which checks fail for which objects of the examples, nothing skipped.

    The pod of `helm test` is left out: it lives for a second and has no probes.
    """
    folder = tmp_path_factory.mktemp("checkov")
    for path in EXAMPLES:
        (folder / path.name).write_text(newest.text(path, options=("--skip-tests",)))
    done = tools.run("checkov", "-d", str(folder), "--framework", "kubernetes", "--skip-download", "--output", "json")
    found: dict[str, set[str]] = {}
    report = json.loads(done.stdout)
    assert report["summary"]["resource_count"] > 5 * len(EXAMPLES)
    assert report["summary"]["parsing_errors"] == 0
    for check in report["results"]["failed_checks"]:
        found.setdefault(check["check_id"], set()).add(check["resource"])
    return found


def skipped() -> set[str]:
    return set(yaml.safe_load(SKIPPED.read_text())["skip-check"])


def test_nothing_but_what_is_explained(failed: dict[str, set[str]]) -> None:
    """Every check that fails is one that is skipped with its reason."""
    assert {check: objects for check, objects in failed.items() if check not in skipped()} == {}


def test_no_skip_is_idle(failed: dict[str, set[str]]) -> None:
    """Every skip is still needed."""
    assert skipped() <= failed.keys()


def test_every_skip_has_a_reason() -> None:
    """A comment stands before the skips that it explains."""
    lines = SKIPPED.read_text().partition("skip-check:\n")[2].splitlines()
    assert lines[0].strip().startswith("#")
    assert sum(line.strip().startswith("- ") for line in lines) == len(skipped())


def test_only_the_engine_is_a_low_user(failed: dict[str, set[str]]) -> None:
    """The skip of low user ids is for engines alone."""
    assert all(name.endswith("-engine") for name in failed["CKV_K8S_40"])
