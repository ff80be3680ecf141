"""Decode a journal's records, which may be damaged or another's: what is decoded has its type in every field.

Errors name the part that does not fit, an event in the journal's own words.
"""

from __future__ import annotations

from collections.abc import Container
from functools import cache
from typing import Any, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError

from policies.views import BASE
from sidecar.config.plugins import policies_of
from sidecar.core.core import Core
from sidecar.core.events import Event
from sidecar.core.state import State
from sidecar.errors import Misused
from sidecar.journal import codec
from sidecar.journal.raised import describe
from sidecar.journal.written_names import WRITTEN

_STRICT = ConfigDict(strict=True, revalidate_instances="always", arbitrary_types_allowed=True)
_EVENTS = [WRITTEN[event].name for event in get_args(Event)]
AT_NS_MAX = 1 << 63


def event_of(written: Any) -> Event:
    """Return an event from its written form. Raises ValueError naming it, for anything else."""
    try:
        event: Event = codec.decode(written)
        _checker(Event).validate_python(event)
    except Exception as error:
        name = written.get("!") if isinstance(written, dict) else written
        raise ValueError(f"{name!r:.80}{' with other fields' if name in _EVENTS else ''}") from error
    return event


def is_time(at_ns: Any) -> bool:
    """Return True for a time of a step, in ns."""
    return isinstance(at_ns, int) and abs(at_ns) < AT_NS_MAX


def core_of(written: dict[str, Any], allowed: Container[str]) -> Core:
    """Return a core in a written state. Raises ValueError naming what does not fit, Misused for a policy.

    Of policies named as `package.module:Class`, only the `allowed` ones and those of installed plug-ins are imported.
    """
    try:
        core = codec.restore(written, policies_of(codec.decode(written["config"]), allowed))
        _checker(State | None).validate_python(core.state)
    except Misused:
        raise
    except ValidationError as error:
        raise ValueError(".".join(map(str, error.errors()[0]["loc"][1:]))) from error
    except Exception as error:
        raise ValueError(describe(error)) from error
    state = core.state
    named = {digest for name in state.names.values() for digest in (name.digest, *name.versions.values())}
    named |= {request.version for request in state.requests.values()}
    if lacking := named - {BASE, *state.versions}:
        raise ValueError(f"versions lacks {min(lacking)!r:.80}")
    return core


@cache
def _checker(form: Any) -> TypeAdapter[Any]:
    """Return what checks values; made when needed, for it takes a twentieth of a second."""
    return TypeAdapter(form, config=_STRICT)
