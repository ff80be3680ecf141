"""Read the headers of a request: who sends it, by when it must be answered, and how it is called."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from time import monotonic_ns

from sidecar.config import identities
from sidecar.config.identities import checked, clipped, is_fit, session_of
from sidecar.errors import Reason, Refused
from sidecar.fronts.callers import REQUEST_ID_KEY, TRACE_KEYS, combined, made_id
from sidecar.fronts.kserve.parameters import seconds_until
from sidecar.shell.requests import RequestFacts, TraceOrigin

HEADERS = {
    "x-lora-tenant": identities.TENANT,
    "x-lora-class": identities.CLASS,
    "x-lora-deadline-ms": identities.DEADLINE,
    "x-lora-session": identities.SESSION,
}
"""The shape that each value must have."""
REQUEST_ID_HEADER = REQUEST_ID_KEY.encode()
ONCE = frozenset((*(name.encode() for name in HEADERS), REQUEST_ID_HEADER, b"authorization"))
"""Headers that say who asks. If one were given twice, a proxy could read the other value."""


def read_headers(headers: Iterable[tuple[bytes, bytes]]) -> RequestFacts:
    """Return what our headers say of a request; its tenant is the client's own claim, and no adapter is named yet.

    Raises Refused(INVALID_REQUEST) for a header that is unknown or given twice.
    """
    own: dict[str, str] = {}
    trace: dict[str, str] = {}
    once: set[bytes] = set()
    for raw_name, raw in headers:
        if raw_name in once:
            raise Refused(Reason.INVALID_REQUEST, f"the header {raw_name.decode()} is given twice; send it once")
        if raw_name in ONCE:
            once.add(raw_name)
        if (key := raw_name.decode("latin-1")) in TRACE_KEYS:
            value = raw.decode("latin-1")
            trace[key] = combined(key, trace[key], value) if key in trace else value
        if raw_name[:6] == b"x-lora":
            name = raw_name.decode("latin-1")
            if name not in HEADERS:
                raise _unknown(name)
            own[name] = checked(HEADERS[name], raw.decode(errors="replace"), f"the header {name}")
    return RequestFacts(
        adapter="",
        tenant=own.get("x-lora-tenant", ""),
        klass=own.get("x-lora-class") or "default",
        session=session_of(own.get("x-lora-session", "")),
        deadline_s=seconds_until(own.get("x-lora-deadline-ms")),
        trace=TraceOrigin(trace.get("traceparent", ""), trace.get("tracestate", ""), monotonic_ns()),
    )


def check_request_id(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Raise Refused(INVALID_REQUEST) for a malformed request id."""
    checked(identities.REQUEST_ID, _own_id(headers), f"the header {REQUEST_ID_KEY}")


def request_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Return the id by which a client finds its request: its own if it is well-formed, else a new one."""
    own = _own_id(headers)
    return own if own and is_fit(identities.REQUEST_ID, own) else made_id()


def _own_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Return the request's own id; "" if it has none, or several, which `read_headers` refuses."""
    given = [value for name, value in headers if name == REQUEST_ID_HEADER]
    return given[0].decode(errors="replace") if len(given) == 1 else ""


def _unknown(name: str) -> Refused:
    near = difflib.get_close_matches(name[:80], HEADERS, n=1, cutoff=0.85)
    hint = f'did you mean "{near[0]}"?' if near else f'there are {", ".join(HEADERS)}; an adapter is named by "model"'
    return Refused(Reason.INVALID_REQUEST, f'unknown header "{clipped(name)}"; {hint}')
