"""The chart rendered: a release's objects from values, and all the examples and cases of the matrix."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.e2e.helm.installed import CHART, HelmInstalled
from tests.e2e.helm.matrix import cases

RELEASE, NAMESPACE = "pool", "lora"
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
Object = dict[str, Any]


class Refused(Exception):
    """Helm did not render; the text is what it said."""


def kind_and_name(found: Object) -> tuple[str, str, str]:
    """Return what tells an object from all others."""
    return found["kind"], found["metadata"].get("namespace", ""), found["metadata"]["name"]


@dataclass
class Renderer:
    """One Helm, and a folder for values files."""

    tools: HelmInstalled
    program: str
    folder: Path

    def text(self, *values: Path, chart: Path = CHART, options: tuple[str, ...] = (), **variables: str) -> str:
        """Return what `helm template` prints. Raises Refused.

        A gateway whose values name no engine gets one, which it needs and most tests are not about.
        """
        given = [yaml.safe_load(path.read_text()) or {} for path in values]
        if chart == CHART and not any("backends" in each or each.get("mode") == "sidecar" for each in given):
            options = ("--set", "backends[0].url=triton://triton:8001", *options)
        files = [argument for path in values for argument in ("--values", str(path))]
        command = ["template", RELEASE, str(chart), "--namespace", NAMESPACE, *files, *options]
        done = self.tools.run(self.program, *command, **variables)
        if done.returncode:
            raise Refused(done.stderr)
        return done.stdout

    def objects(self, *values: Path | Object, **more: Any) -> list[Object]:
        """Return the objects of a release from values files, or values. Raises Refused."""
        text = self.text(*(self.file(part) if isinstance(part, dict) else part for part in values), **more)
        return [found for found in yaml.load_all(text, yaml.CSafeLoader) if found]

    def file(self, values: Object) -> Path:
        """Write values into a file of their own."""
        path = self.folder / f"values-{len(list(self.folder.iterdir()))}.yaml"
        path.write_text(json.dumps(values))
        return path

    def everything(self) -> dict[str, list[Object]]:
        """Return the objects of every example and every case of the matrix, by name."""
        found = {path.stem: self.objects(path) for path in EXAMPLES}
        return found | {name: self.objects(values) for name, values in cases().items()}

    def write(self, rendered: dict[str, list[Object]], folder: Path) -> None:
        """Write a file for each release, without objects that an earlier one has just so."""
        written: set[str] = set()
        for name, objects in rendered.items():
            by_text = {json.dumps(found, sort_keys=True): found for found in objects}
            new = [found for text, found in by_text.items() if text not in written]
            written |= by_text.keys()
            if new:
                (folder / f"{name}.yaml").write_text(yaml.dump_all(new, Dumper=yaml.CSafeDumper, sort_keys=False))


def one(objects: list[Object], kind: str, name: str = "") -> Object:
    """Return the only object of a kind, or the one whose name ends so."""
    found = [each for each in objects if each["kind"] == kind and each["metadata"]["name"].endswith(name)]
    assert len(found) == 1, f"{len(found)} objects of kind {kind} named …{name}"
    return found[0]


def hooks(found: Object) -> list[str]:
    """Return the moments of a release at which an object is made; none for what is there all the time."""
    named: str = found["metadata"].get("annotations", {}).get("helm.sh/hook", "")
    return named.split(",") if named else []


def pods(objects: list[Object]) -> Iterator[Object]:
    """Yield the pod templates of all workloads, and pods."""
    for found in objects:
        if found["kind"] in ("Deployment", "StatefulSet", "Job"):
            yield found["spec"]["template"]
        elif found["kind"] == "Pod":
            yield found


def containers(pod: Object) -> list[Object]:
    """Return a pod's containers, those that start first included."""
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def configuration(objects: list[Object]) -> str:
    """Return the configuration file of a release."""
    maps = [found for found in objects if found["kind"] == "ConfigMap" and "config.yaml" in found.get("data", {})]
    assert len(maps) == 1
    text: str = maps[0]["data"]["config.yaml"]
    return text
