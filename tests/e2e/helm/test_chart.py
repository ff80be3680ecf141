"""Both Helms take the chart, and make the same of it."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path

import pytest

from tests.e2e.helm.installed import CHART, HELMS, HelmInstalled
from tests.e2e.helm.matrix import MODES, pairwise
from tests.e2e.helm.rendering import EXAMPLES, NAMESPACE, RELEASE, Object, Renderer, kind_and_name

PARTS = {
    "one-triton": {"StatefulSet", "Service", "ConfigMap", "ServiceAccount", "PodDisruptionBudget", "NetworkPolicy"},
    "four-tritons": {"Deployment", "ServiceMonitor", "PrometheusRule"},
    "high-availability": {"StatefulSet", "HorizontalPodAutoscaler", "PriorityClass", "PrometheusRule"},
    "discovered": {"Role", "RoleBinding", "ScaledObject", "Deployment"},
    "envoy-vllm": {"Deployment", "Service"},
    "inference-pool": {"InferencePool", "DestinationRule", "Service", "NetworkPolicy"},
    "sidecar-triton": {"Deployment", "Service", "ConfigMap", "NetworkPolicy"},
}


@pytest.mark.parametrize("values", [None, *EXAMPLES], ids=lambda path: path.stem if path else "defaults")
def test_lint(helm: Renderer, values: Path | None) -> None:
    """No Helm has anything to say against the chart, with its defaults and with each example."""
    options = ["--values", str(values)] if values else []
    done = helm.tools.run(helm.program, "lint", "--strict", "--namespace", NAMESPACE, str(CHART), *options)
    assert done.returncode == 0, done.stdout + done.stderr


def test_helms_agree(tools: HelmInstalled, rendered: dict[str, list[Object]], tmp_path: Path) -> None:
    """Helm 3 and Helm 4 make the same objects of every example and every case of the matrix, but for passwords."""
    other = Renderer(tools, HELMS[0], tmp_path).everything()
    assert {name: _without_passwords(objects) for name, objects in other.items()} == {
        name: _without_passwords(objects) for name, objects in rendered.items()
    }


def _without_passwords(objects: list[Object]) -> list[Object]:
    return [found | {"data": sorted(found["data"])} if found["kind"] == "Secret" else found for found in objects]


def test_parts(rendered: dict[str, list[Object]]) -> None:
    """Examples have the objects that they are there to show."""
    for name, wanted in PARTS.items():
        assert wanted <= {found["kind"] for found in rendered[name]}, name


def test_names_and_namespaces(rendered: dict[str, list[Object]]) -> None:
    """No object is twice in a release, and all that can be are in a namespace that is named."""
    for name, objects in rendered.items():
        names = [kind_and_name(found) for found in objects]
        assert len(names) == len(set(names)), name
        assert all(namespace for kind, namespace, _ in names if kind != "PriorityClass"), name


@pytest.mark.parametrize("mode", MODES)
def test_matrix_covers_every_pair(mode: str) -> None:
    """Any two choices of different options meet in a case, and there are far fewer cases than combinations."""
    options = MODES[mode]
    rows = pairwise(options)
    for first, second in combinations(options, 2):
        met = {(row[first], row[second]) for row in rows}
        assert met == set(product(range(len(options[first])), range(len(options[second])))), (first, second)
    assert len(rows) < 40


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_notes(tools: HelmInstalled, path: Path) -> None:
    """An installation says which commands come next, of objects that it has made. Helm 3 shows it to a cluster only."""
    command = ["install", RELEASE, str(CHART), "--namespace", NAMESPACE, "--values", str(path), "--dry-run=client"]
    done = tools.run(HELMS[-1], *command)
    assert done.returncode == 0, done.stderr
    notes = done.stdout.partition("NOTES:")[2]
    target = next(line.split()[-1] for line in notes.splitlines() if "rollout status" in line)
    kind, _, name = target.partition("/")
    made = done.stdout.lower()
    assert f"kind: {kind}" in made
    assert f"\n  name: {name}\n" in made
    assert ("Keep it in your values (identity: {mode: enforce})" in notes) == ("--guard=" in done.stdout)
    makes_keys = "--secret=" in done.stdout
    assert notes.count("kubectl -n lora") == (4 if makes_keys else 3)
    if makes_keys:
        secret = notes.partition("get secret ")[2].split()[0]
        assert f"--secret={secret}\n" in done.stdout
