"""Tell who calls, how long the caller will wait, and the id by which it knows its request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from secrets import token_hex
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from sidecar.access.certificates import names_of_grpc
from sidecar.access.principal import Head, Presented
from sidecar.config.identities import REQUEST_ID, checked, clipped, is_fit
from sidecar.errors import Reason, Refused

if TYPE_CHECKING:  # the process that reads large bodies starts with this module, and needs nothing of access
    from sidecar.access.access import Caller

OWN_PREFIX = "lora-"
TENANT_KEY = "lora-tenant"

REQUEST_ID_KEY = "x-request-id"
"""In gRPC metadata and in HTTP headers; the name that proxies and clients commonly use."""

TRACE_KEYS = ("traceparent", "tracestate")

AUTHORIZATION, FORWARDED = "authorization", "x-forwarded-client-cert"
LOCAL = ("unix:", "ipv4:127.", "ipv6:%5B::1%5D", "ipv6:[::1]")
"""How gRPC writes the addresses that only this machine has."""

Headers = Sequence[tuple[str, str | bytes]]

CHECKED_S = 1.0
"""How often the credential of a call that lasts is looked at."""
CALLER: ContextVar[Caller] = ContextVar("caller")
"""The sender of the gRPC call that this task answers; set before the call's first message is read."""

HEADERS: ContextVar[Headers] = ContextVar("headers")
"""The metadata of the gRPC call that this task answers, read once: gRPC makes it anew whenever it is asked."""

CALL_ID: ContextVar[str] = ContextVar("call_id")
"""The id that was made for the gRPC call that this task answers: all that is said of the call has the same one."""


def headers_of(context: Any) -> Headers:
    """Return the metadata of a gRPC call."""
    headers = HEADERS.get(None)
    return context.invocation_metadata() or () if headers is None else headers


def presented(context: Any, method: str) -> Presented:
    """Return what a gRPC call presents to prove who sends it."""
    found: dict[str, list[str]] = {AUTHORIZATION: [], FORWARDED: []}
    metadata = headers_of(context)
    for key, value in metadata:
        if key in found:
            found[key].append(value if isinstance(value, str) else value.decode(errors="replace"))
    peer = str(context.peer())
    return Presented(
        tuple(found[AUTHORIZATION]),
        names_of_grpc(context.auth_context()),
        tuple(found[FORWARDED]),
        peer_of_grpc(peer),
        peer.startswith(LOCAL),
        Head("POST", method, "HTTP/2", headers=metadata),
    )


def peer_of_grpc(peer: str) -> str:
    """Return a peer as `peer_at` does. gRPC writes ipv4:1.2.3.4:56, ipv6:%5B::1%5D:56 and unix:PATH."""
    scheme, _, rest = peer.partition(":")
    if scheme not in ("ipv4", "ipv6"):
        return scheme
    host, _, port = unquote(rest).rpartition(":")
    return peer_at(host.strip("[]"), port)


def peer_at(host: str, port: int | str) -> str:
    """Return ip:port, with an IPv6 address in brackets. An IPv4 address that came by a socket of IPv6 is one."""
    mapped = host.removeprefix("::ffff:")
    host = mapped if "." in mapped else host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def metadata_of(context: Any) -> dict[str, str]:
    """Return the call's text metadata. Of a foreign key that is given twice, the last value counts, or what W3C says.

    Raises Refused(INVALID_REQUEST) if one of our own keys is given twice, since a proxy may have read the other value,
    or if its value is not ASCII: gRPC allows nothing else, and other bytes arrive here changed.
    """
    found: dict[str, str] = {}
    for key, value in headers_of(context):
        if not isinstance(value, str):
            continue
        if key.startswith(OWN_PREFIX) or key == REQUEST_ID_KEY:
            if key in found:
                raise Refused(Reason.INVALID_REQUEST, f'the metadata "{clipped(key)}" is given twice; say it once')
            if not value.isascii():
                raise Refused(
                    Reason.INVALID_REQUEST,
                    f'the metadata "{clipped(key)}" is not ASCII ("{clipped(value)}"), which is all that gRPC takes '
                    "there; say it in the request",
                )
        found[key] = combined(key, found[key], value) if key in TRACE_KEYS and key in found else value
    return found


def combined(key: str, before: str, value: str) -> str:
    """Return a header of W3C's trace context that comes again: the states are one list, and two parents are none."""
    return f"{before},{value}" if key == "tracestate" else ""


def claimed_tenants(metadata: Mapping[str, str], asked: str) -> tuple[str, ...]:
    """Return the tenants that a request and its call's metadata, which a proxy may have set, say it is of."""
    return tuple(dict.fromkeys(claim for claim in (asked, metadata.get(TENANT_KEY, "")) if claim))


def made_id() -> str:
    """Return a new random id for a request without one. A counter would disclose how many requests others make."""
    return token_hex(16)


def request_id_of(asked: str, metadata: Mapping[str, str]) -> str:
    """Return the id of a request: its own, else the one of the call's metadata, else a new one.

    Raises Refused(INVALID_REQUEST) for an id that `REQUEST_ID` does not allow.
    """
    return checked(REQUEST_ID, asked or metadata.get(REQUEST_ID_KEY, "")) or made_id()


def id_of_call(context: Any, asked: str = "") -> str:
    """Return the id to report with an error of a request that is not read: `asked`, the metadata's, or the call's."""
    given = [value for key, value in headers_of(context) if key == REQUEST_ID_KEY]
    candidates = (asked, *(given if len(given) == 1 else ()))
    return next((id_ for id_ in candidates if id_ and is_fit(REQUEST_ID, id_)), "") or CALL_ID.get("") or made_id()


def remaining_s(context: Any) -> float | None:
    """Return the seconds until the call's own deadline, None if it has none."""
    remaining = context.time_remaining()
    # gRPC reports a deadline centuries away for calls without one.
    return remaining if remaining is not None and remaining < 1e8 else None


def earliest(*deadlines_s: float | None) -> float | None:
    """Return the earliest of several deadlines; None if there is none."""
    return min((deadline for deadline in deadlines_s if deadline is not None), default=None)
