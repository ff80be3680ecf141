"""What is on its way in: messages that have not come in full, over all listeners, inside one budget of bytes.

How much of a message has come gRPC does not say, but the kernel does, by connection (`Received`): what it has received
less what it has handed over. That is looked at every `LOOK_S`. A message whose call has just begun is taken for as
large as messages may be, or as its connection's last one suggests. Only as many are read at a time as fit the budget
so; the others wait, each connection in its turn. What has been looked at counts as what is here and what comes in a
second as fast as it came: who sends a byte a second keeps nobody from sending.

Streams' messages are read at once, since nobody knows when the next one comes. So between two looks streams can bring
more than the budget has, as much as the network carries meanwhile.

When the budget is short, the connection that has been silent, else the one that holds most, loses its oldest messages.
A stream of which nothing is here costs nothing and is left alone. Which message of a connection the bytes belong to
nobody knows, so those behind one proxy share its fate.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any

from sidecar.errors import Reason, Refused
from sidecar.fronts.received import Received, Wire

LOOK_S = 0.02
LOOKING_MAX = 0.05
"""The share of the time that may go into looking: with many connections the looks are further apart."""
SILENT_S, PROGRESS_BYTES = 1.0, 64 << 10
"""A connection is silent that has not brought as many bytes for as long."""
NEW_S = 0.1
"""For how long a message that is read counts as large as it may be: its client may be slow to begin."""
AHEAD_S, RATE_HALVES_S = 1.0, 0.1
"""A connection counts with what it brings in that time, as fast as it was of late: it may only be interrupted."""
HALF_BYTES = 1 << 20
"""What a connection must hold to have begun a message for certain: less may be what was wrongly counted."""
LARGE_BYTES, LINGER_S, LINGER_LOOKS = 8 << 20, 1.0, 5
"""A message from that size on is charged twice, as it came and parsed, until its call is over; at most for so long, and
so many looks: the event loop may have been busy with it."""
SMALL_BYTES = 1 << 20
"""What a connection's next message is taken for, at least."""
CALL_BYTES, FRAMING = 64, 1.003
"""What a call costs on the wire besides its message, and what framing and TLS add: short of the truth for all but the
smallest messages, or a long-lived connection would seem to hold ever more."""
RETRY_S = 1.0


@dataclass(frozen=True)
class IntakeLimits:
    """`message_bytes` bounds one message: no connection can hold more than that for each that it has under way."""

    bytes_max: int = 256 << 20
    arrival_s: float = 30.0
    message_bytes: int = 64 << 20

    @property
    def read_bytes_max(self) -> int:
        """What may be read at a time: the rest is for the copies that handing over, parsing and writing make of one."""
        return max(self.bytes_max - 2 * self.message_bytes, 0)


class Arrival:
    """One message on its way."""

    def __init__(self, timeout: asyncio.Timeout) -> None:
        self.closed: Refused | None = None
        self.turn: asyncio.Future[None] | None = None
        self._timeout = timeout

    def close(self, why: Refused) -> None:
        """Break off the wait for it."""
        self.closed = why
        self._timeout.reschedule(asyncio.get_running_loop().time())


class Source:
    """A connection that messages come by, with its open calls. `arriving` are oldest first."""

    def __init__(self, expected_bytes: int, wire: Wire | None = None) -> None:
        self.expected_bytes = expected_bytes
        """What its next message is taken for: as large as one may be from who has sent none, else by its last."""
        self.wire = wire
        self.calls = 0
        self.arriving: dict[Arrival, None] = {}
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

    def hand_over(self, size_bytes: int) -> None:
        """Note that a message has come in full."""
        self.expected_bytes = max(2 * size_bytes, SMALL_BYTES)
        cost = CALL_BYTES + int(size_bytes * FRAMING)
        if self.base is None:
            self._handed_over += cost
        else:
            self.base += cost

    def settle(self, received: int | None, now_s: float, message_bytes: int) -> None:
        """Take what the kernel says has been received since the connection began; None when it knows nothing."""
        before_bytes, before_s, self._looked_s = self.held, self._looked_s, now_s
        if received is None:
            self.held = self.charge = 0
            return
        if received - self._mark >= PROGRESS_BYTES:
            self._mark, self.heard_s = received, now_s
        base = self._handed_over if self.base is None else self.base
        self.base = min(base, received) if self.arriving else received
        self.held = received - self.base
        elapsed_s = max(now_s - before_s, 1e-3)
        rate = max(self.held - before_bytes, 0) / elapsed_s
        self._rate = max(rate, self._rate * 0.5 ** (elapsed_s / RATE_HALVES_S))
        charge = min(self.held + int(self._rate * AHEAD_S), len(self.arriving) * message_bytes)
        self.charge = charge if charge > HALF_BYTES else 0

    def is_silent(self, now_s: float, silent_s: float = SILENT_S) -> bool:
        return self.held > HALF_BYTES and now_s - self.heard_s >= silent_s


