"""Run the core in one task: take an event, step, show the step to observers, run its effects.

If a step or an effect raises, it is the last: the core is half changed and takes no more events (`shell.crash`).

There are two queues. Reports of engines and the store are bounded by what is in flight, never refused, and handled
first. Clients' events are bounded here and refused when the queue is full. So a flood of arrivals delays the end of a
request by one event at most.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from sidecar.core.admission import name_in, with_name
from sidecar.core.causes import Said
from sidecar.core.core import Core
from sidecar.core.effects import Dispatch, Effect, Settle, WakeAt
from sidecar.core.enums import Outcome
from sidecar.core.events import ClientLeft, ClientStalled, Event, Received, Tick
from sidecar.errors import Reason, Refused
from sidecar.journal.raised import Raised
from sidecar.shell.crash import Crash

logger = logging.getLogger(__name__)

CLIENT_EVENTS = (Received, ClientLeft, ClientStalled)
EVENTS_A_BATCH = 64
"""Events handled before the event loop may do something else."""


class NoStep(Tick):
    """Comes in an event's place with endings that the core did not make."""


def goes_on(event: Event, settle: Settle) -> bool:
    """Return True if another replica goes on with a request that the core has settled, and counts its ending."""
    return settle.reason is Reason.NOT_OWNER and not isinstance(event, NoStep)


class Observer(Protocol):
    """Sees every step after it was taken: metrics, log, journal. What it raises is logged and ignored."""

    def observed(self, event: Event, effects: Sequence[Effect], now_ns: int) -> None: ...


