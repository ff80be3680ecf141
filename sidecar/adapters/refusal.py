"""Why an adapter is turned away: its files cannot be read, are not what they claim, or say too much."""

from __future__ import annotations

from sidecar.adapters.names import shown
from sidecar.errors import Invalid, Reason


def malformed(adapter: str, message: str) -> Invalid:
    """The files are damaged, lie, or contradict each other."""
    return _invalid(Reason.ADAPTER_MALFORMED, adapter, message)


def unsupported(adapter: str, message: str) -> Invalid:
    """The files are sound, but an engine given packed rows would not compute what they mean."""
    return _invalid(Reason.ADAPTER_UNSUPPORTED, adapter, message)


def unreadable(adapter: str, message: str) -> Invalid:
    """The files are not there, or may not be read."""
    return _invalid(Reason.ORIGIN_UNREADABLE, adapter, message)


def _invalid(reason: Reason, adapter: str, message: str) -> Invalid:
    return Invalid(reason, f"adapter {shown(adapter)}: {message}", adapter=adapter)
