"""The store of a fake Kubernetes API server: objects with resource versions, and a limited history of changes.

`tests.kit.kubernetes_api` serves it. It keeps the real server's guarantees: every change has its own number, a write
that names another resource version than the object's is a conflict, a watch continues from any number that is not
forgotten, and an object with finalizers is only marked as deleted until the last one has gone.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from tests.kit.kubernetes_rules import WITH_STATUS, Failure, Kind, Object, admitted, check, check_change, shaped

GENERATED_MAX = 58
"""How much of `generateName` goes into a name: with the five random letters it has room in a label."""


@dataclass
class Changed:
    """One change, as a watch reports it."""

    number: int
    kind: Kind
    event: str
    object: Object
    before: Object | None


@dataclass
class Objects:
    """The store. `epoch_s` counts creation times: each object is a second younger than the one before."""

    held: dict[Kind, dict[str, Object]] = field(default_factory=dict)
    history: list[Changed] = field(default_factory=list)
    number: int = 1000
    forgotten: int = 1000
    """The number of the last forgotten change: no watch can begin before it."""
    made: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    news: asyncio.Condition = field(default_factory=asyncio.Condition)

    def get(self, kind: Kind, name: str) -> Object:
        found = self.held.get(kind, {}).get(name)
        if found is None:
            raise Failure(404, "NotFound", f'{kind[2]} "{name}" not found')
        return found

    def create(self, kind: Kind, made: Object) -> Object:
        made = admitted(kind, {"metadata": {}} | copy.deepcopy(made))
        metadata = made["metadata"]
        name = metadata.get("name") or metadata["generateName"][:GENERATED_MAX] + uuid4().hex[:5]
        if name in self.held.get(kind, {}):
            raise Failure(409, "AlreadyExists", f'{kind[2]} "{name}" already exists')
        metadata |= {"name": name, "namespace": kind[1], "uid": str(uuid4()), "generation": 1}
        metadata["creationTimestamp"] = self._now()
        made.pop("status", None)
        return self._write(kind, "ADDED", made)

    def patch(self, kind: Kind, name: str, patch: Object, status: bool) -> Object:
        """Merge a patch into an object, or only into its status."""
        old = self.get(kind, name)
        expected = patch.get("metadata", {}).get("resourceVersion")
        if expected and expected != old["metadata"]["resourceVersion"]:
            raise Failure(409, "Conflict", "the object has been modified; please apply your changes to the latest")
        new = _merged(copy.deepcopy(old), {"status": patch.get("status", {})} if status else patch)
        if not status and kind[2] in WITH_STATUS:
            new = {key: value for key, value in new.items() if key != "status"}
            new |= {"status": old["status"]} if "status" in old else {}
        new = shaped(kind, new)
        check_change(old, new)
        check(kind, new)
        if new == old:
            return old
        if new["metadata"].get("deletionTimestamp") and not new["metadata"].get("finalizers"):
            return self._remove(kind, new)
        new["metadata"]["generation"] += new.get("spec") != old.get("spec")
        return self._write(kind, "MODIFIED", new)

    def delete(self, kind: Kind, name: str) -> Object:
        old = copy.deepcopy(self.get(kind, name))
        metadata = old["metadata"]
        if not metadata.get("finalizers"):
            return self._remove(kind, old)
        if metadata.get("deletionTimestamp"):
            return old
        metadata |= {"deletionTimestamp": self._now(), "generation": metadata["generation"] + 1}
        return self._write(kind, "MODIFIED", old)

    def _remove(self, kind: Kind, old: Object) -> Object:
        self._write(kind, "DELETED", old)
        del self.held[kind][old["metadata"]["name"]]
        return old

    def forget(self) -> None:
        """Forget the history, as the real one does after some minutes."""
        self.history.clear()
        self.forgotten = self.number

    def lose(self, numbers: int) -> None:
        """Continue numbering from an earlier number, as if the later changes had never happened."""
        self.number -= numbers
        self.forget()

    def _now(self) -> str:
        age = next(self.made)
        return f"2026-01-01T{age // 3600:02}:{age // 60 % 60:02}:{age % 60:02}Z"

    def _write(self, kind: Kind, event: str, new: Object) -> Object:
        self.number += 1
        new["metadata"]["resourceVersion"] = str(self.number)
        before = self.held.get(kind, {}).get(new["metadata"]["name"])
        if event != "DELETED":
            self.held.setdefault(kind, {})[new["metadata"]["name"]] = new
        self.history.append(Changed(self.number, kind, event, copy.deepcopy(new), before))
        return new

    async def tell(self) -> None:
        """Wake all watches."""
        async with self.news:
            self.news.notify_all()


def seen_by(change: Changed, selector: str) -> tuple[str, Object] | None:
    """Return a change as a watch with a selector sees it: an object may enter or leave the selection."""
    now = change.event != "DELETED" and matches(change.object, selector)
    was = change.before is not None and matches(change.before, selector)
    if now:
        return ("MODIFIED" if was else "ADDED"), change.object
    if not was:
        return None
    assert change.before is not None
    version = {"resourceVersion": str(change.number)}
    return "DELETED", change.before | {"metadata": change.before["metadata"] | version}


def matches(found: Object, selector: str) -> bool:
    """Return True if an object has all labels of a selector of the form `a=b,c=d`."""
    labels = found["metadata"].get("labels") or {}
    wanted = (part.partition("=") for part in selector.split(",") if part)
    return all(labels.get(key) == value for key, _, value in wanted)


def _merged(old: Any, patch: Any) -> Any:
    """Return a value after a JSON merge patch (RFC 7386)."""
    if not isinstance(patch, dict):
        return patch
    new = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            new.pop(key, None)
        else:
            new[key] = _merged(new.get(key), value)
    return new
