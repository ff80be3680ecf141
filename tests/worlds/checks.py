"""The invariants of every step, whatever fails: the product's promises, seen from outside.

Nothing here reads the core's books, apart from what a request was promised when it was admitted: all is counted from
the events that went in and the effects that came out.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sidecar.core import effects as do
from sidecar.core import events as ev
from sidecar.core.core import Core
from sidecar.core.enums import Outcome, Voided
from sidecar.errors import Reason
from sidecar.lab.sim.setup import SECOND_NS
from sidecar.telling.endings import message_of
from tests.worlds.idling import Idling
from tests.worlds.in_flight import InFlight, Tier
from tests.worlds.scenario import Scenario
from tests.worlds.stalls import Stalls
from tests.worlds.violation import hold

BOOKS_EVERY = 32
HISTORY = 60
LONG_AGO_NS = 120 * SECOND_NS
"""Longer than any run takes: if nothing has moved for so long in peace, nothing will."""

VOIDED_BY: dict[Voided, tuple[str, ...]] = {
    Voided.BACKEND_LOST: ("loss", "small", "stalls"),
    Voided.BACKEND_STALLED: ("loss", "small", "stalls"),
    Voided.MOVED: ("loss", "drain", "operators", "small", "stalls"),
    Voided.NO_BACKEND: ("loss", "drain", "operators", "small", "stalls"),
    Voided.RUN_AGAIN: ("loss", "step", "lies", "small", "queue", "stalls"),
    Voided.ADAPTER_LATE: ("fetch", "operators", "store"),
    Voided.ENGINE_QUEUE_FULL: ("queue",),
    Voided.BACKEND_SLOWED: ("slow", "stalls"),
    Voided.SHARES_CHANGED: ("config",),
    Voided.UNTOLD: ("log",),
}
"""Why a promise may become void, and the kinds of fault that are a cause of it."""
WITHOUT_A_FAULT = Voided.ANSWERS_LONGER
"""A reason that needs none: lengths are random, and where bounds are shrunk two answers are enough to learn them by."""
ENDED_BY: dict[Reason, tuple[str, ...]] = {
    Reason.BACKEND_FAILED: ("loss", "step", "lies", "small", "stalls"),
    Reason.ADAPTER_UNAVAILABLE: ("fetch",),
    Reason.QUARANTINED: ("loss", "step", "stalls"),
    Reason.NO_BACKEND: ("drain",),
    Reason.UNKNOWN_ADAPTER: ("operators",),
    Reason.CANCELLED: ("clients",),
    Reason.UNOBSERVED: ("log",),
    Reason.CLIENT_STALLED: ("clients",),
}
"""Why a request may end without an answer, and the kinds of fault that are a cause of it."""
OF_THE_CLIENT = (Reason.EXPIRED, Reason.DEADLINE_EXCEEDED, Reason.DEADLINE_UNMEETABLE)
"""The endings of clients that would not wait any longer."""


@dataclass
class Client:
    """One request as its client sees it."""

    event: ev.Received
    arrived_ns: int
    in_peace: bool
    attempt: int = 0
    backend: str = ""
    queued_at: str = ""
    """The backend that promised its bound; another may have taken the request over."""
    first_token_ns: int = 0
    bound_ns: int | None = None
    settled: do.Settle | None = None

    @property
    def is_patient(self) -> bool:
        return self.event.deadline_ns is None and self.event.klass == "default"


@dataclass
class Checks:
    """Follows one run and raises Violation. `books` checks the core's own counts from time to time."""

    scenario: Scenario
    books: Callable[[Core], None] = lambda _: None
    coming: ev.Event | None = None
    """The event that the core gets now."""
    steps: int = 0
    moved_ns: int = 0
    peace_ns: int = 0
    """The time at which the faults stopped, or 0 before."""
    served_ns: int = 0
    """The time from which every new request must be answered."""
    voided: dict[Voided, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    nearest_to_bound: float = 0.0
    bounded: int = 0
    unnoticed: dict[int, None] = field(default_factory=dict)
    """Requests whose bound was exceeded because of an undetected fault of their own backend."""
    history: deque[tuple[int, ev.Event, list[do.Effect]]] = field(default_factory=lambda: deque(maxlen=HISTORY))
    clients: dict[int, Client] = field(default_factory=dict)
    waiting: dict[int, None] = field(default_factory=dict)
    """Clients without an ending."""

    def __post_init__(self) -> None:
        config = self.scenario.sidecar.core_config()
        self._digest = hashlib.sha256()
        self._in_flight = InFlight(config.seat_slack)
        self._memory = Tier("host store", config.store_bytes)
        self._disk = Tier("disk", config.disk_bytes)
        self._idling = Idling()
        self.stalls = Stalls()
        self._now_ns = 0
        self._troubles: dict[str, list[tuple[int, int]]] = {name: [] for name in self.scenario.setup.backends}
        self._events: dict[type, Callable[[Any], None]] = {
            ev.FirstToken: self._first_token,
            ev.RunEnded: self._run_ended,
            ev.RunFailed: self._run_ended,
            ev.LoadDone: lambda event: self._in_flight.load_ended(event.load, good=True),
            ev.LoadFailed: lambda event: self._in_flight.load_ended(event.load, good=False),
            ev.BackendAdded: lambda event: self._in_flight.added(event.backend, event.facts),
            ev.BackendUp: lambda event: self._set_down(event.backend, False),
            ev.BackendLost: lambda event: self._in_flight.lost(event.backend),
            ev.DrainSet: self._drain_set,
            ev.Fetched: lambda event: self._memory.came(event.key),
            ev.FetchFailed: lambda event: self._memory.failed(event.key),
            ev.Spilled: lambda event: self._disk.came(event.key),
            ev.SpillFailed: lambda event: self._disk.failed(event.key),
        }
        self._effects: dict[type, Callable[[Any], None]] = {
            do.Fetch: self._fetch,
            do.Drop: self._drop,
            do.Spill: lambda effect: self._disk.coming(effect.key, self._memory.size_bytes(effect.key)),
            do.DropDisk: lambda effect: self._disk.dropped(effect.key),
            do.Load: self._load,
            do.Dispatch: self._dispatch,
            do.CancelRun: self._cancel_run,
            do.Settle: self._settle,
        }

    @property
    def digest(self) -> str:
        """Return a hash over every effect and its time so far."""
        return self._digest.hexdigest()[:16]

    def knows_down(self, backend: str) -> bool:
        """Whether the core has been told that a backend is down."""
        return self._in_flight.backends[backend].down

    def stepped(self, core: Core, event: ev.Event, effects: list[do.Effect], now_ns: int) -> None:
        """Check one step of the core."""
        self.steps += 1
        self._now_ns = now_ns
        self.history.append((now_ns, event, effects))
        self._digest.update(f"{now_ns} {effects!r}\n".encode())
        if isinstance(event, ev.Received):
            self._received(core, event)
        else:
            self._events.get(type(event), _ignored)(event)
        for effect in effects:
            self._effects.get(type(effect), _ignored)(effect)
        self._idling.stepped(core, now_ns)
        self.stalls.stepped(core, event, effects, now_ns)
        if self.steps % BOOKS_EVERY == 0:
            self.books(core)

    def trouble(self, backend: str, for_ns: int) -> None:
        """Note that a backend does worse than promised for a while, without a report."""
        self._troubles[backend].append((self._now_ns, self._now_ns + for_ns))

    def peace(self, now_ns: int, served_ns: int) -> None:
        """Note that the faults have stopped; from `served_ns` on, every new request must be answered."""
        self.peace_ns = self.moved_ns = now_ns
        self.served_ns = served_ns

    def still_moves(self, now_ns: int) -> None:
        """Check, in peace, that something has moved while somebody waited."""
        idle_s = (now_ns - self.moved_ns) / SECOND_NS
        stuck = self.waiting and now_ns - self.moved_ns > LONG_AGO_NS
        hold(not stuck, f"nothing has moved for {idle_s:.0f} s and {len(self.waiting)} wait: {list(self.waiting)[:5]}")

    def ended(self, core: Core) -> None:
        """Check the invariants of the end, when nothing is left to happen."""
        hold(not self.waiting, f"{len(self.waiting)} requests never ended: {list(self.waiting)[:5]}")
        hold(self.voided == core.state.voided, f"{self.voided} promises were void and {core.state.voided} were counted")
        self.books(core)

    # Events.

    def _received(self, core: Core, event: ev.Received) -> None:
        in_peace = bool(self.served_ns) and self._now_ns >= self.served_ns
        client = self.clients[event.request] = Client(event, self._now_ns, in_peace)
        self.waiting[event.request] = None
        self.moved_ns = self._now_ns
        admitted = core.state.requests.get(event.request)
        if admitted is not None and admitted.promise is not None:
            client.queued_at = admitted.backend or ""
            client.bound_ns = admitted.promise.bound_ns

    def _first_token(self, event: ev.FirstToken) -> None:
        client = self.clients[event.request]
        hold(event.attempt == client.attempt, f"request {event.request} hears of attempt {event.attempt}")
        hold(not client.first_token_ns, f"request {event.request} has a second first token")
        client.first_token_ns = self.moved_ns = self._now_ns

    def _run_ended(self, event: ev.RunEnded | ev.RunFailed) -> None:
        client = self.clients[event.request]
        self.moved_ns = self._now_ns
        if client.backend:
            self._in_flight.run_ended(client.backend, event.request, event.attempt)

    def _set_down(self, backend: str, down: bool) -> None:
        self._in_flight.backends[backend].down = down

    def _drain_set(self, event: ev.DrainSet) -> None:
        self._in_flight.backends[event.backend].draining = event.draining

    # Effects.

    def _fetch(self, effect: do.Fetch) -> None:
        hold(not effect.from_disk or self._disk.holds(effect.key), f"{effect.key} is read from disk and is not there")
        self._memory.coming(effect.key, effect.size_bytes)

    def _drop(self, effect: do.Drop) -> None:
        self._memory.dropped(effect.key)

    def _load(self, effect: do.Load) -> None:
        hold(self._memory.holds(effect.packed.key), f"{effect.packed.key} is loaded and is not in the store")
        stalled = [name for name in self._in_flight.backends if self.stalls.stands_still(name, self._now_ns)]
        self._in_flight.load(effect, stalled)

    def _dispatch(self, effect: do.Dispatch) -> None:
        client, request = self.clients[effect.request], effect.request
        hold(client.settled is None, f"request {request} is dispatched after its end")
        hold(not client.first_token_ns, f"request {request} is sent again after a token")
        hold(effect.attempt == client.attempt + 1, f"request {request} skipped an attempt")
        deadline_ns = client.event.deadline_ns
        hold(deadline_ns is None or self._now_ns < deadline_ns, f"request {request} is dispatched after its deadline")
        client.attempt, client.backend = effect.attempt, effect.backend
        self.moved_ns = self._now_ns
        self._in_flight.dispatch(effect, client.event.input_tokens + client.event.output_tokens_max)

    def _cancel_run(self, effect: do.CancelRun) -> None:
        settled = self.clients[effect.request].settled
        hold(settled is not None, f"request {effect.request} is cancelled at {effect.backend} and has no ending")

    def _settle(self, effect: do.Settle) -> None:
        client = self.clients[effect.request]
        hold(client.settled is None, f"request {effect.request} was settled twice")
        client.settled = effect
        self.moved_ns = self._now_ns
        del self.waiting[effect.request]
        label = effect.reason.value if effect.reason else Outcome.OK.value
        self.reasons[label] = self.reasons.get(label, 0) + 1
        self._check_time(client)
        self._check_bound(client, effect)
        self._check_ending(client, effect)

    def _check_time(self, client: Client) -> None:
        """Check that nobody waited longer than the client or the class allows."""
        event = client.event
        limit_ns = self.scenario.sidecar.classes[event.klass].queue_wait_ns_max
        due_ns = event.deadline_ns or (0 if client.attempt else client.arrived_ns + limit_ns)
        late_s = (self._now_ns - due_ns) / SECOND_NS
        hold(not due_ns or late_s <= 0, f"request {event.request} ends {late_s:.3f} s after it had to")

    def _check_bound(self, client: Client, effect: do.Settle) -> None:
        if effect.voided is not None:
            self.voided[effect.voided] = self.voided.get(effect.voided, 0) + 1
            if effect.voided != WITHOUT_A_FAULT:
                self._has_cause(effect, f"a promise is void: {effect.voided.value}", VOIDED_BY.get(effect.voided, ()))
            return
        promised = effect.bound_ns == client.bound_ns or client.bound_ns is None
        hold(promised, f"request {effect.request} was promised {client.bound_ns} ns and then {effect.bound_ns}")
        if effect.bound_ns is None:
            return
        waited_ns = (client.first_token_ns or self._now_ns) - client.arrived_ns
        self.bounded += 1
        if waited_ns > effect.bound_ns and self._was_in_trouble(effect, client):
            self.unnoticed[effect.request] = None
            return
        self.nearest_to_bound = max(self.nearest_to_bound, waited_ns / effect.bound_ns)
        waited = f"request {effect.request} waited {waited_ns / SECOND_NS:.3f} s"
        had = "for its first token" if client.first_token_ns else "for no token"
        hold(waited_ns <= effect.bound_ns, f"{waited} {had}; its bound is {effect.bound_ns / SECOND_NS:.3f} s")

    def _was_in_trouble(self, effect: do.Settle, client: Client) -> bool:
        """Return True if a backend was slow, or dead without being known to be, while a client waited for it."""
        until_ns = client.first_token_ns or self._now_ns
        return any(
            begin_ns < until_ns and client.arrived_ns < end_ns
            for place in {client.queued_at, effect.backend, *self._in_flight.first_loads_at(effect.version)}
            for begin_ns, end_ns in self._troubles.get(place, ())
        )

    def _check_ending(self, client: Client, effect: do.Settle) -> None:
        reason = effect.reason
        if reason is None:
            hold(client.first_token_ns > 0, f"request {effect.request} is answered without a token")
            return
        if reason is Reason.QUEUE_FULL:
            hold(effect.retry_after_ns is not None, f"request {effect.request} is refused and not told when to retry")
            return
        if reason in OF_THE_CLIENT:
            hold(not client.is_patient, f"request {effect.request} of a patient client: {message_of(effect)}")
            return
        self._has_cause(effect, f"{reason.value}: {message_of(effect)}", ENDED_BY.get(reason, ()))
        hold(not client.in_peace, f"request {effect.request} came in peace and ended by {message_of(effect)}")

    def _has_cause(self, effect: do.Settle, what: str, kinds: tuple[str, ...]) -> None:
        caused = any(self.scenario.has(kind) for kind in kinds)
        hold(caused, f"request {effect.request}: {what}, and this seed has no fault that could be the cause")


def _ignored(_: object) -> None:
    """Ignore an event that implies nothing."""
