"""How long an engine has been silent while it should report something, and what follows from that."""

from __future__ import annotations

from dataclasses import dataclass, field

from sidecar.model.quote import Quote

READ_LEAST, READ_KEPT = 5, 25
"""An engine has read so many prompts before it is judged by the next; the last 25 to 50 count."""


@dataclass(slots=True)
class Reading:
    """The slowest that an engine without a calibrated pace has read prompts of late, in ns a token."""

    slowest_ns: float = 0.0
    before_ns: float = 0.0
    read: int = 0

    @property
    def known(self) -> bool:
        return self.read >= READ_LEAST

    def token_ns(self, guess_ns: float) -> float:
        """Return the time to read a token, or the guess if that is longer."""
        return max(self.slowest_ns, self.before_ns, guess_ns)

    def has_read(self, took_ns: float) -> None:
        """Note what each token of the prompts took that an engine has read."""
        self.read += 1
        if self.read % READ_KEPT == 0:
            self.before_ns, self.slowest_ns = self.slowest_ns, 0.0
        self.slowest_ns = max(self.slowest_ns, took_ns)


@dataclass(slots=True)
class Silence:
    """The silence of one backend. `since_ns` is when it was last heard of, or when silence began to count."""

    since_ns: int = 0
    due_ns: int = 0
    """When it is checked next; 0 while nothing is in flight."""
    suspected: bool = False
    """It has been silent for too long, so nothing new is sent to it."""
    found: Quote = ""
    """What a probe found that confirms the suspicion."""
    excused: int = 0
    """Probes answered since it last reported by itself; each doubles the time that it may be silent."""
    reading: Reading = field(default_factory=Reading)
