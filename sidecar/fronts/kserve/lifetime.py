"""How long a client's stream lives: until its client closes it, the sidecar drains, or it has grown too old.

A stream is closed only while nothing is in flight on it, so a request without an answer has never run: its client may
send it again, on a new stream. It must have been quiet for a moment, too: what a client sends while its connection
closes can cost it answers that it has not read yet. Who goes on sending is refused, request by request, and closed
when that has had its time to arrive. A stream that is too old still takes requests for as long again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from random import Random

from sidecar.core.effects import Effect
from sidecar.core.events import Event, ShutdownBegun
from sidecar.errors import Reason, Refused

JITTER = 0.1
"""By which share ages are longer or shorter, so that streams opened together do not all come back together."""
QUIET_S = 0.1
"""How long nothing must have happened on a stream that is closed."""
REFUSING_S = 1.0
"""How long a stream that refuses all requests is left to a client that sends them nevertheless."""
LOOK_S = 0.02
INT32_MAX = 2**31 - 1
"""gRPC's word for no limit."""
UNANSWERED = "what was sent on it and has no answer did not run"


def jittered(age_s: float, random: Random) -> float:
    """Return an age that lies evenly within ±JITTER of `age_s`."""
    return age_s * random.uniform(1 - JITTER, 1 + JITTER)


def connection_age_options(age_s: float | None) -> tuple[tuple[str, int], ...]:
    """Return gRPC's options for a listener whose connections take no new calls from that age on.

    gRPC adds the jitter. Its grace is without end: no answer is cut off, and a connection closes with its last stream.
    """
    if age_s is None:
        return ()
    milliseconds = max(1, round(age_s * 1000))
    return (("grpc.max_connection_age_ms", milliseconds), ("grpc.max_connection_age_grace_ms", INT32_MAX))


class Lifetime:
    """One stream's. It belongs to the event loop of the stream's own task."""

    def __init__(self, age_s: float | None, on_over: Callable[[Lifetime], None]) -> None:
        self._age_s = age_s
        self._on_over = on_over
        self._loop = asyncio.get_running_loop()
        self._why: Callable[[], Refused] | None = None
        self._is_past_age = False
        self._refusing_since_s: float | None = None
        self._is_closing = False
        self._in_flight = 0
        self._quiet_since_s = self._loop.time()
        self._reading = asyncio.timeout(None)
        self._is_reading = False
        self._timer: asyncio.TimerHandle | None = None
        if age_s is not None:
            self._timer = self._loop.call_later(age_s, self._grow_old)

    @property
    def cut(self) -> Refused | None:
        """Why the stream has to end although its client did not close it; None if it did."""
        return self._why() if self._why is not None and self._reading.expired() else None

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """Go round the reading of the stream's requests; it is broken off when the stream has to end."""
        try:
            async with self._reading:
                self._is_reading = True
                self._schedule()
                yield
        except TimeoutError:
            if not self._reading.expired():
                raise
        finally:
            self._is_reading = False

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Go round the answer to one request: it is in flight."""
        self._in_flight += 1
        self._schedule()
        try:
            yield
        finally:
            self._in_flight -= 1
            self._quiet_since_s = self._loop.time()
            self._schedule()

    def check(self) -> None:
        """Raise Refused(DRAINING) when the stream is too old for a new request. In a drain the core refuses."""
        if self._is_past_age:
            raise Refused(
                Reason.DRAINING,
                f"the stream {self._old()} and takes no more requests: send this one on a new stream",
                retry_after_s=0.0,
            )

    def end(self, why: Callable[[], Refused]) -> None:
        """End the stream once it is quiet; whoever calls has its requests refused from now on."""
        self._why = self._why or why
        self._refuse()

    def over(self) -> None:
        """The stream has ended."""
        if self._timer is not None:
            self._timer.cancel()
        self._on_over(self)

    def _refuse(self) -> None:
        if self._refusing_since_s is None:
            self._refusing_since_s = self._loop.time()
        self._schedule()

    def _schedule(self) -> None:
        """Say when reading is to be broken off, as things stand."""
        if self._why is None or not self._is_reading or self._is_closing or self._reading.expired():
            return
        now_s, since_s = self._loop.time(), self._refusing_since_s
        if self._in_flight:
            self._reading.reschedule(None)
        elif since_s is None or now_s < since_s + REFUSING_S:
            self._reading.reschedule(self._quiet_since_s + QUIET_S)
        else:
            self._is_closing = True  # whatever comes now: it is refused
            self._reading.reschedule(now_s)

    def _grow_old(self) -> None:
        assert self._age_s is not None
        self._why = self._why or self._too_old
        self._timer = self._loop.call_later(self._age_s, self._grow_too_old)
        self._schedule()

    def _grow_too_old(self) -> None:
        self._is_past_age = True
        self._refuse()

    def _too_old(self) -> Refused:
        return Refused(
            Reason.DRAINING, f"the stream {self._old()}: open a new one now; {UNANSWERED}", retry_after_s=0.0
        )

    def _old(self) -> str:
        return f"is more than {self._age_s:.1f} s old, where listeners.data.max_connection_age_s ends it"


class Lifetimes:
    """Those of all open streams. It observes the core, and ends them when that drains."""

    def __init__(self, age_s: float | None = None, random: Random | None = None) -> None:
        self._age_s = age_s
        self._random = random or Random()
        self._open: dict[Lifetime, None] = {}
        self._draining = False

    def __len__(self) -> int:
        return len(self._open)

    def begin(self) -> Lifetime:
        """Return the lifetime of a stream that opens now; its `over` is to be called when it has ended."""
        age_s = None if self._age_s is None else jittered(self._age_s, self._random)
        lifetime = Lifetime(age_s, self._forget)
        self._open[lifetime] = None
        if self._draining:
            lifetime.end(_draining)
        return lifetime

    def observed(self, event: Event, effects: Sequence[Effect], now_ns: int) -> None:
        if isinstance(event, ShutdownBegun):
            self._draining = True
            for lifetime in list(self._open):
                lifetime.end(_draining)

    async def all_over(self) -> None:
        """Wait until no stream is open any more."""
        while self._open:
            await asyncio.sleep(LOOK_S)

    def _forget(self, lifetime: Lifetime) -> None:
        del self._open[lifetime]


def _draining() -> Refused:
    return Refused(
        Reason.DRAINING,
        f"the sidecar is shutting down: open a stream to another replica; {UNANSWERED}",
        retry_after_s=1.0,
    )
