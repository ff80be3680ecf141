"""What a Kubernetes API server refuses: names, types, what is required, a definition's schema, what no Role permits.

The rules are those of the API's documentation, for the kinds that tests write. `test_kubernetes_double.py` asks the
fake server and a real one the same. Left out: CEL, and what concerns real networks, as the tests' engines are here.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

Object = dict[str, Any]
Kind = tuple[str, str, str]
"""The API ("" or the group), the namespace and the plural."""
ROLES = Path(__file__).with_name("kubernetes_roles.yaml")
ACCOUNT, JOB = "pool", "pool-keys"
"""The chart's accounts: the process's, and that of the Job that makes the first keys."""
CRD = Path(__file__).parents[2] / "deploy" / "helm" / "lora-sidecar" / "crds" / "loraadapters.yaml"


class Failure(Exception):
    """An answer with an error; `reason` is a Status's."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason}
        self.status["message"] = message


_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_SUBDOMAIN = rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*\Z"
_SERVICE = r"(?=.{1,63}\Z)[a-z]([-a-z0-9]*[a-z0-9])?\Z"
_WORD = r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)"
_QUALIFIED = rf"^({_LABEL}(\.{_LABEL})*/)?{_WORD}\Z"
_FORMATS = {
    "date-time": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[-+]\d\d:\d\d)",
    "micro-time": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|[-+]\d\d:\d\d)",
}
_CHECKER = jsonschema.FormatChecker(())
for _name, _pattern in _FORMATS.items():
    _CHECKER.checks(_name)(lambda value, pattern=_pattern: not isinstance(value, str) or re.fullmatch(pattern, value))


def _record(*required: str, **properties: Any) -> Object:
    return {"type": "object", "properties": properties, "required": list(required)}


def _texts(keys: str, values: str = "") -> Object:
    return {
        "type": "object",
        "propertyNames": {"pattern": keys},
        "additionalProperties": {"type": "string", "pattern": values},
    }


def _list(items: Object, at_least: int = 0, at_most: int = 1000) -> Object:
    return {"type": "array", "items": items, "minItems": at_least, "maxItems": at_most}


_TEXT, _SAID, _FLAG = {"type": "string"}, {"type": "string", "minLength": 1, "maxLength": 128}, {"type": "boolean"}
_PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
_METADATA = _record(
    name=_TEXT,
    generateName=_TEXT,
    namespace=_TEXT,
    labels=_texts(_QUALIFIED, rf"^{_WORD}?\Z"),
    annotations=_texts(_QUALIFIED),
    finalizers=_list({"type": "string", "pattern": rf"^{_LABEL}(\.{_LABEL})*/{_WORD}\Z"}),
)
_DATA = _texts(r"^[-._a-zA-Z0-9]{1,253}\Z")
_ENDPOINT = _record(
    "addresses",
    addresses=_list(_TEXT, 1, 100),
    conditions=_record(ready=_FLAG, serving=_FLAG, terminating=_FLAG),
    targetRef=_record(kind=_TEXT, name=_TEXT, namespace=_TEXT, uid=_TEXT),
)
_EVENT = _record(
    *("eventTime", "reportingController", "reportingInstance", "action", "reason", "type", "regarding"),
    eventTime={"type": "string", "format": "micro-time"},
    reportingController={"type": "string", "pattern": _QUALIFIED},
    reportingInstance=_SAID,
    action=_SAID,
    reason=_SAID,
    type={"type": "string", "enum": ["Normal", "Warning"]},
    note=_TEXT,
    regarding=_record("namespace", namespace=_SAID, kind=_TEXT, name=_TEXT, uid=_TEXT, apiVersion=_TEXT),
)
_KINDS: dict[str, tuple[str, Object]] = {
    "configmaps": ("ConfigMap", _record(data=_DATA)),
    "secrets": ("Secret", _record(data=_DATA, stringData=_DATA, type=_TEXT)),
    "services": (
        "Service",
        _record("spec", spec=_record("ports", ports=_list(_record("port", port=_PORT, name=_TEXT), 1))),
    ),
    "pods": (
        "Pod",
        _record(
            "spec", spec=_record("containers", containers=_list(_record("name", "image", name=_SAID, image=_TEXT), 1))
        ),
    ),
    "endpointslices": (
        "EndpointSlice",
        _record(
            "addressType",
            addressType={"type": "string", "enum": ["IPv4", "IPv6", "FQDN"]},
            endpoints=_list(_ENDPOINT),
            ports=_list(_record(name=_TEXT, port=_PORT, protocol={"type": "string", "enum": ["TCP", "UDP", "SCTP"]})),
        ),
    ),
    "events": ("Event", _EVENT),
}
_NOTE_BYTES_MAX = 1024
IMMUTABLE = ("name", "namespace", "uid", "creationTimestamp", "deletionTimestamp")
WITH_STATUS = ("loraadapters", "pods", "services")


