"""Tell a busy engine from one that hangs.

Pure: time is an argument, in seconds of a monotonic clock. A server can stay live and ready while its engine makes no
steps, so an engine is judged by what it does. It hangs if something is in flight and for some time no response came
**and** its counters of iterations and tokens, if known, stood still.
"""

from __future__ import annotations

from collections import deque

RATE_S = 5.0
"""The rate of tokens is a mean over this time."""


class Pulse:
    """An engine's last sign of life. `seen_at_s` is when its server last answered a look."""

    def __init__(self, timeout_s: float, now_s: float) -> None:
        self._timeout_s = timeout_s
        self._iterations: int | None = None
        self._generated: deque[tuple[float, int]] = deque()
        """The readings of the counter of tokens in the last seconds, with their times."""
        self._heard_at_s = self._moved_at_s = self.seen_at_s = now_s

    def begin(self, now_s: float) -> None:
        """Start anew for an engine that has just been reached."""
        self._iterations = None
        self._generated.clear()
        self._heard_at_s = self._moved_at_s = self.seen_at_s = now_s

    def seen(self, now_s: float) -> None:
        """Note that the server answered a look."""
        self.seen_at_s = now_s

    def heard(self, now_s: float) -> None:
        """Note a response, or that silence begins to count only now."""
        self._heard_at_s = now_s

    def counted(self, iterations: int | None, now_s: float) -> bool:
        """Note the iteration counter, None if unknown; return True if it went back, which means a restart."""
        if iterations is None:
            return False
        before, self._iterations = self._iterations, iterations
        if iterations != before:
            self._moved_at_s = now_s
        return before is not None and iterations < before

    def generated(self, tokens: int | None, now_s: float) -> None:
        """Note the counter of the tokens that the engine has generated, None if unknown."""
        if tokens is None:
            return
        before = self._generated[-1][1] if self._generated else tokens
        if tokens != before:
            self._moved_at_s = now_s
        if tokens < before:
            self._generated.clear()
        self._generated.append((now_s, tokens))
        self._forget(now_s)

    def tokens_per_s(self, now_s: float) -> float | None:
        """Return the engine's own rate of tokens over the last seconds; None if it was not read twice in them."""
        self._forget(now_s)
        if len(self._generated) < 2:
            return None
        (first_s, first), (last_s, last) = self._generated[0], self._generated[-1]
        return (last - first) / (last_s - first_s)

    def _forget(self, now_s: float) -> None:
        while self._generated and self._generated[0][0] < now_s - RATE_S:
            self._generated.popleft()

    @property
    def is_counted(self) -> bool:
        """True if the engine's steps are known."""
        return self._iterations is not None

    def silent_s(self, now_s: float) -> float:
        """Return the seconds since the last sign of life."""
        return now_s - max(self._heard_at_s, self._moved_at_s)

    def is_still(self, now_s: float) -> bool:
        """Return True if the engine has been silent for longer than it may be with something in flight."""
        return self.silent_s(now_s) > self._timeout_s
