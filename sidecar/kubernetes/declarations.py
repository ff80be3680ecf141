"""Parse the objects that declare adapters: LoraAdapters, and ConfigMaps with a list of adapters."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.alias_generators import to_camel

from sidecar.adapters.names import check_name
from sidecar.config.identities import TENANT, check_words
from sidecar.errors import Invalid
from sidecar.kubernetes.api import Collection, Object
from sidecar.shell.managing import cluster_owner
from sidecar.state.records import Declared

GROUP, VERSION, KIND = "lora-sidecar.io", "v1alpha1", "LoraAdapter"
ADAPTERS_KEY = "adapters.yaml"
ADAPTERS_LABEL = "lora-sidecar.io/adapters=true"
TAKE_OVER = "lora-sidecar.io/take-over"
"""An annotation: `"true"` lets an object's declarations take over names that were registered by hand."""
RETRY = "lora-sidecar.io/retry"
"""An annotation: with each other value, what failed of an object's declarations is tried again at once."""
GRACE_S = 30.0
"""The default time in seconds for which a name answers after its declaration was deleted: enough to restore it."""
PROBLEM_LENGTH_MAX = 500
_DIGEST = re.compile(r"(?:sha256:)?([0-9a-f]{64})\Z")


def loras_in(namespace: str) -> Collection:
    """Return the collection of LoraAdapters of a namespace."""
    return Collection(GROUP, VERSION, "loraadapters", namespace)


def config_maps_in(namespace: str, label: str) -> Collection:
    """Return the collection of ConfigMaps of a namespace with labels; `label` has the form `key=value,key=value`."""
    return Collection("", "v1", "configmaps", namespace, label)


@dataclass(frozen=True)
class Source:
    """The object that contains a declaration."""

    kind: str
    namespace: str
    name: str
    uid: str = ""
    created: str = ""
    generation: int = 0
    resource_version: str = ""
    leaving: bool = False
    """True while the object is being deleted: its declarations no longer count."""

    @property
    def owner(self) -> str:
        return cluster_owner(self.namespace, self.kind, self.name)

    @property
    def age_key(self) -> tuple[datetime, str, str]:
        """A key that sorts older objects first, and objects of one second by kind and name."""
        return datetime.fromisoformat(self.created or "9999-12-31T00:00:00Z"), self.kind, self.name


@dataclass(frozen=True)
class Declaration:
    """One declared adapter. `problem` is the fault of the declaration, "" if it has none."""

    source: Source
    name: str
    origin: str = ""
    digest: str = ""
    tenants: tuple[str, ...] = ()
    pinned: bool = False
    prefetch: tuple[str, ...] | None = None
    grace_s: float = GRACE_S
    rev: str = ""
    take_over: bool = False
    retry: str = ""
    problem: str = ""

    @property
    def declared(self) -> Declared:
        """Return what the registry stores of the declaration, without the digest of its content."""
        said = json.dumps([self.origin, self.digest, self.rev]).encode()
        return Declared(hashlib.sha256(said).hexdigest()[:16], "", self.prefetch, self.grace_s)


def wish_of(declaration: Declaration | None) -> tuple[object, ...] | None:
    """Return the part of a declaration whose change needs work; a new status of its object is not part of it."""
    if declaration is None:
        return None
    return (
        declaration.source.uid,
        declaration.declared,
        declaration.tenants,
        declaration.pinned,
        declaration.take_over,
        declaration.problem,
    )