@cache
def _definition() -> Object:
    found: Object = yaml.safe_load(CRD.read_text())["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return found


def admitted(kind: Kind, made: Object) -> Object:
    """Return a new object as the server stores it, without its name if that is generated. Raises Failure."""
    name = _KINDS[kind[2]][0] if kind[2] in _KINDS else "LoraAdapter"
    is_custom, api_version = name == "LoraAdapter", f"{kind[0]}/" if kind[0] else "v1"
    told = {key: made.get(key) for key in ("kind", "apiVersion") if made.get(key) is not None or is_custom}
    if told.get("kind", name) != name or not str(told.get("apiVersion", api_version)).startswith(api_version):
        code = 422 if is_custom and "kind" in made else 400
        raise Failure(code, "Invalid" if code == 422 else "BadRequest", f"{told} cannot be handled as a {name}")
    if made["metadata"].get("namespace", kind[1]) != kind[1]:
        raise Failure(400, "BadRequest", "the namespace of the object does not match the namespace sent on the request")
    made = shaped(kind, made)
    problems = [*_problems(kind, made)]
    if kind[0] in ("", "discovery.k8s.io", "events.k8s.io") or any(
        where.startswith("metadata") for where, _, _ in problems
    ):
        types = [problem for problem in problems if problem[2] in ("type", "format")]
        if types:
            raise Failure(400, "BadRequest", f"cannot be handled as a {name}: {types[0][0]}: {types[0][1]}")
    check(kind, made, problems)
    return made


def check(kind: Kind, found: Object, problems: list[tuple[str, str, str]] | None = None) -> None:
    """Raise Failure if the content or the name of an object is invalid."""
    said = [f"{where}: {what}" for where, what, _ in (_problems(kind, found) if problems is None else problems)]
    metadata = found["metadata"]
    valid = _SERVICE if kind[2] == "services" else _SUBDOMAIN
    begun = metadata.get("generateName", "")
    if not metadata.get("name") and not begun:
        said.append("metadata.name: Required value: name or generateName is required")
    if metadata.get("name") and not re.match(valid, metadata["name"]):
        said.append(f"metadata.name: Invalid value: {metadata['name']!r}")
    if begun and not re.match(valid, begun[:-2] + "a" if begun.endswith("-") else begun):
        said.append(f"metadata.generateName: Invalid value: {begun!r}")
    if len(found.get("note", "").encode()) > _NOTE_BYTES_MAX and kind[2] == "events":
        said.append(f"message: can have at most {_NOTE_BYTES_MAX} characters")
    if said:
        raise Failure(422, "Invalid", f'{kind[2]} "{metadata.get("name", "")}" is invalid: {"; ".join(said)}')


def shaped(kind: Kind, found: Object) -> Object:
    """Return an object without nulls; a LoraAdapter also without fields that its definition lacks, with defaults."""
    if kind[2] != "loraadapters":
        return _without_nulls(found)
    kept = {key: value for key, value in found.items() if key in ("kind", "apiVersion")}
    pruned: Object = _pruned({key: value for key, value in found.items() if key in ("spec", "status")}, _definition())
    return kept | {"metadata": _without_nulls(found["metadata"])} | pruned


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(below) for key, below in value.items() if below is not None}
    return value


def _pruned(value: Any, schema: Object) -> Any:
    if isinstance(value, dict) and "properties" in schema:
        pairs = ((name, value.get(name), below) for name, below in schema["properties"].items())
        filled = ((name, below.get("default") if found is None else found, below) for name, found, below in pairs)
        return {name: _pruned(found, below) for name, found, below in filled if found is not None}
    if isinstance(value, list) and "items" in schema:
        return [_pruned(each, schema["items"]) for each in value]
    return value


def _problems(kind: Kind, found: Object) -> list[tuple[str, str, str]]:
    """Return where something is wrong, what, and which rule says so."""
    schema = _KINDS[kind[2]][1] if kind[2] in _KINDS else _definition()
    whole = schema | {"properties": schema["properties"] | {"metadata": _METADATA}}
    errors = jsonschema.Draft7Validator(whole, format_checker=_CHECKER).iter_errors(found)
    problems = [(".".join(map(str, error.absolute_path)), error.message, str(error.validator)) for error in errors]
    return problems + [(where, "Duplicate value", "set") for where in _doubled(found, whole, "")]


def _doubled(value: Any, schema: Object, where: str) -> list[str]:
    """Return the sets with a value twice, and the lists with a key twice."""
    if isinstance(value, dict):
        below = schema.get("properties", {})
        return [
            path for name in value if name in below for path in _doubled(value[name], below[name], f"{where}.{name}")
        ]
    keys = schema.get("x-kubernetes-list-map-keys", [])
    if not isinstance(value, list) or "x-kubernetes-list-type" not in schema:
        return []
    told = [str([each.get(key) for key in keys] if keys and isinstance(each, dict) else each) for each in value]
    return [where.strip(".")] if len(set(told)) < len(told) else []


def check_change(old: Object, new: Object) -> None:
    """Raise Failure if a change is of what never changes, or begins a finalizer of what is being deleted."""
    before, after = old["metadata"], new["metadata"]
    if after.get("name") != before["name"]:
        raise Failure(400, "BadRequest", f"the name of the object ({after.get('name')}) does not match the URL")
    changed = [key for key in IMMUTABLE if after.get(key) != before.get(key)]
    if before.get("deletionTimestamp") and set(after.get("finalizers", [])) - set(before.get("finalizers", [])):
        changed.append("finalizers")
    if changed:
        raise Failure(422, "Invalid", f"metadata.{changed[0]}: field is immutable")


@cache
def accounts() -> dict[str, list[Object]]:
    """Return the rules of the Roles of each of the chart's accounts."""
    found = list(yaml.safe_load_all(ROLES.read_text()))
    roles = {each["metadata"]["name"]: each["rules"] for each in found if each["kind"] == "Role"}
    rules: dict[str, list[Object]] = {}
    for binding in (each for each in found if each["kind"] == "RoleBinding"):
        rules.setdefault(binding["subjects"][0]["name"], []).extend(roles[binding["roleRef"]["name"]])
    return rules


def permits(rules: list[Object], verb: str, kind: Kind, name: str, is_status: bool) -> bool:
    """Return True if one of a Role's rules permits a request."""
    resource, verb = kind[2] + ("/status" if is_status else ""), "update" if verb == "replace" else verb
    return any(
        kind[0] in rule["apiGroups"]
        and resource in rule["resources"]
        and verb in rule["verbs"]
        and name in rule.get("resourceNames", [name])
        for rule in rules
    )
