"""Who calls: the tenant of a gRPC call, how long the caller means to wait, and the id that it knows its request by."""

from __future__ import annotations

from collections.abc import Mapping
from secrets import token_hex
from typing import Any

from sidecar.identities import REQUEST_ID, checked, is_fit

TENANT_KEY = "lora-tenant"

REQUEST_ID_KEY = "x-request-id"
"""Of gRPC metadata and HTTP headers, as proxies and clients everywhere write it."""


def metadata_of(context: Any) -> dict[str, str]:
    """Return the call's text metadata; of a key that is given twice, the last."""
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


def tenant_of(context: Any, tenant_from: str, metadata: Mapping[str, str], asked: str) -> str:
    """Return the tenant: from the client's certificate, from what the client says, or nobody in particular.

    Where certificates decide, what the client says of itself is ignored. A certificate's name is its first subject
    alternative name, its common name if it has none.
    """
    if tenant_from == "none":
        return ""
    if tenant_from == "certificate":
        identities = context.peer_identities() or ()
        return next((name.decode(errors="replace") for name in identities), "")
    return asked or metadata.get(TENANT_KEY, "")


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
    words = (asked, metadata_of(context).get(REQUEST_ID_KEY, ""))
    return next((said for said in words if said and is_fit(REQUEST_ID, said)), "") or made_id()


def remaining_s(context: Any) -> float | None:
    """Return the seconds until the call's own deadline, None if it has none."""
    remaining = context.time_remaining()
    # gRPC gives calls without a deadline one some centuries away.
    return remaining if remaining is not None and remaining < 1e8 else None


def earliest(*deadlines_s: float | None) -> float | None:
    return min((deadline for deadline in deadlines_s if deadline is not None), default=None)
