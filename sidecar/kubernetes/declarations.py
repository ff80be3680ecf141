"""What objects of a cluster declare: LoraAdapters, and ConfigMaps with a list of adapters."""

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
"""An annotation: `"true"` lets its declarations have names that were registered by hand."""
GRACE_S = 30.0
"""How long a name answers after its declaration has gone, where that does not say: long enough to put it back."""
PROBLEM_LENGTH_MAX = 500
_DIGEST = re.compile(r"(?:sha256:)?([0-9a-f]{64})\Z")


def loras_in(namespace: str) -> Collection:
    """Return the LoraAdapters of a namespace."""
    return Collection(GROUP, VERSION, "loraadapters", namespace)


def config_maps_in(namespace: str, label: str) -> Collection:
    """Return the ConfigMaps of a namespace that have labels, of the form `key=value,key=value`."""
    return Collection("", "v1", "configmaps", namespace, label)


@dataclass(frozen=True)
class Source:
    """The object that a declaration is in."""

    kind: str
    namespace: str
    name: str
    uid: str = ""
    created: str = ""
    generation: int = 0
    resource_version: str = ""
    leaving: bool = False
    """It is being deleted: what it declares counts no more."""

    @property
    def owner(self) -> str:
        return cluster_owner(self.namespace, self.kind, self.name)

    @property
    def age_key(self) -> tuple[datetime, str, str]:
        """Sorts older objects first; those of one second by kind and name."""
        return datetime.fromisoformat(self.created or "9999-12-31T00:00:00Z"), self.kind, self.name


@dataclass(frozen=True)
class Declaration:
    """One adapter as it is declared. `problem` says what is wrong with that, "" if nothing is."""

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
    problem: str = ""

    @property
    def declared(self) -> Declared:
        """Return what the registry writes down of it, without the content that it comes to."""
        said = json.dumps([self.origin, self.digest, self.rev]).encode()
        return Declared(hashlib.sha256(said).hexdigest()[:16], "", self.prefetch, self.grace_s)


def wish_of(declaration: Declaration | None) -> tuple[object, ...] | None:
    """Return what makes a declaration another one: not that its object has a new status."""
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
class Said:
    """All that one object declares. `problem` says what of it could not be read: then it may declare more than this."""

    source: Source
    declarations: tuple[Declaration, ...] = ()
    problem: str = ""
    status: Object = field(default_factory=dict, compare=False)
    """What the object's status says already."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=to_camel)


class _Prefetch(_Part):
    backends: tuple[str, ...] = ()


class _Removal(_Part):
    grace_seconds: float = Field(GRACE_S, ge=0)


class _Entry(_Part):
    """What both forms say."""

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


def of_lora(found: Object) -> Said:
    """Return what a LoraAdapter declares. One that is wrong declares its name all the same, with what is wrong."""
    source = _source(KIND, found)
    spec, status = found.get("spec") or {}, found.get("status") or {}
    name = str(spec.get("name") or source.name)
    try:
        read = _Spec.model_validate(spec)
        check_name(name)
    except (ValidationError, Invalid) as error:
        return Said(source, (Declaration(source, name, problem=_words(error)),), status=status)
    prefetch = None if read.prefetch is None else read.prefetch.backends
    grace_s = read.removal.grace_seconds
    return Said(source, (_declaration(source, name, read, found, grace_s, prefetch),), status=status)


def of_config_map(found: Object) -> Said:
    """Return what a ConfigMap declares. An entry that is wrong declares its name all the same, if it has one."""
    source = _source("ConfigMap", found)
    text = (found.get("data") or {}).get(ADAPTERS_KEY)
    if text is None:
        return Said(source, problem=f"it has no key {ADAPTERS_KEY}")
    try:
        entries = yaml.safe_load(text)
    except yaml.YAMLError as error:
        words = " ".join(str(error).split())
        return Said(source, problem=f"{ADAPTERS_KEY} is not YAML: {words}"[:PROBLEM_LENGTH_MAX])
    if entries is None:
        return Said(source)
    if not isinstance(entries, list):
        return Said(source, problem=f"{ADAPTERS_KEY} must be a list of entries with name and source")
    nameless = [number for number, entry in enumerate(entries, 1) if not _name_of(entry)]
    declarations = tuple(_of_entry(source, entry, found) for entry in entries if _name_of(entry))
    problem = f"entry {nameless[0]} of {ADAPTERS_KEY} has no name" if nameless else ""
    return Said(source, declarations, problem)


def _name_of(entry: Any) -> str:
    name = entry.get("name") if isinstance(entry, dict) else None
    return name if isinstance(name, str) else ""


def _of_entry(source: Source, entry: Any, found: Object) -> Declaration:
    try:
        read = _MapEntry.model_validate(entry)
        check_name(read.name)
    except (ValidationError, Invalid) as error:
        return Declaration(source, entry["name"], problem=_words(error))
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


def _words(error: ValidationError | Invalid) -> str:
    if isinstance(error, Invalid):
        return error.message
    problems = (
        f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}"
        for problem in error.errors()
    )
    return "; ".join(problems)[:PROBLEM_LENGTH_MAX]
