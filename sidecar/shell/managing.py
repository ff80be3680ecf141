"""Decide who may change a name: the owner that declares it, or for a while an operator who overrides that."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace

from sidecar.config.identities import TENANT, problem_of
from sidecar.config.openai import LOADS
from sidecar.errors import Invalid, Reason
from sidecar.state.records import Declared, Record

CONFIG = "config"
BY_HAND = ("cli", "push")
ALLOWED_MAX = 10_000
"""Tenants of an allow list. It is part of the record that every replica holds."""
LABELS_CHARACTERS_MAX = 64 << 10
"""Size of all labels of a version. They are part of the record that every replica holds."""
CLUSTER = "k8s:"
"""Prefix of owners in a Kubernetes cluster: `k8s:NAMESPACE/KIND/NAME`."""
CONFIRM: ContextVar[Callable[[], None]] = ContextVar("confirm", default=lambda: None)
"""Called by each change of a name that this task makes, with the record that it replaces in the registry, right before
it is stored: raises if it is no longer permitted or wanted. What is registered may have taken long to come."""


@dataclass(frozen=True)
class Wanted:
    """A registration's options. `hold_s` makes a change to a name with another owner last that long."""

    allow: tuple[str, ...] = ()
    pin: bool = False
    labels: tuple[tuple[str, str], ...] = ()
    stage: bool = False
    unseen: bool = False
    """Whether a new name stays hidden from all tenants until it is published."""
    managed_by: str = "cli"
    hold_s: float = 0.0
    base: str = ""
    """The base model's name, if the adapter was trained under a name that the engine does not use."""
    digest: str = ""
    """The digest that the content must have; "" for any."""
    take_over: bool = False
    """Whether a declaration may take over a name that was registered by hand."""
    declared: Declared | None = None
    """The declaration's content. It then decides everything: who may use the name, and whether it is pinned."""

    def check(self, name: str) -> None:
        """Raise Invalid(INVALID_NAME) for a malformed tenant, or for too many tenants or labels."""
        if len(self.allow) > ALLOWED_MAX:
            raise Invalid(
                Reason.INVALID_NAME,
                f"{name}: its allow list has {len(self.allow)} tenants; at most {ALLOWED_MAX} are kept",
                adapter=name,
            )
        for tenant in self.allow:
            if problem := problem_of(TENANT, tenant):
                raise Invalid(Reason.INVALID_NAME, f"{name}: the tenant on its allow list {problem}", adapter=name)
        size = sum(len(key) + len(value) for key, value in self.labels)
        if size > LABELS_CHARACTERS_MAX:
            raise Invalid(
                Reason.INVALID_NAME,
                f"{name}: its labels have {size} characters; at most {LABELS_CHARACTERS_MAX} are kept",
                adapter=name,
            )


def cluster_owner(namespace: str, kind: str, name: str) -> str:
    """Return the owner name of an object in a Kubernetes cluster."""
    return f"{CLUSTER}{namespace}/{kind}/{name}"


def owner_phrase(owner: str) -> str:
    """Return an owner as a phrase for people."""
    if owner == LOADS:
        return "a trainer's load calls"
    if not owner.startswith(CLUSTER):
        return owner
    namespace, kind, name = owner.removeprefix(CLUSTER).split("/", 2)
    return f"the {kind} {name} in Kubernetes' namespace {namespace}"


def taken_over(record: Record, wanted: Wanted, now: float) -> Record:
    """Return the record as the owner in `wanted` may change it. Raises Invalid(MANAGED_ELSEWHERE) with its owner."""
    if wanted.managed_by == record.managed_by:
        if wanted.managed_by not in BY_HAND and now < record.held_until:
            raise _elsewhere(
                record,
                f"is held by an operator and stays as it is for another {record.held_until - now:.0f} s",
            )
        return record
    if wanted.hold_s > 0:
        return replace(record, held_until=now + wanted.hold_s)
    if wanted.managed_by == LOADS:
        owner = "hand" if record.managed_by in BY_HAND else owner_phrase(record.managed_by)
        raise _elsewhere(
            record,
            f"is registered by {owner}, and load calls change no name that they did not make; choose another name, or "
            f"unregister it with sidecar adapters unregister {record.name}",
        )
    if record.managed_by == LOADS and wanted.managed_by in BY_HAND:
        return replace(record, managed_by=wanted.managed_by, allow=None if record.is_unseen else record.allow)
    if record.managed_by in BY_HAND:
        if not wanted.managed_by.startswith(CLUSTER) or wanted.take_over:
            return replace(record, managed_by=wanted.managed_by)
        raise _elsewhere(
            record,
            "was registered by hand and is left as it is; unregister it with sidecar adapters unregister "
            f'{record.name}, or let the declaration have it with the annotation lora-sidecar.io/take-over: "true"',
        )
    if _same_namespace(record.managed_by, wanted.managed_by) and now >= record.held_until:
        return replace(record, managed_by=wanted.managed_by)
    way_out = "change it there, or override it for a while with --hold DURATION"
    if wanted.managed_by.startswith(CLUSTER):
        way_out = "take it out there, or give this declaration another name"
    raise _elsewhere(record, f"is managed by {owner_phrase(record.managed_by)} and would be set back; {way_out}")


def check_unregister(record: Record, wanted: Wanted, reconciled: str) -> None:
    """Raise Invalid(MANAGED_ELSEWHERE) if the name would be declared again at once.

    `reconciled` is the prefix of the owners whose declarations are being followed, "" if none are.
    """
    if wanted.managed_by != record.managed_by and reconciled and record.managed_by.startswith(reconciled):
        raise _elsewhere(
            record,
            f"is declared by {owner_phrase(record.managed_by)} and would be registered again; delete it there, and the "
            "name goes with it",
        )


def check_pin(record: Record) -> None:
    """Raise Invalid(MANAGED_ELSEWHERE) if a declaration decides whether the name is pinned."""
    if record.managed_by.startswith(CLUSTER):
        raise _elsewhere(record, f"is declared by {owner_phrase(record.managed_by)}; set pinned there")


def _same_namespace(one: str, other: str) -> bool:
    """Return True if both owners are in one namespace: the reader of all its declarations decides between them."""
    return one.startswith(CLUSTER) and other.startswith(f"{one.partition('/')[0]}/")


def _elsewhere(record: Record, why: str) -> Invalid:
    return Invalid(Reason.MANAGED_ELSEWHERE, f"{record.name} {why}", adapter=record.name)
