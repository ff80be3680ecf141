"""Count the bytes of incomplete messages that each connection has brought.

A connection holds the bytes that the kernel has received on it, less the messages that have been handed over. The two
are not counted alike: what a client sends besides its messages (headers, acknowledgements) is estimated, and the error
would add up for as long as a stream is open. So each connection is forgiven `FORGIVEN_BYTES_S`, and its count restarts
when no message is under way.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from time import monotonic

from sidecar.errors import Refused
from sidecar.fronts.received import Wire

SILENT_S, PROGRESS_BYTES = 1.0, 1 << 20
"""A connection is silent if it holds part of a message and has brought fewer than these bytes in that time."""
AHEAD_S, RATE_HALVES_S = 1.0, 0.1
"""A connection is also charged with what it would bring in `AHEAD_S` at its recent rate: it may only be paused."""
HALF_BYTES = 1 << 20
"""A connection that holds more has certainly begun a message; less may be an error of the estimate."""
SMALL_BYTES = 256 << 10
"""The least that the next message of a connection is expected to have."""
FORGIVEN_BYTES_S = 32 << 10
"""Less than the rate that counts as progress within `arrival_s`, so that half a message is never forgiven."""
CALL_BYTES, FRAMING = 256, 1.003
"""What a call costs on the wire besides its message and metadata, and what framing and TLS add to a message."""


@dataclass(eq=False)
class Arrival:
    """One message on its way."""

    timeout: asyncio.Timeout
    since_s: float = field(default_factory=monotonic)
    closed: Refused | None = None
    admitted: asyncio.Future[None] | None = None
    large_body_bytes: int = 0
    """Its share of the budget for large bodies."""

    def close(self, why: Refused) -> None:
        """Break off the wait for the message with `why`."""
        self.closed = why
        self.timeout.reschedule(asyncio.get_running_loop().time())


class Source:
    """A connection that brings messages, with its open calls. `arriving` has the oldest first.

    A source without a `wire` is no TCP connection: `Intake.charge` counts its bytes.
    """

    def __init__(self, expected_bytes: int, wire: Wire | None = None) -> None:
        self.expected_bytes = expected_bytes
        """Size of the next message: the largest allowed at first, later a guess by the last one."""
        self.large_body_bytes = 0
        """Size of the large HTTP body that this source stands for, 0 for others."""
        self.wire = wire
        self.calls = 0
        self.arriving: dict[Arrival, None] = {}
        self.waiting = 0
        """How many of `arriving` are not being read yet."""
        self.held = 0
        """Bytes received of incomplete messages."""
        self.charge = 0
        """`held`, and what may come until the next look."""
        self.heard_s = 0.0
        self.base: int | None = None
        """In the kernel's count: received when nothing was under way, plus all that was handed over since."""
        self._handed_over = 0
        """Bytes handed over before the kernel was first asked."""
        self._mark = 0
        self._looked_s = 0.0
        self._rate = 0.0
        """Recent rate in bytes a second."""

    def begin(self, arrival: Arrival) -> None:
        """Note that one more message is under way."""
        if not self.arriving:
            self.heard_s = self._looked_s = arrival.since_s
        self.arriving[arrival] = None

    def hand_over(self, size_bytes: int, beside_bytes: int = 0) -> None:
        """Note that a message of this size has come in full, with `beside_bytes` of metadata."""
        self.expected_bytes = max(2 * size_bytes, SMALL_BYTES)
        cost = CALL_BYTES + beside_bytes + int(size_bytes * FRAMING)
        if self.base is None:
            self._handed_over += cost
        else:
            self.base += cost

    def settle(self, received: int | None, now_s: float, message_bytes: int) -> None:
        """Update the count from what the kernel has received since the connection began; None if it does not know."""
        before_bytes, elapsed_s, self._looked_s = self.held, max(now_s - self._looked_s, 1e-3), now_s
        if received is None:
            self.held = self.charge = 0
            return
        if received - self._mark >= PROGRESS_BYTES:
            self._mark, self.heard_s = received, now_s
        if self.base is None:
            self.base = self._handed_over
        else:
            self.base += int(elapsed_s * FORGIVEN_BYTES_S)
        self.base = min(self.base, received) if self.arriving else received
        self.held = received - self.base
        rate = max(self.held - before_bytes, 0) / elapsed_s
        self._rate = max(rate, self._rate * 0.5 ** (elapsed_s / RATE_HALVES_S))
        charge = min(self.held + int(self._rate * AHEAD_S), len(self.arriving) * message_bytes)
        self.charge = charge if charge > HALF_BYTES else 0

    def is_silent(self, now_s: float, silent_s: float = SILENT_S) -> bool:
        """Return True if the connection holds part of a message that makes no progress although it is being read."""
        return self.held > HALF_BYTES and len(self.arriving) > self.waiting and now_s - self.heard_s >= silent_s


class Call:
    """One call, and the bytes of its message that stay charged after it has come."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.lingering = 0
