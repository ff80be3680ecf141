"""What the chart's pages say is what the chart has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidecar.cli import run

ROOT = Path(__file__).parents[2]
DEPLOY, DOCS = ROOT / "deploy", ROOT / "docs"
CHART = DEPLOY / "helm" / "lora-sidecar"
ROW = re.compile(r"^\| `([\w.]+)` \| `(.*?)` \| (.*) \|$", re.MULTILINE)


def leaves(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value with its path; what is meant as a whole, or is empty, is one value."""
    for key, value in values.items():
        here = f"{path}{key}"
        as_a_whole = path == "resources." or key == "labels" or here in ("redis.bundled.resources", "envoy.resources")
        if isinstance(value, dict) and value and not as_a_whole:
            yield from leaves(value, f"{here}.")
        else:
            yield here, value


def test_every_value_is_documented() -> None:
    """The README's table has every value with its default, in the same order, and no other."""
    rows = [(name, json.loads(default)) for name, default, _ in ROW.findall((CHART / "README.md").read_text())]
    assert rows == list(leaves(yaml.safe_load((CHART / "values.yaml").read_text())))


def test_every_value_has_its_meaning_beside_it() -> None:
    """Whoever reads values.yaml reads what the README says of each value, above it."""
    meanings = {name: meaning for name, _, meaning in ROW.findall((CHART / "README.md").read_text())}
    said = dict(commented((CHART / "values.yaml").read_text()))
    for name, meaning in meanings.items():
        expected = re.sub(r"\[(\w+)\]\(#\w+\)", r"\1 in README.md", meaning.replace("**", ""))
        assert said.get(name) == expected, name


def commented(text: str) -> Iterator[tuple[str, str]]:
    """Yield the path of each key in a values file, with the comment right above it."""
    path: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in text.splitlines():
        key = re.match(r"( *)(\w+):", line)
        if line.lstrip().startswith("# "):
            comment.append(line.strip()[2:])
            continue
        if key is not None:
            path = [*(above for above in path if above[0] < len(key[1])), (len(key[1]), key[2])]
            yield ".".join(name for _, name in path), " ".join(comment)
        comment = []


def test_every_value_is_in_the_schema() -> None:
    """The schema knows every value: none is refused by default, none is let through unread."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    for path, _ in leaves(yaml.safe_load((CHART / "values.yaml").read_text())):
        node = schema
        for key in path.split("."):
            node = _resolved(schema, node)
            assert node.get("additionalProperties") is not True, path
            node = node["properties"][key]


def test_objects_of_the_schema_are_closed() -> None:
    """Each object of the chart's own says which keys it may have."""
    schema = yaml.safe_load((DEPLOY / "helm" / "values.schema.yaml").read_text())
    for path, node in _objects(schema):
        if "properties" in node:
            assert node.get("additionalProperties") is False, path


def _resolved(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    return schema["definitions"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node


def _objects(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        if node.get("type") == "object":
            yield path, node
        for key, value in node.items():
            yield from _objects(value, f"{path}/{key}")


def test_every_example_is_documented() -> None:
    """The README's table has every example, and none that there is not."""
    listed = set(re.findall(r"`([\w-]+\.yaml)`", (CHART / "README.md").read_text().partition("## Values")[0]))
    assert listed == {path.name for path in (CHART / "examples").iterdir()}


def test_every_alert_has_a_runbook() -> None:
    """Each alert has an entry of its own, in the order of the rules, and no entry is left over."""
    groups = yaml.safe_load((CHART / "files" / "rules.yaml").read_text())["groups"]
    alerts = [rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule]
    entries = re.findall(r"^### (LoraSidecar\w+)$", (DOCS / "runbook.md").read_text(), re.MULTILINE)
    assert entries == alerts


PAGES = [
    DOCS / "kubernetes.md",
    DOCS / "runbook.md",
    CHART / "README.md",
    CHART / "files" / "rules.yaml",
    CHART / "templates" / "NOTES.txt",
]
GROUPS = {"adapters", "backends", "replicas", "config", "policies", "state", "debug"}
COMMAND = re.compile(r"(?:^|[`(: ])sidecar ([a-z]+)(?: ([a-z]+))?", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_are_ours(page: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Every command that a page names is one of the command line."""
    text = re.sub(r"[A-Za-z-]+sidecar", "", page.read_text())
    named = {(first, second if first in GROUPS else "") for first, second in COMMAND.findall(text)}
    known = {command for command in named if command[0] in GROUPS | {"generate", "queue", "plan", "calibrate", "serve"}}
    assert known
    for command in sorted(known):
        assert run([part for part in command if part] + ["--help"]) == 0, command
    capfd.readouterr()


def test_options_of_values_are_there() -> None:
    """What the pages call a value or a key of the configuration is one."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    for page in PAGES[:3]:
        for path in re.findall(
            r"`((?:config|queue|store|persistence|networkPolicy|monitoring|redis)\.[\w.]+)`", page.read_text()
        ):
            node = schema
            for key in path.split("."):
                node = _resolved(schema, node)
                assert key in node["properties"], f"{page.name}: {path}"
                node = node["properties"][key]
