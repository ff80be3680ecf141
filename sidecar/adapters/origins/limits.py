"""The limits of a download, its clock and resolver, and the state of a download in progress."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from sidecar.adapters.origins.addresses import Resolve, resolve
from sidecar.adapters.origins.failures import Transient, too_large, unavailable
from sidecar.adapters.origins.origin import Origin

BACKOFF_FIRST_S = 0.5
BACKOFF_S_MAX = 15.0

Progress = Callable[[int, int | None], None]
"""Takes the bytes done and the total (None while unknown). An exception that it raises ends the download."""


@dataclass(frozen=True)
class Limits:
    """The limits of a download: sizes, attempts and times."""

    size_bytes_max: int = 4 << 30
    config_bytes_max: int = 1 << 20
    index_bytes_max: int = 4 << 20
    probe_bytes_max: int = 1 << 20
    shards_max: int = 64
    attempts_max: int = 5
    timeout_s: float = 30.0
    duration_s_max: float = 1800.0


@dataclass(frozen=True)
class Surroundings:
    """The clock, wait, randomness and resolver of a download; tests pass their own. `wait` may raise Stopped."""

    now_s: Callable[[], float] = time.monotonic
    wait: Callable[[float], None] = time.sleep
    random: Callable[[], float] = field(default_factory=lambda: random.SystemRandom().random)
    resolve: Resolve = resolve


class Errand:
    """The download of one origin: the bytes received so far, and the deadline."""

    def __init__(self, origin: Origin, limits: Limits, surroundings: Surroundings, progress: Progress) -> None:
        self.origin = origin
        self.limits = limits
        self.surroundings = surroundings
        self._progress = progress
        self._ends_s = surroundings.now_s() + limits.duration_s_max
        self.done_bytes = 0
        self.total_bytes: int | None = None

    def announce(self, what: str, size_bytes: int, bytes_max: int) -> None:
        """Check the size that the origin claims for a file, before any of it is read."""
        if size_bytes > bytes_max:
            raise too_large(what, size_bytes, bytes_max)

    def advance(self, count: int) -> None:
        """Count received bytes (negative: discarded ones). Raises Refused once the download has taken too long."""
        self.done_bytes += count
        self._progress(self.done_bytes, self.total_bytes)
        if self.surroundings.now_s() > self._ends_s:
            raise unavailable(self.origin, f"it took longer than {self.limits.duration_s_max:g} s")

    def pause(self, attempt: int, error: Transient) -> None:
        """Wait before the next attempt: exponential with jitter, and at least as long as the server asked (bounded)."""
        bound_s = min(BACKOFF_S_MAX, BACKOFF_FIRST_S * 2.0 ** (attempt - 1))
        wait_s = bound_s * (0.5 + self.surroundings.random() / 2)
        self.surroundings.wait(max(wait_s, min(error.retry_after_s, BACKOFF_S_MAX)))
        self.advance(0)
