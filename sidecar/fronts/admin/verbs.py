"""The RPCs of the admin listener: what each asks for, of what, and what the audit says of it.

The listener's interceptor reads this table before a call and after it; an RPC that is not in it is refused. The
message is the call's only one, or the first of a stream that a client sends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic_ns, time
from typing import Any, NamedTuple

from sidecar.access.audit import written_time
from sidecar.access.budgets.charges import which
from sidecar.access.entries import KEY, Key
from sidecar.access.keys import id_in
from sidecar.access.principal import SYSTEM, Action, Resource, Sort
from sidecar.access.resources import adapter_resource, summary
from sidecar.access.store import AccessStore
from sidecar.fronts.kserve.front import NOT_ON_ADMIN
from sidecar.fronts.kserve.verbs import SERVICE as KSERVE
from sidecar.model.reference import Reference
from sidecar.shell.gateway import Gateway
from sidecar.shell.open_requests import names_in
from sidecar.state.records import paused_for
from sidecar.telling.pool import adapter_message, state_of

API = "lorasidecar.v1"


class Sight(NamedTuple):
    """What the table looks at; `store` is None where no keys and limits are kept."""

    gateway: Gateway
    store: AccessStore | None = None


Facts = dict[str, Any]


def _nothing(message: Any, sight: Sight) -> Facts:
    return {}


def _of_system(message: Any, sight: Sight) -> Resource:
    return SYSTEM


@dataclass(frozen=True)
class Verb:
    """One RPC. `action` None admits every caller that is identified.

    `resource(message, sight)` is what the policy is asked about. With `each` the handler shows only what the caller may
    see, name by name, so the policy is not asked about the whole. `changes(message)` tells whether the call changes
    something; `facts(message, sight)` are then what the audit says before and after it, `asked(message)` what was asked
    where no fact tells, and `outcome(reply)` what only the reply tells. With `creates` the name need not exist.
    """

    action: Action | None
    resource: Callable[[Any, Sight], Resource] = _of_system
    changes: Callable[[Any], bool] = lambda message: False
    facts: Callable[[Any, Sight], Facts] = _nothing
    asked: Callable[[Any], Facts] = lambda message: {}
    outcome: Callable[[Any], Facts] = lambda reply: {}
    each: bool = False
    creates: bool = False


def _always(message: Any) -> bool:
    return True


# Adapters.


def _name_in(message: Any) -> str:
    """Return the name in a message without its version; the start of a push has it one level deeper."""
    name: str = message.start.name if message.DESCRIPTOR.name == "PushRequest" else message.name
    return Reference.of(name).name


def _adapter(message: Any, sight: Sight) -> Resource:
    name = _name_in(message)
    record = sight.gateway.catalogue.registry.get(name)
    return Resource(Sort.ADAPTER, name) if record is None else adapter_resource(record)


def _record(message: Any, sight: Sight) -> Facts:
    record = sight.gateway.catalogue.registry.get(_name_in(message))
    if record is None:
        return {}
    now = time()
    # A pause without an end is infinite here, and null in the line.
    more = {
        "versions": len(record.versions),
        "generation": record.version.generation,
        "managed_by": record.managed_by,
        "held_s": max(0.0, record.held_until - now),
        "paused_s": paused_for(record, now),
    }
    return summary(record) | {key: value for key, value in more.items() if value}


def _weights(message: Any, sight: Sight) -> Facts:
    """Return where an adapter's weights are, and whether it is quarantined."""
    name, state = _name_in(message), sight.gateway.state
    if name not in state.names:
        return {}
    shown = adapter_message(state, name, monotonic_ns())
    found: Facts = {
        "store": [copy.tier for copy in shown.store],
        "backends": [each.backend for each in shown.backends if each.tier != "absent"],
    }
    return found | ({"quarantined": shown.quarantined} if shown.quarantined else {})


def _change(action: Action, facts: Callable[[Any, Sight], Facts] = _record) -> Verb:
    return Verb(action, _adapter, _always, facts)


