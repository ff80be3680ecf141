"""Who calls: the tenant of a gRPC call, and how long the caller means to wait."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TENANT_KEY = "lora-tenant"


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


def remaining_s(context: Any) -> float | None:
    """Return the seconds until the call's own deadline, None if it has none."""
    remaining = context.time_remaining()
    # gRPC gives calls without a deadline one some centuries away.
    return remaining if remaining is not None and remaining < 1e8 else None


def earliest(*deadlines_s: float | None) -> float | None:
    return min((deadline for deadline in deadlines_s if deadline is not None), default=None)
