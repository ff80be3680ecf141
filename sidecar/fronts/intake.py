"""Bound the bytes of incomplete messages over all listeners of the process.

gRPC does not say how much of a message has come; the kernel does, by connection (`arriving`, `received`). It is asked
every `LOOK_S`. A message whose call has just begun is expected to be as large as messages may be, or as the last one of
its connection suggests. Only as many messages are read at a time as fit the budget by that estimate; the others wait,
and connections take turns. After the first look a connection is charged with what it holds and what a second at its
recent rate would bring. A waiting call that has brought very little is expected to be small, so a client that sends
headers only, or a byte a second, keeps nobody else from sending.

Messages of streams are read at once, since the next one may come at any time. Between two looks streams can therefore
exceed the budget by as much as the network carries meanwhile.

When the budget is exceeded, the silent connection, or else the one that holds most, loses its oldest messages. A stream
that holds nothing costs nothing and is left alone. The kernel's count does not tell which message of a connection the
bytes belong to, so all clients behind one proxy share its fate.
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
"""Share of the time that looking may take: with many connections the looks are further apart."""
NEW_S = 0.1
"""How long a message that is read counts with its expected size: its client may be slow to begin."""
LITTLE_BYTES = 32 << 10
"""Half of what gRPC accepts of a message before it is read: a large message that waits has brought more."""
LARGE_BODY_BYTES = 1 << 20
"""Larger HTTP bodies are kept until the one process that parses them is done; they get half of the budget."""
LARGE_BYTES, LINGER_S, LINGER_LOOKS = 8 << 20, 1.0, 5
"""A message of at least `LARGE_BYTES` stays charged twice, raw and parsed, until its call ends, or `LINGER_S` and
`LINGER_LOOKS` looks have passed: the event loop itself may have been busy with it."""
RETRY_S = 1.0


@dataclass(frozen=True)
class IntakeLimits:
    """Limits of an `Intake`. `message_bytes` bounds one message, and so what each message under way can hold."""

    bytes_max: int = 256 << 20
    arrival_s: float = 30.0
    message_bytes: int = 64 << 20

    @property
    def read_bytes_max(self) -> int:
        """Bytes that may be read at a time; the rest is for the copies made by transport, parser and serializer."""
        return max(self.bytes_max - 2 * self.message_bytes, self.bytes_max // 4)


class Intake:
    """The budget of one process. Use it from the event loop only."""

    def __init__(self, limits: IntakeLimits | None = None, received: Received | None = None) -> None:
        self.limits = limits or IntakeLimits()
        self.refused = {"budget": 0, "late": 0, "calls": 0}
        """Messages given up because the budget was exceeded or time ran out, and calls above the limit."""
        self._received = received or Received()
        self._sources: dict[Wire, Source] = {}
        self._moving: dict[Source, None] = {}
        """Sources that have messages under way, or had some at the last look."""
        self._new: dict[Arrival, tuple[float, int]] = {}
        """Arrivals that the kernel's count may not show yet: since when they are read, and their expected size."""
        self._expected = 0
        """Sum of the sizes in `_new`."""
        self._charged = 0
        """Sum of the charges of all connections."""
        self._large_bodies_bytes = 0
        """Sum of the sizes of the large bodies that are being received or held."""
        self._lingering: deque[tuple[float, int, Call, int]] = deque()
        """Large messages that have come: charged until this time and this look, the call, and the charge in bytes."""
        self._looks = 0
        self._waiting: dict[Source, deque[Arrival]] = {}
        self._looking: asyncio.TimerHandle | None = None

    @property
    def held_bytes(self) -> int:
        """Bytes of incomplete messages at the last look."""
        return sum(source.held for source in self._moving)

    @contextmanager
    def call(self, wire: Wire | None) -> Iterator[Call]:
        """Enter a call on a connection. A call that did not come by TCP (`wire` is None) gets a source of its own."""
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
        """Wait until the call's one message may be read, and return what `read` returns.

        Call `call.source.hand_over` with its size afterwards. Raises Refused if it takes too long, or if it is given up
        because the budget is exceeded.
        """
        async with _Arriving(self, call.source, self.limits.arrival_s) as arrival:
            await self._until_admitted(call.source, arrival)
            return self._linger(call, await read())

    async def next_of(self, call: Call, read: Callable[[], Awaitable[Any]]) -> Any:
        """Return the next message of a stream from `read`. Unlike `one` it has no deadline and does not wait first."""
        async with _Arriving(self, call.source, None):
            return self._linger(call, await read())

    @asynccontextmanager
    async def body(self, size_bytes: int) -> AsyncIterator[BodyArrival]:
        """Receive a body of about that size, and keep it charged until it is no longer needed.

        Waits until it may be read, and raises Refused as `one` does.
        """
        source = Source(size_bytes)
        source.large_body_bytes = size_bytes if size_bytes > LARGE_BODY_BYTES else 0
        arriving = _Arriving(self, source, self.limits.arrival_s)
        try:
            async with arriving as arrival:
                await self._until_admitted(source, arrival)
                yield BodyArrival(self, source, arrival)
        finally:
            self._large_bodies_bytes -= arriving.arrival.large_body_bytes
            self.charge(source, -source.charge)
            self._admit()

    def charge(self, source: Source, size_bytes: int) -> None:
        """Count bytes that a source without a TCP connection has brought."""
        source.held += size_bytes
        source.charge += size_bytes
        source.heard_s = monotonic()
        self._charged += size_bytes
        self._make_room()

    def begin(self, source: Source, arrival: Arrival) -> None:
        """Count a message that is on its way."""
        source.begin(arrival)
        self._moving[source] = None
        self._look_soon()

    def end(self, source: Source, arrival: Arrival) -> None:
        """Count it no longer."""
        self._is_known(arrival)
        source.arriving.pop(arrival, None)
        if source.charge and not source.arriving:
            self._settle(source)
        self._admit()

    def _linger(self, call: Call, message: Any) -> Any:
        """Keep a large message charged for a while: copying, parsing or refusing it takes time."""
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

    async def _until_admitted(self, source: Source, arrival: Arrival) -> None:
        """Wait until one more message may be read. Connections take turns."""
        if source not in self._waiting and self._fits(source):
            self._read(source, arrival)
            return
        arrival.admitted = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(source, deque()).append(arrival)
        source.waiting += 1
        try:
            await arrival.admitted
        finally:
            source.waiting -= 1
            queue = self._waiting.get(source)
            if queue is not None and arrival in queue:
                queue.remove(arrival)
                if not queue:
                    del self._waiting[source]

    def _admit(self) -> None:
        """Admit the first waiting message of each connection that fits the budget."""
        for source in list(self._waiting):
            if not self._fits(source):
                continue
            queue = self._waiting.pop(source)
            arrival = queue.popleft()
            if queue:
                self._waiting[source] = queue
            assert arrival.admitted is not None
            if not arrival.admitted.done():  # else its client has left, or its time is over
                self._read(source, arrival)
                arrival.admitted.set_result(None)

    def _read(self, source: Source, arrival: Arrival) -> None:
        source.heard_s = monotonic()
        self._new[arrival] = source.heard_s, source.expected_bytes
        self._expected += source.expected_bytes
        arrival.large_body_bytes = source.large_body_bytes
        self._large_bodies_bytes += arrival.large_body_bytes

    def _is_known(self, arrival: Arrival) -> None:
        self._expected -= self._new.pop(arrival, (0.0, 0))[1]

    def _fits(self, source: Source) -> bool:
        """Return True if one more message of a connection may be read. One always may if there is nothing else."""
        bodies_bytes = self._large_bodies_bytes if source.large_body_bytes else 0
        if bodies_bytes and bodies_bytes + source.large_body_bytes > self.limits.read_bytes_max // 2:
            return False
        charged = self._charged + self._expected
        return charged == 0 or charged + source.expected_bytes <= self.limits.read_bytes_max

    def _settle(self, source: Source) -> None:
        """Update the count of one TCP connection."""
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
        if any(source.base is None and source.wire is not None for source in self._moving):
            self._find()  # HTTP bodies are counted as they come: to list the descriptors for them would be in vain
        for source in list(self._moving):
            self._settle(source)
            if not source.arriving:
                del self._moving[source]
        for arrival in [arrival for arrival, (since_s, _) in self._new.items() if began_s - since_s >= NEW_S]:
            self._is_known(arrival)
        for source, queue in self._waiting.items():
            if source.wire is not None and source.held <= LITTLE_BYTES and began_s - queue[0].since_s >= LOOK_S:
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
        """Find new connections and forget closed ones."""
        self._received.find()
        for wire, source in list(self._sources.items()):
            if not source.calls and self._received.bytes_of(wire) is None:
                del self._sources[wire]

    def _close_half(self) -> None:
        """Give up incomplete messages that make no progress. Messages of streams have no other deadline."""
        now_s = monotonic()
        for source in self._moving:
            if source.is_silent(now_s, self.limits.arrival_s):
                for arrival in list(source.arriving):
                    arrival.close(self.too_late())
                source.arriving.clear()
                self._settle(source)

    def _make_room(self) -> None:
        """Give up messages until the rest fits the budget, and silent ones until the waiting ones fit."""
        sources, now_s = [source for source in self._moving if source.arriving], monotonic()
        excess = sum(source.held for source in sources) - self.limits.bytes_max
        while excess > 0:
            worst = max(sources, key=lambda source: (source.is_silent(now_s), source.held))
            excess -= self._close_oldest(worst)
        while self._waiting and not self._fits(next(iter(self._waiting))):
            silent = [source for source in sources if source.is_silent(now_s)]
            if not silent:
                break  # the others make progress and will soon be complete
            self._close_oldest(max(silent, key=lambda source: source.held))

    def _close_oldest(self, source: Source) -> int:
        """Give up the oldest message of a connection; return by how many bytes that lowers what it can hold."""
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

    def too_late(self) -> Refused:
        self.refused["late"] += 1
        return Refused(
            Reason.QUEUE_FULL,
            f"the message had not come in full {self.limits.arrival_s:g} s after its headers (listeners.arrival_s); "
            "send it again, over a faster connection or in smaller parts",
            retry_after_s=RETRY_S,
        )