ADAPTERS = {
    "Register": Verb(Action.REGISTER, _adapter, _always, _record, creates=True),
    "Push": Verb(Action.REGISTER, _adapter, _always, _record, creates=True),
    "Unregister": _change(Action.REGISTER),
    "Promote": _change(Action.PROMOTE),
    "Rollback": _change(Action.PROMOTE),
    "Pin": _change(Action.EVICT),
    "Unpin": _change(Action.EVICT),
    "Refresh": _change(Action.EVICT),
    "Evict": _change(Action.EVICT, _weights),
    "Prefetch": _change(Action.EVICT, _weights),
    "Release": _change(Action.EVICT, _weights),
    "Pause": _change(Action.PAUSE),
    "Resume": _change(Action.PAUSE),
    "Get": Verb(Action.SHOW, _adapter),
    "Verify": Verb(Action.PROMOTE, _adapter),
    "List": Verb(Action.LIST, each=True),
    "Watch": Verb(Action.LIST, each=True),
}


# Backends, requests, replicas.


def _backend(message: Any, sight: Sight) -> Resource:
    return Resource(Sort.BACKEND, message.backend)


def _backend_state(message: Any, sight: Sight) -> Facts:
    known = sight.gateway.state.backends.get(message.backend)
    if known is None:
        return {}
    return {"state": state_of(sight.gateway.state, known)}


def _asked(message: Any) -> Facts:
    return _facts_of(message)


def _to_cancel(message: Any) -> Facts:
    """Return by what requests were chosen; a name that is empty is of those that have none."""
    facts = _facts_of(message)
    facts.pop("only", None)
    return facts | names_in(message.only)


BACKENDS = {
    "List": Verb(Action.LIST),
    "Get": Verb(Action.SHOW, _backend),
    "Drain": Verb(
        Action.DRAIN,
        _backend,
        _always,
        _backend_state,
        outcome=lambda reply: {"refused": reply.refused} if reply.refused else {},
    ),
    "Undrain": Verb(Action.DRAIN, _backend, _always, _backend_state),
    # Whoever adds a backend sends it the tenants' prompts, which is more than to drain one.
    "Add": Verb(Action.MANAGE, changes=_always, asked=_asked, outcome=lambda reply: {"state": reply.state}),
    "Remove": Verb(Action.MANAGE, changes=_always, asked=_asked, outcome=lambda reply: {"state": reply.state}),
}
CONFIGURATION = {
    "Reload": Verb(Action.MANAGE, changes=_always, outcome=lambda reply: {"changed": list(reply.changed)}),
    "Get": Verb(Action.MANAGE),
}


def _tenant(message: Any, sight: Sight) -> Resource:
    return Resource(Sort.TENANT, message.tenant) if message.tenant else SYSTEM


QUEUES = {
    "Get": Verb(Action.SEE_QUEUE, each=True),
    "List": Verb(Action.SEE_QUEUE, each=True),
    "Show": Verb(Action.SEE_QUEUE, each=True),
    "Cancel": Verb(
        Action.CANCEL,
        _tenant,
        _always,
        asked=_to_cancel,
        outcome=lambda reply: {"cancelled": reply.cancelled},
        each=True,
    ),
}
POOL = {"Watch": Verb(Action.SEE_QUEUE, each=True)}
REPLICAS = {"List": Verb(Action.LIST)}


# Access.


def _facts_of(message: Any) -> Facts:
    """Return the fields of a message that are set; times are told as the audit tells its own."""
    return {field.name: _fact(field, value) for field, value in message.ListFields()}


def _fact(field: Any, value: Any) -> Any:
    if field.is_repeated:
        return list(value)
    return written_time(value) if field.name.endswith("_at") else value


def _limit(message: Any, sight: Sight) -> Facts:
    """Return the limit of a message's tenant, class, adapter and tokens that was set at run time."""
    own = (message.tenant or None, getattr(message, "class") or None, message.adapter or None), message.tokens or "both"
    for limit in () if sight.store is None else sight.store.limits():
        if which(limit) == own:
            return limit.model_dump(exclude_none=True, exclude_unset=True)
    return {}


