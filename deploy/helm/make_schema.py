"""Write the chart's values.schema.json: what is written by hand, and the sections of the configuration as they are.

Run it after `sidecar/config.py` or `values.schema.yaml` has changed; with `--check` it exits 1 if it would write
anything.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from sidecar.backends.registry import kinds
from sidecar.config import Config

HERE = Path(__file__).parent
BY_HAND = HERE / "values.schema.yaml"
SCHEMA = HERE / "lora-sidecar" / "values.schema.json"

OF_THE_CHART = {
    "Config": {"backends", "store", "queue", "data_directory", "kubernetes"},
    "DataListener": {"address", "tls"},
    "AdminListener": {"address", "tls", "token_file", "allow_cleartext"},
    "HttpListener": {"address", "tls"},
    "ProbesListener": {"address", "tls"},
    "EndpointPickerListener": {"tls"},
    "Listeners": {"drain"},
    "Identity": {"mode", "keys_file"},
    "State": {"url", "password_file", "tls"},
    "Replicas": {"address", "advertise", "name", "tls"},
}
"""Keys that the chart sets from other values, or that are values of their own: not to be set under `config`."""
SHORT_FORMS = {"base_model": "a name", "adapters_dir": "one path"}
"""Keys of a backend that take a text in place of their section."""


def schema() -> dict[str, Any]:
    """Return the whole schema."""
    whole: dict[str, Any] = yaml.safe_load(BY_HAND.read_text())
    configuration = Config.model_json_schema()
    sections = {**configuration.pop("$defs"), **_backends(), "Config": configuration}
    whole["definitions"] |= {name: _plain(section) for name, section in sorted(sections.items())}
    for name, keys in OF_THE_CHART.items():
        for key in keys & whole["definitions"][name]["properties"].keys():
            del whole["definitions"][name]["properties"][key]
    backend = whole["definitions"]["Backend"]["properties"]
    for key in SHORT_FORMS:
        backend[key] = {"anyOf": [{"type": "string", "minLength": 1}, backend[key]]}
    return _reachable(whole)


def _backends() -> dict[str, Any]:
    """Return the sections of a backend: one with the keys of all kinds, as which are of which is told at start."""
    sections: dict[str, Any] = {}
    keys: dict[str, Any] = {}
    for kind in kinds():
        section = kind.section.model_json_schema()
        sections |= section.pop("$defs")
        keys |= section["properties"]
    return {**sections, "Backend": section | {"properties": keys}}


def _plain(node: Any) -> Any:
    """Return a part in the words of draft 7, without titles, defaults, texts and null, which Helm takes out."""
    if isinstance(node, list):
        return [_plain(part) for part in node]
    if not isinstance(node, dict):
        return node
    if "anyOf" in node:
        kinds = [part for part in node["anyOf"] if part != {"type": "null"}]
        return _plain(kinds[0]) if len(kinds) == 1 else {"anyOf": _plain(kinds)}
    plain = {key: _plain(value) for key, value in node.items() if key not in ("title", "default", "description")}
    if "properties" in node:  # a section may have keys that are called as the words of a schema are
        plain["properties"] = {key: _plain(value) for key, value in node["properties"].items()}
    if "$ref" in plain:
        return {"$ref": plain["$ref"].replace("#/$defs/", "#/definitions/")}
    if "prefixItems" in plain:
        plain["items"] = plain.pop("prefixItems")
    return plain


def _reachable(whole: dict[str, Any]) -> dict[str, Any]:
    """Leave out the definitions that nothing refers to."""
    found: set[str] = set()
    ahead = [whole["properties"]]
    while ahead:
        names = _referred(ahead.pop()) - found
        found |= names
        ahead += [whole["definitions"][name] for name in sorted(names)]
    return {**whole, "definitions": {name: whole["definitions"][name] for name in sorted(found)}}


def _referred(node: Any) -> set[str]:
    if isinstance(node, dict):
        own = {node["$ref"].rpartition("/")[2]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*(_referred(value) for value in node.values()))
    return set().union(*(_referred(part) for part in node)) if isinstance(node, list) else set()


def main() -> int:
    text = json.dumps(schema(), indent=1) + "\n"
    if "--check" in sys.argv[1:]:
        if SCHEMA.read_text() == text:
            return 0
        print(f"{SCHEMA} is not what the configuration says now; run python deploy/helm/{Path(__file__).name}")
        return 1
    SCHEMA.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