class _Arriving:
    """A message on its way, in a block of `async with`. A class, for it encloses each message of a stream."""

    __slots__ = ("_intake", "_source", "_timeout", "arrival")

    def __init__(self, intake: Intake, source: Source, arrival_s: float | None) -> None:
        self._intake = intake
        self._source = source
        self._timeout = asyncio.timeout(arrival_s)
        self.arrival = Arrival(self._timeout)

    async def __aenter__(self) -> Arrival:
        await self._timeout.__aenter__()
        self._intake.begin(self._source, self.arrival)
        return self.arrival

    async def __aexit__(self, *raised: Any) -> None:
        self._intake.end(self._source, self.arrival)
        try:
            await self._timeout.__aexit__(*raised)
        except TimeoutError:
            raise self.arrival.closed or self._intake.too_late() from None


class BodyArrival:
    """A body being received: its bytes are counted as they come, and charged until it is no longer needed."""

    def __init__(self, intake: Intake, source: Source, arrival: Arrival) -> None:
        self.source = source
        self._intake = intake
        self._arrival = arrival

    def count(self, size_bytes: int) -> None:
        self._intake.charge(self.source, size_bytes)

    def has_come(self) -> None:
        """Note that the body is complete: it can no longer be given up or be late."""
        self.source.arriving.pop(self._arrival, None)
        self._arrival.timeout.reschedule(None)


def _trim() -> None:
    """Return free memory to the system: each of gRPC's threads has a heap that keeps what it had."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own
    if trim is not None:
        trim(0)
