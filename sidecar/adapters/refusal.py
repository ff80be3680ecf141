"""The errors that refuse an adapter: its files are unreadable, malformed, or unsupported."""

from __future__ import annotations

from sidecar.adapters.names import shown
from sidecar.errors import Invalid, Reason


def malformed(adapter: str, message: str) -> Invalid:
    """Return the error for files that are damaged, false, or contradict each other."""
    return _invalid(Reason.ADAPTER_MALFORMED, adapter, message)


def unsupported(adapter: str, message: str) -> Invalid:
    """Return the error for sound files whose effect packed rows cannot express."""
    return _invalid(Reason.ADAPTER_UNSUPPORTED, adapter, message)


def unreadable(adapter: str, message: str) -> Invalid:
    """Return the error for files that are missing or may not be read."""
    return _invalid(Reason.ORIGIN_UNREADABLE, adapter, message)


def _invalid(reason: Reason, adapter: str, message: str) -> Invalid:
    return Invalid(reason, f"adapter {shown(adapter)}: {message}", adapter=adapter)
