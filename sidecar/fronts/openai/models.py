"""`/v1/models`: the base models and the adapters that a client may name, in the form of vLLM's own list."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from time import time
from typing import Any

from sidecar.access.access import Caller
from sidecar.backends.registry import base_names, engines_of, is_base_model
from sidecar.model.reference import BASE_NAMES, Reference
from sidecar.shell.gateway import Gateway
from sidecar.shell.loading import PATH
from sidecar.state.records import Record, Version

OWNER = "lora-sidecar"
BASE = BASE_NAMES[-1]
ANY = ""
"""Stands for the base model of engines that take adapters of whichever base model."""


class Models:
    """The models as a tenant sees them: an adapter that it may not use is not shown."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._since = int(time())

    async def listed(self, caller: Caller, tenant: str, versions: bool) -> bytes:
        """Return the list as JSON; with `versions` each version of an adapter also has an entry of its own.

        Thousands of names take tens of milliseconds, so a thread makes their entries.
        """
        access, records = self._gateway.access, self._gateway.catalogue.registry.all()
        shown = await access.visible(caller, tenant, records)
        bases = self.bases(caller)

        def entries() -> Iterator[bytes]:
            for name in dict.fromkeys(bases.values()):
                yield json.dumps(self._base(name)).encode()
            for record in records:
                if record.name in shown:
                    for entry in self._entries(caller, record, versions, bases):
                        yield json.dumps(entry).encode()

        data = await asyncio.to_thread(lambda: b", ".join(entries()))
        return b'{"object": "list", "data": [' + data + b"]}"

    def one(self, model: str, caller: Caller, tenant: str) -> dict[str, Any] | None:
        """Return the entry of a base model, an adapter or a version of one; None if there is none."""
        name, selector = Reference.of(model)
        record = self._gateway.catalogue.registry.get(name)
        if record is None:
            is_known = model == BASE or is_base_model(self._gateway.state, model)
            return self._base(model) if is_known and self.may_use_base(caller, model) else None
        if not self._gateway.access.may_see(caller, tenant, record):
            return None
        version = record.selected(selector) if selector else record.version
        if version is None:
            return None
        if selector and not self._gateway.access.may_see_version(caller, record, version.ordinal):
            return None
        return self._entry(model, caller, record, version, self.bases(caller))

    def may_use_base(self, caller: Caller, name: str) -> bool:
        """Return True if a list may show a base model to a caller, whose requests may have its name."""
        return self._gateway.state.config.base_requests and self._gateway.access.may_see_base(caller, name)

    def bases(self, caller: Caller) -> dict[str, str]:
        """Return the listed name of each base model that a caller may use, by all its names, and by ANY.

        The name is one that requests may have: an adapter of the same name takes it away, and an engine whose base
        model is unknown is asked for BASE, if no engine's is known.
        """
        named, adapters = False, self._gateway.catalogue.registry
        found: dict[str, str | None] = {}
        for facts in engines_of(self._gateway.state):
            names = base_names(facts)
            named = named or bool(names)
            listed = next((name for name in names if adapters.get(name) is None), None)
            for name in (*names, *(() if facts.base_models or not names else (ANY,))):
                found.setdefault(name, listed)
        if not named:
            found = dict.fromkeys((BASE, ANY), BASE)
        return {name: listed for name, listed in found.items() if listed and self.may_use_base(caller, listed)}

    def _base(self, name: str) -> dict[str, Any]:
        return self._record(name, self._since, name, None) | {"max_model_len": self._longest(name)}

    def _longest(self, base: str) -> int | None:
        """Return the longest sequence that an engine of a base model takes; None if that is unknown."""
        facts = [backend.facts for backend in self._gateway.state.backends.values()]
        serving = [one.sequence_tokens_max for one in facts if base in base_names(one) or base == BASE]
        return max((length for length in serving if length is not None), default=None)

    def _entries(
        self, caller: Caller, record: Record, versions: bool, bases: Mapping[str, str]
    ) -> Iterator[dict[str, Any]]:
        yield self._entry(record.name, caller, record, record.version, bases)
        for version in record.versions if versions else ():
            if self._gateway.access.may_see_version(caller, record, version.ordinal):
                yield self._entry(_label(record, version), caller, record, version, bases)

    def _entry(
        self, model: str, caller: Caller, record: Record, version: Version, bases: Mapping[str, str]
    ) -> dict[str, Any]:
        access, path = self._gateway.access, dict(version.labels).get(PATH)
        created, root = int(version.registered_at) or self._since, _label(record, version)
        if not access.may_see_version(caller, record, version.ordinal):
            created, root = self._since, record.name
        elif path and access.may_change(caller, record):
            root = path
        parent = bases.get(version.adapter.base_model) or bases.get(ANY)
        return self._record(model, created, root, parent)

    def _record(self, model: str, created: int, root: str, parent: str | None) -> dict[str, Any]:
        return {
            "id": model,
            "object": "model",
            "created": created,
            "owned_by": OWNER,
            "root": root,
            "parent": parent,
            "permission": [],
        }


def _label(record: Record, version: Version) -> str:
    return f"{record.name}@v{version.ordinal}"
