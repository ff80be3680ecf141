"""The written form of events, effects and the whole state: JSON, as msgspec writes the core's own records.

A record is an object of its fields; an event or an effect begins with its name, under "!". The state is a copy, whose
policies are what their `snapshot` returned. The same value always gives the same bytes: insertion order is kept.

What is read is checked: each field must have its type. JSON has finite numbers only: an infinite one is written as
null, which is refused when it is read.

A field that is added, removed or renamed changes the format: raise `FORMAT` in `segments`, and write the samples again
with `python -m tests.golden.make_journals`. A journal of another format is refused by its number.
"""

from __future__ import annotations

from collections import deque
from typing import Any, get_args, get_origin

import msgspec

from policies.id_queue import IdQueue
from policies.views import Eviction, Ordering, Prefetch, Routing
from sidecar.core.config import CoreConfig
from sidecar.core.core import Core, Policies
from sidecar.core.effects import Effect
from sidecar.core.events import Event
from sidecar.core.state import State
from sidecar.journal.snapshot import PolicySnapshot

POLICIES = (Eviction, Ordering, Routing, Prefetch)
EVENTS: dict[str, type[Event]] = {event.__name__: event for event in get_args(Event)}


def dumps(value: Any) -> bytes:
    """Return a value of the core as one line of JSON. Raises TypeError for anything that has no written form."""
    return _ENCODER.encode(value)


def named(value: Event | Effect) -> bytes:
    """Return an event or an effect as one line of JSON that begins with its name."""
    fields = _ENCODER.encode(value)
    return b'{"!":"%s"%s' % (type(value).__name__.encode(), b"," + fields[1:] if len(fields) > 2 else b"}")


def listed(effects: Any) -> bytes:
    """Return a step's effects as one line of JSON."""
    return b"[%s]" % b",".join(map(named, effects))


def event_of(written: Any) -> Event:
    """Return an event from what `loads` returns of its line. Raises ValueError or KeyError for anything else."""
    return msgspec.convert(written, EVENTS[written["!"]], str_keys=True, dec_hook=_decoded)


def config_of(written: Any) -> CoreConfig:
    """Return a configuration of the core. Raises ValueError for anything else."""
    return msgspec.convert(written, CoreConfig, str_keys=True, dec_hook=_decoded)


def loads(line: bytes | str) -> Any:
    """Return the JSON values of a line; of members with one name the last counts. Raises ValueError for no JSON."""
    return msgspec.json.decode(line)


def restore(written: dict[str, Any], policies: Policies) -> Core:
    """Return a core in a written state. Raises ValueError or KeyError for what is none."""
    made = {
        "routing": _restored(policies.routing(), written["routing"]),
        "prefetch": _restored(policies.prefetch(), written["prefetch"]),
    }
    for name, policy in (("store", policies.eviction()), ("disk", policies.disk_eviction())):
        made[name] = written[name] | {"policy": _restored(policy, written[name]["policy"])}
    made["backends"] = {
        key: backend | {"ordering": _restored(policies.ordering(), backend["ordering"])}
        for key, backend in written["backends"].items()
    }
    state = msgspec.convert(written | made, State, str_keys=True, dec_hook=_decoded)
    core = Core(state.config, policies)
    core.state = state
    state.where.find(state)
    return core


def _restored(policy: Any, snapshot: Any) -> Any:
    policy.restore(snapshot)
    return policy


def _encoded(value: Any) -> Any:
    """Return what is written of a value that msgspec does not know."""
    if isinstance(value, IdQueue):
        return list(value)
    if isinstance(value, deque):
        return {"maxlen": value.maxlen, "items": list(value)}
    if isinstance(value, PolicySnapshot):
        return value.held
    raise TypeError(f"the core holds a {type(value).__name__}, which has no written form")


def _decoded(kind: Any, written: Any) -> Any:
    """Return a value of a kind that msgspec does not know."""
    if kind is IdQueue:
        return IdQueue(msgspec.convert(written, list[int]))
    if get_origin(kind) is deque:
        (item,) = get_args(kind)
        items: Any = msgspec.convert(
            written["items"],
            list[item],  # type: ignore[valid-type]
            str_keys=True,
            dec_hook=_decoded,
        )
        return deque(items, maxlen=msgspec.convert(written["maxlen"], int | None))
    if kind in POLICIES:
        return written  # `restore` has made one of it
    raise TypeError(f"no {kind} has a written form")


_ENCODER = msgspec.json.Encoder(enc_hook=_encoded)
