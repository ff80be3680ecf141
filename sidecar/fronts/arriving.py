"""One connection's messages on their way in, and how much of them is here.

What is here is what the kernel has received on the connection less what has been handed over. The two are not counted
alike: what a client sends beside its messages (headers, acknowledgements) is estimated, and an error would add up for
as long as a stream is open. So a connection is forgiven `FORGIVEN_BYTES_S`, and starts anew when nothing is under way.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from time import monotonic

from sidecar.errors import Refused
from sidecar.fronts.received import Wire

SILENT_S, PROGRESS_BYTES = 1.0, 1 << 20
"""A connection is silent that has not brought as many bytes for as long, of what was being read."""
AHEAD_S, RATE_HALVES_S = 1.0, 0.1
"""A connection counts with what it brings in that time, as fast as it was of late: it may only be interrupted."""
HALF_BYTES = 1 << 20
"""What a connection must hold to have begun a message for certain: less may be what was wrongly counted."""
SMALL_BYTES = 256 << 10
"""What a connection's next message is taken for, at least."""
FORGIVEN_BYTES_S = 32 << 10
"""Less than what a client must bring a second not to be silent for `arrival_s`: who holds half a message is not."""
CALL_BYTES, FRAMING = 256, 1.003
"""What a call costs on the wire besides its message and metadata, and what framing and TLS add to a message."""


@dataclass(eq=False)
class Arrival:
    """One message on its way."""

    timeout: asyncio.Timeout
    since_s: float = field(default_factory=monotonic)
    closed: Refused | None = None
    turn: asyncio.Future[None] | None = None
    large_body_bytes: int = 0
    """What it was let in as, of the large bodies."""

    def close(self, why: Refused) -> None:
        """Break off the wait for it."""
        self.closed = why
        self.timeout.reschedule(asyncio.get_running_loop().time())


class Source:
    """A connection that messages come by, with its open calls. `arriving` are oldest first.

    One without a `wire` is no TCP connection: what it holds is what somebody else counts there.
    """

    def __init__(self, expected_bytes: int, wire: Wire | None = None) -> None:
        self.expected_bytes = expected_bytes
        """What its next message is taken for: as large as one may be from who has sent none, else by its last."""
        self.large_body_bytes = 0
        """Where it stands for a large HTTP body, the size of that."""
        self.wire = wire
        self.calls = 0
        self.arriving: dict[Arrival, None] = {}
        self.waiting = 0
        """How many of these are not read yet."""
        self.held = 0
        """Bytes that are here, of messages that are not."""
        self.charge = 0
        """The same, with what may come until the next look."""
        self.heard_s = 0.0
        self.base: int | None = None
        """Of the kernel's count: what had been received when nothing was under way, and what was handed over since."""
        self._handed_over = 0
        """The same, until the kernel has been asked for the first time."""
        self._mark = 0
        self._looked_s = 0.0
        self._rate = 0.0
        """Bytes a second, of late."""

    def begin(self, arrival: Arrival) -> None:
        """Note that one more message is under way."""
        if not self.arriving:
            self.heard_s = self._looked_s = arrival.since_s
        self.arriving[arrival] = None

    def hand_over(self, size_bytes: int, beside_bytes: int = 0) -> None:
        """Note that a message has come in full, and as many bytes of metadata with it."""
        self.expected_bytes = max(2 * size_bytes, SMALL_BYTES)
        cost = CALL_BYTES + beside_bytes + int(size_bytes * FRAMING)
        if self.base is None:
            self._handed_over += cost
        else:
            self.base += cost

    def settle(self, received: int | None, now_s: float, message_bytes: int) -> None:
        """Take what the kernel says has been received since the connection began; None when it knows nothing."""
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
        """Whether it holds what does not go on, and not because nobody reads it."""
        return self.held > HALF_BYTES and len(self.arriving) > self.waiting and now_s - self.heard_s >= silent_s


class Call:
    """One call, with the bytes of its message that are charged still although it has come."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.lingering = 0
