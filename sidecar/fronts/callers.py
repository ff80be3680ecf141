"""Who calls: the tenant of a gRPC call, how long the caller means to wait, and the id that it knows its request by."""

from __future__ import annotations

from collections.abc import Mapping
from secrets import token_hex
from typing import Any

from sidecar.config.identities import REQUEST_ID, checked, clipped, is_fit
from sidecar.errors import Reason, Refused

OWN_PREFIX = "lora-"
TENANT_KEY = "lora-tenant"

REQUEST_ID_KEY = "x-request-id"
"""Of gRPC metadata and HTTP headers, as proxies and clients everywhere write it."""


def metadata_of(context: Any) -> dict[str, str]:
    """Return the call's text metadata; of another's key that is given twice, the last.

    Raises Refused(INVALID_REQUEST) where a key of ours is given twice, for a proxy may have read the other one, and
    where its value is not ASCII: gRPC allows no other, and bytes that are not UTF-8 come here as other words.
    """
    found: dict[str, str] = {}
    for key, value in context.invocation_metadata() or ():
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
        found[key] = value
    return found


def tenant_of(context: Any, tenant_from: str, metadata: Mapping[str, str], asked: str) -> str:
    """Return the tenant: from the client's certificate, from what the client says, or nobody in particular.

    Where certificates decide, what the client says of itself is ignored. A certificate's name is its first subject
    alternative name, its common name if it has none. Raises Refused(INVALID_REQUEST) where the request and the
    metadata, which a proxy may have set, say different tenants.
    """
    if tenant_from == "none":
        return ""
    if tenant_from == "certificate":
        identities = context.peer_identities() or ()
        return next((name.decode(errors="replace") for name in identities), "")
    of_call = metadata.get(TENANT_KEY, "")
    if asked and of_call and asked != of_call:
        raise Refused(
            Reason.INVALID_REQUEST,
            f'the request says tenant "{clipped(asked)}" and the metadata {TENANT_KEY} "{clipped(of_call)}"; say it '
            "once",
        )
    return asked or of_call


def made_id() -> str:
    """Return an id for a request whose client gave none. It tells nothing of other requests, as a number would."""
    return token_hex(16)


def request_id_of(asked: str, metadata: Mapping[str, str]) -> str:
    """Return the id of a request: its own word, else the call's metadata's, which a proxy may have set, else a new one.

    Raises Refused(INVALID_REQUEST) for one that is not as it may be.
    """
    return checked(REQUEST_ID, asked or metadata.get(REQUEST_ID_KEY, "")) or made_id()


def id_of_call(context: Any, asked: str = "") -> str:
    """Return the id for an error of a call whose request is not read: what it says, its metadata's, or a new one."""
    given = [value for key, value in context.invocation_metadata() or () if key == REQUEST_ID_KEY]
    words = (asked, *(given if len(given) == 1 else ()))
    return next((said for said in words if said and is_fit(REQUEST_ID, said)), "") or made_id()


def remaining_s(context: Any) -> float | None:
    """Return the seconds until the call's own deadline, None if it has none."""
    remaining = context.time_remaining()
    # gRPC gives calls without a deadline one some centuries away.
    return remaining if remaining is not None and remaining < 1e8 else None


def earliest(*deadlines_s: float | None) -> float | None:
    return min((deadline for deadline in deadlines_s if deadline is not None), default=None)
