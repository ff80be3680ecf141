"""`/v1/models`: the base models and the adapters that a client may name, in the form of vLLM's own list."""

from __future__ import annotations

from collections.abc import Iterator
from time import time
from typing import Any

from sidecar.core.admission import BASE_NAMES
from sidecar.errors import Refused
from sidecar.fronts.eligible import base_names
from sidecar.shell.gateway import Gateway
from sidecar.shell.loading import PATH
from sidecar.state.records import Record, Version

OWNER = "lora-sidecar"
BASE = BASE_NAMES[-1]


class Models:
    """The models as a tenant sees them: an adapter that it may not use is not shown."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._since = int(time())

    def listed(self, tenant: str, versions: bool) -> dict[str, Any]:
        """Return the list; with `versions` each version of an adapter also has an entry of its own."""
        entries = [*self._bases(), *self._adapters(tenant, versions)]
        return {"object": "list", "data": entries}

    def one(self, model: str, tenant: str) -> dict[str, Any] | None:
        """Return the entry of a base model, an adapter or a version of one; None if there is none."""
        name, _, selector = model.partition("@")
        record = self._gateway.catalogue.registry.get(name)
        if record is None:
            names = {alias for bases in self._base_names() for alias in bases} | {BASE}
            return self._base(model) if model in names else None
        if not _may_see(record, tenant):
            return None
        try:
            version = _selected(record, selector) if selector else record.version
        except Refused:
            return None
        return self._entry(model, record, version)

    def _bases(self) -> Iterator[dict[str, Any]]:
        if not self._gateway.state.config.base_requests:
            return
        names = dict.fromkeys(bases[0] for bases in self._base_names() if bases)
        yield from (self._base(name) for name in names or (BASE,))

    def _base_names(self) -> list[tuple[str, ...]]:
        return [base_names(backend.facts) for backend in self._gateway.state.backends.values()]

    def _base(self, name: str) -> dict[str, Any]:
        return self._record(name, self._since, name, None) | {"max_model_len": self._longest(name)}

    def _longest(self, base: str) -> int | None:
        """Return the longest sequence that an engine of a base model takes; None if that is unknown."""
        facts = [backend.facts for backend in self._gateway.state.backends.values()]
        serving = [one.sequence_tokens_max for one in facts if base in base_names(one) or base == BASE]
        return max((length for length in serving if length is not None), default=None)

    def _adapters(self, tenant: str, versions: bool) -> Iterator[dict[str, Any]]:
        for record in self._gateway.catalogue.registry.all():
            if not _may_see(record, tenant):
                continue
            yield self._entry(record.name, record, record.version)
            if versions:
                for version in record.versions:
                    yield self._entry(_label(record, version), record, version)

    def _entry(self, model: str, record: Record, version: Version) -> dict[str, Any]:
        root = dict(version.labels).get(PATH) or _label(record, version)
        return self._record(model, int(version.registered_at) or self._since, root, self._parent(version))

    def _parent(self, version: Version) -> str:
        """Return the base model by its listed name: an adapter may have been trained under an alias of it."""
        trained_on = version.adapter.base_model
        listed = (bases[0] for bases in self._base_names() if trained_on in bases)
        return next(listed, trained_on)

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


def _may_see(record: Record, tenant: str) -> bool:
    return record.allow is None or tenant in record.allow


def _label(record: Record, version: Version) -> str:
    return f"{record.name}@v{version.ordinal}"


def _selected(record: Record, selector: str) -> Version:
    """Return the version that "v8" or the start of a digest selects. Raises Refused if there is none."""
    ordinal = selector.removeprefix("v")
    found = [one for one in record.versions if len(selector) >= 8 and one.adapter.digest.startswith(selector)]
    if found:
        return found[-1]
    return record.of(int(ordinal) if ordinal.isdecimal() and selector[:1] == "v" and len(ordinal) < 9 else -1)
