"""What is on its way in: messages that have not come in full, over all listeners, inside one budget of bytes.

How much of a message has come gRPC does not say, but the kernel does, by connection (`arriving`, `received`). That is
looked at every `LOOK_S`. A message whose call has just begun is taken for as large as messages may be, or as its
connection's last one suggests. Only as many are read at a time as fit the budget so; the others wait, each connection
in its turn. What has been looked at counts as what is here and what comes in a second as fast as it came, and a call
of which little comes although it waits for its turn is a small one: who sends headers, or a byte a second, keeps nobody
from sending.

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
from sidecar.fronts.arriving import SMALL_BYTES, Arrival, Call, Source
from sidecar.fronts.received import Received, Wire

LOOK_S = 0.02
LOOKING_MAX = 0.02
"""The share of the time that may go into looking: with many connections the looks are further apart."""
NEW_S = 0.1
"""For how long a message that is read counts as large as it may be: its client may be slow to begin."""
LITTLE_BYTES = 32 << 10
"""Half of what gRPC takes of a message before it is read: a large one that waits has brought more."""
LARGE_BODY_BYTES = 1 << 20
"""HTTP bodies above are held until the one process that reads such has done so: they get half of the budget."""
LARGE_BYTES, LINGER_S, LINGER_LOOKS = 8 << 20, 1.0, 5
"""A message from that size on is charged twice, as it came and parsed, until its call is over; at most for so long, and
so many looks: the event loop may have been busy with it."""
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
        return max(self.bytes_max - 2 * self.message_bytes, self.bytes_max // 4)


class Intake:
    """The budget of one process. It belongs to the event loop."""

    def __init__(self, limits: IntakeLimits | None = None, received: Received | None = None) -> None:
        self.limits = limits or IntakeLimits()
        self.refused = {"budget": 0, "late": 0, "calls": 0}
        """Messages that were given up because the budget was short or they took too long; calls too many."""
        self._received = received or Received()
        self._sources: dict[Wire, Source] = {}
        self._moving: dict[Source, None] = {}
        """Those with messages under way, and those that had some at the last look."""
        self._new: dict[Arrival, tuple[float, int]] = {}
        """Those that may not have been seen yet, since when they are read, and the bytes that they are taken for."""
        self._expected = 0
        """The sum of these bytes."""
        self._charged = 0
        """What all connections are charged with."""
        self._large_bodies_bytes = 0
        """What the large bodies that are here, or may come now, are taken for."""
        self._lingering: deque[tuple[float, int, Call, int]] = deque()
        """Large messages that have come: until when and which look they are charged, and with what."""
        self._looks = 0
        self._waiting: dict[Source, deque[Arrival]] = {}
        self._looking: asyncio.TimerHandle | None = None

    @property
    def held_bytes(self) -> int:
        """What was under way at the last look."""
        return sum(source.held for source in self._moving)

    @contextmanager
    def call(self, wire: Wire | None) -> Iterator[Call]:
        """Go round one call on a connection. One that is no TCP has only this."""
        source = Source(self.limits.message_bytes) if wire is None else self._sources.get(wire)
        if source is None:
            assert wire is not None
            source = self._sources[wire] = Source(self.limits.message_bytes, wire)
        source.calls += 1
        call = Call(source)
        try:
            yield call
        finally:
            source.calls -= 1
            if call.lingering:
                self._release(call, call.lingering)

    async def one(self, call: Call, read: Callable[[], Awaitable[Any]]) -> Any:
        """Return what `read` does, the one message of a call, after its turn has come.

        Raises Refused when it takes too long, or what is here is too much. `call.source.hand_over` is to be called
        with its size.
        """
        async with self._timed(self.limits.arrival_s) as arrival:
            with self._arriving(call.source, arrival):
                await self._turn(call.source, arrival)
                return self._linger(call, await read())

    async def next_of(self, call: Call, read: Callable[[], Awaitable[Any]]) -> Any:
        """Return what `read` does, the next of a stream's messages, as `one` but without end and turn."""
        async with self._timed(None) as arrival:
            with self._arriving(call.source, arrival):
                return self._linger(call, await read())

    @asynccontextmanager
    async def body(self, size_bytes: int) -> AsyncIterator[BodyArrival]:
        """Go round the arrival of a body of about that size, and what must be done before it can be let go.

        It waits for its turn before, and raises Refused as `one` does.
        """
        async with self._timed(self.limits.arrival_s) as arrival:
            source = Source(size_bytes)
            source.large_body_bytes = size_bytes if size_bytes > LARGE_BODY_BYTES else 0
            body = BodyArrival(self, source, arrival)
            try:
                with self._arriving(body.source, arrival):
                    await self._turn(body.source, arrival)
                    yield body
            finally:
                self._large_bodies_bytes -= arrival.large_body_bytes
                self.charge(body.source, -body.source.charge)
                self._admit()

    def charge(self, source: Source, size_bytes: int) -> None:
        """Count what has come by one that is no TCP connection."""
        source.held += size_bytes
        source.charge += size_bytes
        source.heard_s = monotonic()
        self._charged += size_bytes
        self._make_room()

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
        source.begin(arrival)
        self._moving[source] = None
        self._look_soon()
        try:
            yield
        finally:
            self._is_known(arrival)
            source.arriving.pop(arrival, None)
            if source.charge and not source.arriving:
                self._settle(source)
            self._admit()

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
        source.waiting += 1
        try:
            await arrival.turn
        finally:
            source.waiting -= 1
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
        source.heard_s = monotonic()
        self._new[arrival] = source.heard_s, source.expected_bytes
        self._expected += source.expected_bytes
        arrival.large_body_bytes = source.large_body_bytes
        self._large_bodies_bytes += arrival.large_body_bytes

    def _is_known(self, arrival: Arrival) -> None:
        self._expected -= self._new.pop(arrival, (0.0, 0))[1]

    def _fits(self, source: Source) -> bool:
        """Whether one more may be read of a connection. One may when there is nothing else."""
        bodies_bytes = self._large_bodies_bytes if source.large_body_bytes else 0
        if bodies_bytes and bodies_bytes + source.large_body_bytes > self.limits.read_bytes_max // 2:
            return False
        charged = self._charged + self._expected
        return charged == 0 or charged + source.expected_bytes <= self.limits.read_bytes_max

    def _settle(self, source: Source) -> None:
        """Look at one connection."""
        if source.wire is not None:
            before = source.charge
            source.settle(self._received.bytes_of(source.wire), monotonic(), self.limits.message_bytes)
            self._charged += source.charge - before

    def _look_soon(self, after_s: float = LOOK_S) -> None:
        if self._looking is None:
            self._looking = asyncio.get_running_loop().call_later(after_s, self._look)

    def _look(self) -> None:
        self._looking = None
        began_s = monotonic()
        if any(source.base is None for source in self._moving):
            self._find()
        for source in list(self._moving):
            self._settle(source)
            if not source.arriving:
                del self._moving[source]
        for arrival in [arrival for arrival, (since_s, _) in self._new.items() if began_s - since_s >= NEW_S]:
            self._is_known(arrival)
        for source, line in self._waiting.items():
            if source.wire is not None and source.held <= LITTLE_BYTES and began_s - line[0].since_s >= LOOK_S:
                source.expected_bytes = min(source.expected_bytes, SMALL_BYTES)
        self._looks += 1
        while self._lingering and self._lingering[0][0] <= began_s and self._lingering[0][1] <= self._looks:
            self._release(*self._lingering.popleft()[2:])
        self._close_half()
        self._make_room()
        self._admit()
        if self._moving or self._lingering:
            self._look_soon(max(LOOK_S, (monotonic() - began_s) / LOOKING_MAX))

    def _find(self) -> None:
        """Find the connections that are new, and forget those that have gone."""
        self._received.find()
        for wire, source in list(self._sources.items()):
            if not source.calls and self._received.bytes_of(wire) is None:
                del self._sources[wire]

    def _close_half(self) -> None:
        """Close on messages that have begun and do not go on: streams' have no other end."""
        now_s = monotonic()
        for source in self._moving:
            if source.is_silent(now_s, self.limits.arrival_s):
                for arrival in list(source.arriving):
                    arrival.close(self._too_late())
                source.arriving.clear()
                self._settle(source)

    def _make_room(self) -> None:
        """Close on messages until what is here fits the budget; on silent ones until those that wait fit, too."""
        sources, now_s = [source for source in self._moving if source.arriving], monotonic()
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
        self.refused["budget"] += 1
        arrival.close(
            Refused(
                Reason.QUEUE_FULL,
                f"more than {self.limits.bytes_max} bytes of messages are on their way in "
                "(listeners.arriving_bytes_max), and this connection holds most or is silent; send the message again",
                retry_after_s=RETRY_S,
            )
        )
        most = len(source.arriving) * self.limits.message_bytes
        source.held, source.charge = min(held, most), min(charge, most)
        self._charged += source.charge - charge
        if not source.arriving:
            self._settle(source)
        return held - source.held

    def _too_late(self) -> Refused:
        self.refused["late"] += 1
        return Refused(
            Reason.QUEUE_FULL,
            f"the message had not come in full {self.limits.arrival_s:g} s after its headers (listeners.arrival_s); "
            "send it again, by a faster way or in smaller parts",
            retry_after_s=RETRY_S,
        )


class BodyArrival:
    """A body on its way, whose bytes are counted as they come, and charged until it can be let go."""

    def __init__(self, intake: Intake, source: Source, arrival: Arrival) -> None:
        self.source = source
        self._intake = intake
        self._arrival = arrival

    def count(self, size_bytes: int) -> None:
        self._intake.charge(self.source, size_bytes)

    def has_come(self) -> None:
        """Note that nobody waits for it any more."""
        self.source.arriving.pop(self._arrival, None)
        self._arrival.timeout.reschedule(None)


def _trim() -> None:
    """Have the C library give back what it has free: gRPC's threads each have a heap, and keep what they had."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own
    if trim is not None:
        trim(0)
