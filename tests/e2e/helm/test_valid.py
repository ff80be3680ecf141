"""What the chart renders is what Kubernetes takes, from the oldest it supports to the newest there is a schema of."""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.e2e.helm.installed import CHART, HelmInstalled

OLDEST = 29
CUSTOM = {"ServiceMonitor", "PrometheusRule", "ScaledObject", "InferencePool", "DestinationRule"}
"""Kinds that Kubernetes has no schema of."""


def minors(tools: HelmInstalled) -> list[str]:
    """Return the minor versions of Kubernetes to check against."""
    schemas = tools.packages / "kubernetes_validate" / "kubernetes-json-schema"
    numbers = {int(path.name.split(".")[1]) for path in schemas.glob("v1.*")}
    return [f"1.{number}" for number in sorted(numbers) if number >= OLDEST]


def test_oldest_is_what_the_chart_says() -> None:
    """The chart refuses clusters that it is not checked against."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["kubeVersion"] == f">=1.{OLDEST}.0-0"


def test_manifests(tools: HelmInstalled, manifests: Path) -> None:
    """Every object is valid, with no unknown property, in every version; the CRD as well."""
    files = [str(path) for path in [*sorted(manifests.iterdir()), *sorted((CHART / "crds").iterdir())]]
    versions = minors(tools)
    assert len(versions) > 5
    for version in versions:
        done = tools.run("kubernetes-validate", "-k", version, "--strict", *files)
        said = (done.stdout + done.stderr).splitlines()
        assert done.returncode == 0, "\n".join(line for line in said if not line.startswith("INFO"))
        unknown = {line.partition("kind ")[2].split()[0] for line in said if line.startswith("WARN")}
        assert unknown <= CUSTOM, f"{version}: not checked: {unknown - CUSTOM}"
        assert sum("passed for resource" in line for line in said) > len(files)
