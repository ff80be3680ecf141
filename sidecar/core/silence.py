"""For how long an engine that has something to say has said nothing, and what is thought of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Silence:
    """One backend's. `since_ns` is when it was last heard of, or when silence began to count."""

    since_ns: int = 0
    due_ns: int = 0
    """When it is looked at next; 0 while nothing is in flight."""
    suspected: bool = False
    """It has been silent for too long: nothing new is sent to it."""
    found: str = ""
    """What a probe found that says the same."""
    excused: int = 0
    """So many probes it has answered since it was last heard of by itself: each doubles how long it may be silent."""