def _found_key(message: Any, sight: Sight) -> Key | None:
    found = None if sight.store is None else sight.store.get(KEY + id_in(message.id))
    return found if isinstance(found, Key) else None


def _tenant_of_key(message: Any, sight: Sight) -> Resource:
    key = _found_key(message, sight)
    return SYSTEM if key is None else Resource(Sort.TENANT, key.tenant)


def _key(message: Any, sight: Sight) -> Facts:
    key = _found_key(message, sight)
    return (
        {"key": id_in(message.id)} if key is None else {"key": key.id, "tenant": key.tenant, "state": key.state(time())}
    )


ACCESS = {
    "CreateKey": Verb(Action.MANAGE, _tenant, _always, outcome=lambda reply: _facts_of(reply.key)),
    "RevokeKey": Verb(Action.MANAGE, _tenant_of_key, _always, _key),
    "SetLimit": Verb(Action.MANAGE, _tenant, _always, _limit),
    "RemoveLimit": Verb(Action.MANAGE, _tenant, _always, _limit),
    "ListKeys": Verb(Action.MANAGE, _tenant),
    "ListLimits": Verb(Action.SHOW, each=True),
    "Check": Verb(Action.MANAGE, each=True),
    "WhoAmI": Verb(None),
    "GetUsage": Verb(Action.SHOW, each=True),
    "ReadAudit": Verb(Action.MANAGE, _tenant),
}


# Triton's own verbs, sent to every engine, and the services that gRPC's tools ask.

TRITON = Resource(Sort.BACKEND, "*")


def _engines(message: Any, sight: Sight) -> Resource:
    return TRITON


def _sets(message: Any) -> bool:
    """Return True if a message sets something; without settings it only reads them."""
    return bool(message.settings)


def _model(message: Any, sight: Sight) -> Facts:
    return {"model": message.model_name}


ON_ENGINES = {
    "RepositoryIndex": Verb(Action.LIST),
    "RepositoryModelLoad": Verb(Action.DRAIN, _engines, _always, _model),
    "RepositoryModelUnload": Verb(Action.DRAIN, _engines, _always, _model),
    "TraceSetting": Verb(Action.DRAIN, _engines, _sets, outcome=lambda reply: {"settings": sorted(reply.settings)}),
    "LogSettings": Verb(Action.DRAIN, _engines, _sets, outcome=lambda reply: {"settings": sorted(reply.settings)}),
}

ANYBODY = Verb(None)

_SERVICES: Mapping[str, Mapping[str, Verb]] = {
    f"{API}.Adapters": ADAPTERS,
    f"{API}.Backends": BACKENDS,
    f"{API}.Configuration": CONFIGURATION,
    f"{API}.Queues": QUEUES,
    f"{API}.Pool": POOL,
    f"{API}.Replicas": REPLICAS,
    f"{API}.Access": ACCESS,
    KSERVE: ON_ENGINES | dict.fromkeys(NOT_ON_ADMIN, ANYBODY),
    "grpc.health.v1.Health": {"Check": ANYBODY, "Watch": ANYBODY},
    "grpc.reflection.v1alpha.ServerReflection": {"ServerReflectionInfo": ANYBODY},
}
VERBS: Mapping[str, Verb] = {
    f"/{service}/{name}": verb for service, verbs in _SERVICES.items() for name, verb in verbs.items()
}
"""By the path of the method, as gRPC's `handler_call_details.method` has it."""


def called(method: str) -> str:
    """Return the name of a method in the audit, as "Adapters.Promote"."""
    return method.rpartition(".")[2].replace("/", ".")


def purpose_on_admin(method: str) -> tuple[Action, str]:
    """Return the action of a method, and its name in the audit. What everybody may call shows something."""
    rule = VERBS.get(method, ANYBODY)
    return rule.action or Action.SHOW, called(method)
