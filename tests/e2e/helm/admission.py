"""What an API server says to an object of a CRD: the errors of its schema and of its CEL rules, from JSON to JSON.

It runs in the environment that has a CEL evaluator and jsonschema, and knows nothing of the tests. Input: the CRD's
schema and a list of pairs, an object and what it was before, null for a new one. Output: a list of errors for each.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import celpy
import jsonschema
from celpy import celtypes
from celpy.adapter import json_to_cel

ENVIRONMENT = celpy.Environment()


def errors(schema: dict[str, Any], new: Any, old: Any) -> list[str]:
    """Return what is wrong with an object: first its form, and if that is right, what the rules say."""
    found = [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in jsonschema.Draft7Validator(schema).iter_errors(new)
    ]
    return sorted(found) or sorted(broken_rules(schema, new, old, ""))


def broken_rules(schema: dict[str, Any], new: Any, old: Any, path: str) -> list[str]:
    """Return the messages of the rules that do not hold, here and below. A rule on what was before needs that."""
    said = []
    for validation in schema.get("x-kubernetes-validations", []):
        about_change = "oldSelf" in validation["rule"]
        if not about_change or old is not None:
            values = {"self": json_to_cel(new)} | ({"oldSelf": json_to_cel(old)} if about_change else {})
            if not evaluate(validation["rule"], values):
                said.append(f"{path}: {validation['message']}")
    for name, below in schema.get("properties", {}).items():
        if isinstance(new, dict) and name in new:
            before = old.get(name) if isinstance(old, dict) else None
            said += broken_rules(below, new[name], before, f"{path}.{name}".strip("."))
    return said


def evaluate(rule: str, values: dict[str, Any]) -> bool:
    """Return what a rule comes to; one that is no truth value is an error of its author."""
    result = ENVIRONMENT.program(ENVIRONMENT.compile(rule)).evaluate(values)
    assert isinstance(result, celtypes.BoolType | bool), f"{rule} gives {result!r}"
    return bool(result)


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    json.dump([errors(asked["schema"], new, old) for new, old in asked["pairs"]], sys.stdout)