class Driver:
    """Feeds the core. `run_effect` carries out one effect; it must not block, and its exception is a crash."""

    def __init__(
        self,
        core: Core,
        clock_ns: Callable[[], int],
        run_effect: Callable[[Effect], None],
        observers: Sequence[Observer] = (),
        inbox_max: int = 10_000,
        crash: Crash | None = None,
        made: Callable[[Settle], Settle] = lambda ending: ending,
    ) -> None:
        """`made(ending)` returns an early ending with all that was made of the answer: the core hears of it later."""
        self._made = made
        self.crash = crash or Crash()
        self.crash.then(lambda _: self.stop())
        self.core = core
        self.clock_ns = clock_ns
        self._run_effect = run_effect
        self._observers = list(observers)
        self._of_refused: list[Observer] = []
        self._of_core: list[Observer] = []
        self.waited_ns: dict[int, int] = {}
        """How long requests had waited at other replicas, or for them, before the core got them."""
        self.inbox_max = inbox_max
        self._engine: deque[Event] = deque()
        self._client: deque[Event] = deque()
        self._scheduled = False
        self._stopped = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ns = self._wake_ns = 0
        """When the timer was set to end, and when the core wants to be woken."""
        self._running_in: asyncio.AbstractEventLoop | None = None
        self._last_ns = 0

    def observe(self, observer: Observer, of_refused: bool = False, of_core: bool = False) -> None:
        """Show an observer every step; with `of_refused` also the requests that are refused before the core.

        With `of_core` it sees the effects as the core has decided them, without what requests have waited elsewhere.
        """
        (self._of_core if of_core else self._observers).append(observer)
        if of_refused:
            self._of_refused.append(observer)

    def forget(self, observer: Observer) -> None:
        """Show an observer no further step."""
        self._observers.remove(observer)

    def post(self, event: Event, waited_ns: int = 0) -> None:
        """Queue an event; a request may have waited elsewhere before, which counts as its wait.

        Raises Refused for a request if the queue is full or the core has failed.
        """
        if self.crash.raised is not None:
            if isinstance(event, Received):
                raise self.crash.refused()
            return
        if waited_ns and isinstance(event, Received):
            self.waited_ns[event.request] = waited_ns
        if isinstance(event, CLIENT_EVENTS):
            if len(self._client) >= self.inbox_max and isinstance(event, Received):
                raise self._refuse(event)
            self._client.append(event)
        else:
            self._engine.append(event)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._run_batch)

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """The event loop, kept: until Python 3.12 asyncio makes a system call each time that it is asked for it."""
        if self._running_in is None:
            self._running_in = asyncio.get_running_loop()
        return self._running_in

    def _refuse(self, event: Received) -> Refused:
        refused = Refused(
            Reason.QUEUE_FULL,
            f"the sidecar's inbox is full ({self.inbox_max} events); try again later",
            retry_after_s=1.0,
        )
        ending = Settle(
            event.request, Outcome.REFUSED, name_in(self.core.state, event.adapter), event.tenant, "default",
            self.waited_ns.pop(event.request, 0), event.input_tokens, reason=refused.reason,
            cause=Said(refused.message),
        )  # fmt: skip
        self._show(self._of_refused, event, [ending], self.clock_ns())
        refused.is_counted = True
        return refused

    def _run_batch(self) -> None:
        self._scheduled = False
        for _ in range(EVENTS_A_BATCH):
            if self._stopped:
                return
            if self._engine:
                self._take(self._engine.popleft())
            elif self._client:
                self._take(self._client.popleft())
            else:
                return
        self._scheduled = True
        self._loop.call_soon(self._run_batch)

    def tell(self, event: Event) -> None:
        """Take an event now, after all that engines have reported: the core must know of every first token by then.

        Raises as `step`.
        """
        while self._engine:
            self.step(self._engine.popleft())
        self.step(event)

    def step(self, event: Event) -> Sequence[Effect]:
        """Take one event now and return its effects. Raises Failed(SIDECAR_FAILED) if the core has failed, or fails."""
        effects = self._take(event)
        if effects is None:
            raise self.crash.error()
        return effects

    def _take(self, event: Event) -> Sequence[Effect] | None:
        """Take one event and return its effects; None if the core has failed."""
        if self.crash.raised is not None:
            return None
        now_ns = self._last_ns = max(self._last_ns, self.clock_ns())
        effect: Effect | None = None
        effects: Sequence[Effect] = ()
        try:
            effects = self.core.step(event, now_ns)
            told = [self._whole(each) if isinstance(each, Dispatch | Settle) else each for each in effects]
            shown = self._named(event, told) if isinstance(event, Received) else told
            self._show(self._observers, event, shown, now_ns)
            self._show(self._of_core, event, effects, now_ns)
            for effect, whole in zip(effects, told, strict=True):
                if isinstance(effect, WakeAt):
                    self._wake_at(effect.at_ns, now_ns)
                    continue
                if isinstance(effect, Settle):
                    self.waited_ns.pop(effect.request, None)
                self._run_effect(whole)
        except BaseException as error:
            self.crash.happen(Raised(error, now_ns, event, effect))
            if not isinstance(error, Exception):  # such as KeyboardInterrupt: the process is to end anyway
                raise
        return effects if self.crash.raised is None else None

    def _named(self, event: Received, effects: Sequence[Effect]) -> Sequence[Effect]:
        """Return the effects of an arrival with the request's name in its refusal."""
        state, number = self.core.state, event.request
        if Settle not in map(type, effects):
            return effects
        return [
            with_name(state, effect, event.adapter)
            if isinstance(effect, Settle) and effect.request == number
            else effect
            for effect in effects
        ]

    def _whole(self, effect: Dispatch | Settle) -> Effect:
        """Return an effect whose waits, and the bound of these, count from the arrival at the first replica.

        An answer that ends early has all the tokens that were made.
        """
        if isinstance(effect, Settle) and effect.reason is not None:
            effect = self._made(effect)
        earlier_ns = self.waited_ns.get(effect.request, 0)
        if not earlier_ns:
            return effect
        waited_ns = effect.queue_ns + earlier_ns
        if isinstance(effect, Dispatch):
            return replace(effect, queue_ns=waited_ns)
        bound_ns = None if effect.bound_ns is None else effect.bound_ns + earlier_ns
        return replace(effect, queue_ns=waited_ns, bound_ns=bound_ns)

    def show_endings(self, endings: Sequence[Settle]) -> None:
        """Show endings that the core did not make to the observers of refused requests."""
        self._show(self._of_refused, NoStep(), endings, self._last_ns)

    def _show(self, observers: Sequence[Observer], event: Event, effects: Sequence[Effect], now_ns: int) -> None:
        for observer in observers:
            try:
                observer.observed(event, effects, now_ns)
            except Exception:  # it must not stop the core
                logger.exception("an observer failed on %s", type(event).__name__)

    def _wake_at(self, at_ns: int, now_ns: int) -> None:
        """Post a Tick then. A timer that ends before is left, and set anew at its end: most times are put off again."""
        self._wake_ns = at_ns
        if self._timer is not None:
            if self._timer_ns <= at_ns:
                return
            self._timer.cancel()
        self._timer_ns = at_ns
        delay_s = max(0, at_ns - now_ns) / 1e9 + 0.0005  # after that time, whatever the timer's resolution
        self._timer = self._loop.call_later(delay_s, self._timer_ended)

    def _timer_ended(self) -> None:
        self._timer = None
        if self._timer_ns < self._wake_ns:
            self._wake_at(self._wake_ns, self.clock_ns())
        else:
            self.post(Tick())

    def stop(self) -> None:
        """Take no more events; those still queued are dropped."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