class Call:
    """One call, with the bytes of its message that are charged still although it has come."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.lingering = 0


class Intake:
    """The budget of one process. It belongs to the event loop."""

    def __init__(self, limits: IntakeLimits | None = None, received: Received | None = None) -> None:
        self.limits = limits or IntakeLimits()
        self.closed = 0
        """Messages that were given up because the budget was short."""
        self.late = 0
        """Messages that took too long."""
        self._received = received or Received()
        self._sources: dict[Wire, Source] = {}
        self._bodies: dict[Source, None] = {}
        self._new: dict[Arrival, tuple[float, int]] = {}
        """Those that may not have been seen yet, since when they are read, and the bytes that they are taken for."""
        self._expected = 0
        """The sum of these bytes."""
        self._charged = 0
        """What all connections are charged with."""
        self._lingering: deque[tuple[float, int, Call, int]] = deque()
        """Large messages that have come: until when and which look they are charged, and with what."""
        self._looks = 0
        self._waiting: dict[Source, deque[Arrival]] = {}
        self._looking: asyncio.TimerHandle | None = None

    @property
    def held_bytes(self) -> int:
        """What was under way at the last look."""
        return sum(source.held for source in self._busy())

    @contextmanager
    def call(self, wire: Wire | None) -> Iterator[Call]:
        """Go round one call on a connection. One that is no TCP has only this."""
        source = Source(self.limits.message_bytes) if wire is None else self._sources.get(wire)
        if source is None:
            assert wire is not None
            source = self._sources[wire] = Source(self.limits.message_bytes, wire)
            self._look_soon()
        source.calls += 1
        call = Call(source)
        try:
            yield call
        finally:
            source.calls -= 1
            self._release(call, call.lingering)

    async def one(self, call: Call, read: Callable[[], Awaitable[Any]]) -> Any:
        """Return what `read` does, the one message of a call, after its turn has come.

        Raises Refused when it takes too long, or what is here is too much. `call.source.hand_over` is to be called
        with its size.
        """
        async with self._timed(self.limits.arrival_s) as arrival:
            try:
                await self._turn(call.source, arrival)
                with self._arriving(call.source, arrival):
                    return self._linger(call, await read())
            finally:
                self._is_known(arrival)
                self._admit()

    async def next_of(self, call: Call, read: Callable[[], Awaitable[Any]]) -> Any:
        """Return what `read` does, the next of a stream's messages, as `one` but without end and turn."""
        async with self._timed(None) as arrival:
            with self._arriving(call.source, arrival):
                return self._linger(call, await read())

    @asynccontextmanager
    async def body(self) -> AsyncIterator[Callable[[int], None]]:
        """Go round the arrival of one body, whose bytes are counted by what is given. Raises Refused as `one`."""
        source = Source(0)
        self._bodies[source] = None

        def count(size_bytes: int) -> None:
            source.held += size_bytes
            source.charge += size_bytes
            source.heard_s = monotonic()
            self._charged += size_bytes
            self._make_room()

        try:
            async with self._timed(self.limits.arrival_s) as arrival:
                with self._arriving(source, arrival):
                    yield count
        finally:
            del self._bodies[source]

    @asynccontextmanager
    async def _timed(self, arrival_s: float | None) -> AsyncIterator[Arrival]:
        try:
            async with asyncio.timeout(arrival_s) as timeout:
                arrival = Arrival(timeout)
                yield arrival
        except TimeoutError:
            if not timeout.expired():
                raise
            raise arrival.closed or self._too_late() from None

    @contextmanager
    def _arriving(self, source: Source, arrival: Arrival) -> Iterator[None]:
        if not source.arriving:
            source.heard_s = monotonic()
        source.arriving[arrival] = None
        self._look_soon()
        try:
            yield
        finally:
            source.arriving.pop(arrival, None)
            if not source.arriving:
                self._settle(source)

    def _linger(self, call: Call, message: Any) -> Any:
        """Go on charging a large message for a while: it is copied, parsed, perhaps refused, which is no instant."""
        size_bytes = len(message) if isinstance(message, bytes) else 0
        if size_bytes >= LARGE_BYTES:
            call.lingering += 2 * size_bytes
            self._charged += 2 * size_bytes
            self._lingering.append((monotonic() + LINGER_S, self._looks + LINGER_LOOKS, call, 2 * size_bytes))
            self._look_soon()
            _trim()
        return message

    def _release(self, call: Call, size_bytes: int) -> None:
        released = min(size_bytes, call.lingering)
        call.lingering -= released
        self._charged -= released
        if released:
            _trim()
        self._admit()

    async def _turn(self, source: Source, arrival: Arrival) -> None:
        """Wait until one more may be read; connections take turns."""
        if source not in self._waiting and self._fits(source):
            self._read(source, arrival)
            return
        arrival.turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(source, deque()).append(arrival)
        self._look_soon()
        try:
            await arrival.turn
        finally:
            line = self._waiting.get(source)
            if line is not None and arrival in line:
                line.remove(arrival)
                if not line:
                    del self._waiting[source]

    def _admit(self) -> None:
        """Let those read whose turn it is and who fit."""
        for source in list(self._waiting):
            if not self._fits(source):
                continue
            line = self._waiting.pop(source)
            arrival = line.popleft()
            if line:
                self._waiting[source] = line
            assert arrival.turn is not None
            if not arrival.turn.done():  # else its client has left, or it came too late
                self._read(source, arrival)
                arrival.turn.set_result(None)

    def _read(self, source: Source, arrival: Arrival) -> None:
        self._new[arrival] = monotonic(), source.expected_bytes
        self._expected += source.expected_bytes

    def _is_known(self, arrival: Arrival) -> None:
        self._expected -= self._new.pop(arrival, (0.0, 0))[1]

    def _fits(self, source: Source) -> bool:
        """Whether one more may be read of a connection. One may when there is nothing else."""
        charged = self._charged + self._expected
        return charged == 0 or charged + source.expected_bytes <= self.limits.read_bytes_max

    def _busy(self) -> list[Source]:
        return [source for source in (*self._sources.values(), *self._bodies) if source.arriving]

    def _settle(self, source: Source) -> None:
        """Look at one connection."""
        before = source.charge
        received = None if source.wire is None else self._received.bytes_of(source.wire)
        source.settle(received, monotonic(), self.limits.message_bytes)
        self._charged += source.charge - before

    def _look_soon(self, after_s: float = LOOK_S) -> None:
        if self._looking is None:
            self._looking = asyncio.get_running_loop().call_later(after_s, self._look)

    def _look(self) -> None:
        self._looking = None
        began_s = monotonic()
        if any(source.base is None for source in self._sources.values()):
            self._find()
        for source in self._sources.values():
            if source.arriving:
                self._settle(source)
        for arrival in [arrival for arrival, (since_s, _) in self._new.items() if began_s - since_s >= NEW_S]:
            self._is_known(arrival)
        self._looks += 1
        while self._lingering and self._lingering[0][0] <= began_s and self._lingering[0][1] <= self._looks:
            self._release(*self._lingering.popleft()[2:])
        self._close_half()
        self._make_room()
        self._admit()
        if self._waiting or self._lingering or any(source.arriving for source in self._sources.values()):
            self._look_soon(max(LOOK_S, (monotonic() - began_s) / LOOKING_MAX))

    def _find(self) -> None:
        """Find the connections that are new, and forget those that have gone."""
        self._received.find()
        for wire, source in list(self._sources.items()):
            self._settle(source)
            if not source.calls and self._received.bytes_of(wire) is None:
                del self._sources[wire]

    def _close_half(self) -> None:
        """Close on messages that have begun and do not go on: streams' have no other end."""
        now_s = monotonic()
        for source in self._sources.values():
            if source.is_silent(now_s, self.limits.arrival_s):
                for arrival in list(source.arriving):
                    arrival.close(self._too_late())
                source.arriving.clear()
                self._settle(source)

    def _make_room(self) -> None:
        """Close on messages until what is here fits the budget; on silent ones until those that wait fit, too."""
        sources, now_s = self._busy(), monotonic()
        excess = sum(source.held for source in sources) - self.limits.bytes_max
        while excess > 0:
            worst = max(sources, key=lambda source: (source.is_silent(now_s), source.held))
            excess -= self._close_oldest(worst)
        while self._waiting and not self._fits(next(iter(self._waiting))):
            silent = [source for source in sources if source.is_silent(now_s)]
            if not silent:
                break  # what goes on will have come before long
            self._close_oldest(max(silent, key=lambda source: source.held))

    def _close_oldest(self, source: Source) -> int:
        """Close on the oldest message of a connection; return by how much less it can hold now."""
        held, charge = source.held, source.charge
        arrival = next(iter(source.arriving))
        del source.arriving[arrival]
        self.closed += 1
        arrival.close(
            Refused(
                Reason.QUEUE_FULL,
                f"more than {self.limits.bytes_max} bytes of messages are on their way in "
                "(listeners.arriving_bytes_max), and this connection holds most or is silent; send the message again",
                retry_after_s=RETRY_S,
            )
        )
        if source.arriving:
            most = len(source.arriving) * self.limits.message_bytes
            source.held, source.charge = min(held, most), min(charge, most)
            self._charged += source.charge - charge
        else:
            self._settle(source)
        return held - source.held

    def _too_late(self) -> Refused:
        self.late += 1
        return Refused(
            Reason.QUEUE_FULL,
            f"the message had not come in full {self.limits.arrival_s:g} s after its headers (listeners.arrival_s); "
            "send it again, by a faster way or in smaller parts",
            retry_after_s=RETRY_S,
        )


def _trim() -> None:
    """Have the C library give back what it has free: gRPC's threads each have a heap, and keep what they had."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own
    if trim is not None:
        trim(0)
