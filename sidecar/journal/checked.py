"""Decode a journal's records, which may be damaged or another's.

Errors name the part that does not fit, an event in the journal's own words.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from policies.views import BASE
from sidecar.config.plugins import policies_of
from sidecar.core.core import Core
from sidecar.core.events import Event
from sidecar.errors import Misused
from sidecar.journal import codec
from sidecar.journal.raised import describe

AT_NS_MAX = 1 << 63


def event_of(written: Any) -> Event:
    """Return an event from its written form. Raises ValueError naming it, for anything else."""
    try:
        return codec.event_of(written)
    except Exception as error:
        name = written.get("!") if isinstance(written, dict) else written
        known = isinstance(name, str) and name in codec.EVENTS
        raise ValueError(f"{name!r:.80}{' with other fields' if known else ''}") from error


def is_time(at_ns: Any) -> bool:
    """Return True for a time of a step, in ns."""
    return isinstance(at_ns, int) and abs(at_ns) < AT_NS_MAX


def core_of(written: dict[str, Any], large: Mapping[str, Sequence[Any]], allowed: Container[str]) -> Core:
    """Return a core in a written state, whose `large` fields are lists of items.

    Raises ValueError naming what does not fit, Misused for a policy. Of policies named as `package.module:Class`, only
    the `allowed` ones and those of installed plug-ins are imported.
    """
    try:
        fields = {name: dict(items) for name, items in large.items()}
        core = codec.restore(written | fields, policies_of(codec.config_of(written["config"]), allowed))
    except Misused:
        raise
    except Exception as error:
        raise ValueError(describe(error)) from error
    state = core.state
    named = {digest for name in state.names.values() for digest in (name.digest, *name.versions.values())}
    named |= {request.version for request in state.requests.values()}
    if lacking := named - {BASE, *state.versions}:
        raise ValueError(f"versions lacks {min(lacking)!r:.80}")
    return core
