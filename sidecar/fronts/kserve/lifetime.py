"""End a client's streams: when the sidecar drains, and when a stream is too old.

A stream is ended only while nothing is in flight on it, so a request without an answer has never run and its client may
send it again on a new stream. The stream must also have been quiet for a moment: what a client sends while its
connection closes can cost it answers that it has not read yet. If the client goes on sending, its requests are refused
one by one, and the stream is ended when the refusals have had time to arrive. A stream that is too old takes requests
for its age once more.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from random import Random

from sidecar.core.effects import Effect
from sidecar.core.events import Event, ShutdownBegun
from sidecar.errors import Reason, Refused

JITTER = 0.1
"""Share by which ages vary, so that streams opened together do not all reconnect together."""
QUIET_S = 0.1
"""How long a stream must have been quiet before it is ended."""
REFUSING_S = 1.0
"""How long a stream refuses requests before it is ended although its client goes on sending."""
LOOK_S = 0.02
INT32_MAX = 2**31 - 1
"""gRPC's value for no limit."""
UNANSWERED = "what was sent on it and has no answer did not run"


def jittered(age_s: float, random: Random) -> float:
    """Return an age drawn evenly from ±JITTER around `age_s`."""
    return age_s * random.uniform(1 - JITTER, 1 + JITTER)


def connection_age_options(age_s: float | None) -> tuple[tuple[str, int], ...]:
    """Return gRPC's options for a listener whose connections take no new calls from that age on.

    gRPC adds jitter of its own. The grace period has no end: no answer is cut off, and a connection closes with its
    last stream.
    """
    if age_s is None:
        return ()
    milliseconds = max(1, round(age_s * 1000))
    return (("grpc.max_connection_age_ms", milliseconds), ("grpc.max_connection_age_grace_ms", INT32_MAX))


class Lifetime:
    """The lifetime of one stream. Use it from the event loop of the stream's own task."""

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
        """Return why the stream had to end; None if its client closed it."""
        return self._why() if self._why is not None and self._reading.expired() else None

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """Enter the reading of the stream's requests; it is interrupted when the stream has to end."""
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

    def begin(self) -> None:
        """Note that the answering of a request begins, which is in flight until `ended`."""
        self._in_flight += 1
        self._schedule()

    def ended(self) -> None:
        self._in_flight -= 1
        self._quiet_since_s = self._loop.time()
        self._schedule()

    def check(self) -> None:
        """Raise Refused(DRAINING) if the stream is too old for a new request. During a drain the core refuses."""
        if self._is_past_age:
            raise Refused(
                Reason.DRAINING,
                f"the stream {self._old()} and takes no more requests: send this one on a new stream",
                retry_after_s=0.0,
            )

    def end(self, why: Callable[[], Refused]) -> None:
        """End the stream once it is quiet. The caller makes sure that new requests are refused from now on."""
        self._why = self._why or why
        self._refuse()

    def over(self) -> None:
        """Note that the stream has ended."""
        if self._timer is not None:
            self._timer.cancel()
        self._on_over(self)

    def _refuse(self) -> None:
        if self._refusing_since_s is None:
            self._refusing_since_s = self._loop.time()
        self._schedule()

    def _schedule(self) -> None:
        """Set when reading is to be interrupted, as things stand."""
        if self._why is None or not self._is_reading or self._is_closing or self._reading.expired():
            return
        now_s, since_s = self._loop.time(), self._refusing_since_s
        if self._in_flight:
            self._reading.reschedule(None)
        elif since_s is None or now_s < since_s + REFUSING_S:
            self._reading.reschedule(self._quiet_since_s + QUIET_S)
        else:
            self._is_closing = True  # regardless of new requests: they are refused
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
    """The lifetimes of all open streams. Observes the core, and ends them when it drains."""

    def __init__(self, age_s: float | None = None, random: Random | None = None) -> None:
        self._age_s = age_s
        self._random = random or Random()
        self._open: dict[Lifetime, None] = {}
        self._draining = False

    def __len__(self) -> int:
        return len(self._open)

    def begin(self) -> Lifetime:
        """Return the lifetime of a new stream. Call its `over` when the stream has ended."""
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
        """Wait until no stream is open."""
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
