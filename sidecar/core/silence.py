"""How long an engine has been silent while it should report something, and what follows from that."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Silence:
    """The silence of one backend. `since_ns` is when it was last heard of, or when silence began to count."""

    since_ns: int = 0
    due_ns: int = 0
    """When it is checked next; 0 while nothing is in flight."""
    suspected: bool = False
    """It has been silent for too long, so nothing new is sent to it."""
    found: str = ""
    """What a probe found that confirms the suspicion."""
    excused: int = 0
    """Probes answered since it last reported by itself; each doubles the time that it may be silent."""