@dataclass(frozen=True)
class DeclaringObject:
    """One object and its declarations. With a `problem`, parts were unreadable, and it may declare more than this."""

    source: Source
    declarations: tuple[Declaration, ...] = ()
    problem: str = ""
    status: Object = field(default_factory=dict, compare=False)
    """The object's current status."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=to_camel)


class _Prefetch(_Part):
    backends: tuple[str, ...] = ()


class _Removal(_Part):
    grace_seconds: float = Field(GRACE_S, ge=0)


class _Entry(_Part):
    """The fields that a LoraAdapter and an entry of a ConfigMap share."""

    source: str = Field(min_length=1)
    digest: str = ""
    tenants: tuple[str, ...] = ()
    pinned: bool = False
    rev: str = ""

    @field_validator("tenants")
    @classmethod
    def _are_tenants(cls, tenants: tuple[str, ...]) -> tuple[str, ...]:
        check_words(TENANT, tenants)
        return tenants

    @field_validator("digest")
    @classmethod
    def _is_a_digest(cls, digest: str) -> str:
        found = _DIGEST.match(digest)
        if digest and found is None:
            raise ValueError("it must be 64 hexadecimal digits, as sidecar adapters show prints them")
        return found[1] if found else ""

    @field_validator("rev", mode="before")
    @classmethod
    def _may_be_a_number(cls, rev: Any) -> Any:
        return str(rev) if isinstance(rev, int | float) else rev


class _Spec(_Entry):
    name: str = ""
    prefetch: _Prefetch | None = None
    removal: _Removal = _Removal()


class _MapEntry(_Entry):
    name: str
    removal_grace_seconds: float = Field(GRACE_S, ge=0)


def of_lora(found: Object) -> DeclaringObject:
    """Return the declaration of a LoraAdapter. A faulty one still declares its name, with the fault as `problem`."""
    source = _source(KIND, found)
    spec, status = found.get("spec") or {}, found.get("status") or {}
    name = str(spec.get("name") or source.name)
    try:
        read = _Spec.model_validate(spec)
        check_name(name)
    except (ValidationError, Invalid) as error:
        return DeclaringObject(source, (Declaration(source, name, problem=_describe(error)),), status=status)
    prefetch = None if read.prefetch is None else read.prefetch.backends
    grace_s = read.removal.grace_seconds
    return DeclaringObject(source, (_declaration(source, name, read, found, grace_s, prefetch),), status=status)


def of_config_map(found: Object) -> DeclaringObject:
    """Return the declarations of a ConfigMap. A faulty entry still declares its name, if it has one."""
    source = _source("ConfigMap", found)
    text = (found.get("data") or {}).get(ADAPTERS_KEY)
    if text is None:
        return DeclaringObject(source, problem=f"it has no key {ADAPTERS_KEY}")
    try:
        entries = yaml.safe_load(text)
    except yaml.YAMLError as error:
        words = " ".join(str(error).split())
        return DeclaringObject(source, problem=f"{ADAPTERS_KEY} is not YAML: {words}"[:PROBLEM_LENGTH_MAX])
    if entries is None:
        return DeclaringObject(source)
    if not isinstance(entries, list):
        return DeclaringObject(source, problem=f"{ADAPTERS_KEY} must be a list of entries with name and source")
    nameless = [number for number, entry in enumerate(entries, 1) if not _name_of(entry)]
    declarations = tuple(_of_entry(source, entry, found) for entry in entries if _name_of(entry))
    problem = f"entry {nameless[0]} of {ADAPTERS_KEY} has no name" if nameless else ""
    return DeclaringObject(source, declarations, problem)


def _name_of(entry: Any) -> str:
    name = entry.get("name") if isinstance(entry, dict) else None
    return name if isinstance(name, str) else ""


def _of_entry(source: Source, entry: Any, found: Object) -> Declaration:
    try:
        read = _MapEntry.model_validate(entry)
        check_name(read.name)
    except (ValidationError, Invalid) as error:
        return Declaration(source, entry["name"], problem=_describe(error))
    return _declaration(source, read.name, read, found, read.removal_grace_seconds, None)


def _declaration(
    source: Source, name: str, read: _Entry, found: Object, grace_s: float, prefetch: tuple[str, ...] | None
) -> Declaration:
    annotations = found["metadata"].get("annotations") or {}
    return Declaration(
        source,
        name,
        read.source,
        read.digest,
        read.tenants,
        read.pinned,
        prefetch,
        grace_s,
        read.rev,
        annotations.get(TAKE_OVER) == "true",
        annotations.get(RETRY, ""),
    )


def _source(kind: str, found: Object) -> Source:
    metadata = found["metadata"]
    return Source(
        kind,
        metadata["namespace"],
        metadata["name"],
        metadata.get("uid", ""),
        metadata.get("creationTimestamp") or "",
        metadata.get("generation", 0),
        metadata.get("resourceVersion", ""),
        bool(metadata.get("deletionTimestamp")),
    )


def _describe(error: ValidationError | Invalid) -> str:
    if isinstance(error, Invalid):
        return error.message
    problems = (
        f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}"
        for problem in error.errors()
    )
    return "; ".join(problems)[:PROBLEM_LENGTH_MAX]
