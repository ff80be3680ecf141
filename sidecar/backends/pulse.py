"""How a busy engine is told from one that hangs.

Pure: time is an argument, in seconds of a monotonic clock. A server can stay live and ready while its engine makes no
step any more, so it is judged by what it does: with something in flight, it hangs when for a while no response came
**and** its iteration counter stood still (or is not known).
"""

from __future__ import annotations


class Pulse:
    """When an engine last gave a sign of life; `seen_at_s` is when its server last answered a look."""

    def __init__(self, timeout_s: float, now_s: float) -> None:
        self._timeout_s = timeout_s
        self._iterations: int | None = None
        self._heard_at_s = self._moved_at_s = self.seen_at_s = now_s

    def begin(self, now_s: float) -> None:
        """Start anew with an engine that has just been reached."""
        self._iterations = None
        self._heard_at_s = self._moved_at_s = self.seen_at_s = now_s

    def seen(self, now_s: float) -> None:
        """The server answered a look."""
        self.seen_at_s = now_s

    def heard(self, now_s: float) -> None:
        """A response came, or silence only begins to count now."""
        self._heard_at_s = now_s

    def counted(self, iterations: int | None, now_s: float) -> bool:
        """Take in the iteration counter, None where it is not known; return whether it went back: a restart."""
        if iterations is None:
            return False
        before, self._iterations = self._iterations, iterations
        if iterations != before:
            self._moved_at_s = now_s
        return before is not None and iterations < before

    @property
    def is_counted(self) -> bool:
        """Whether the engine's steps are known, so that one that makes none is known to hang."""
        return self._iterations is not None

    def silent_s(self, now_s: float) -> float:
        """Return the seconds since the last sign of life."""
        return now_s - max(self._heard_at_s, self._moved_at_s)

    def is_still(self, now_s: float) -> bool:
        """Whether the engine has been silent for longer than it may be while something is in flight."""
        return self.silent_s(now_s) > self._timeout_s
