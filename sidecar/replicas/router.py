"""Route each request of this replica to its own core, or to the replica that owns the backend."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from math import inf
from time import monotonic

from sidecar.backends.api import Ticket
from sidecar.core import admission, causes
from sidecar.core.causes import Cause, Declined
from sidecar.errors import Reason, Refused
from sidecar.replicas.board import JOINING, SERVING, Board
from sidecar.replicas.call import ForwardCall
from sidecar.replicas.forwarding import Forward, GivenBack, Owner
from sidecar.shell.gateway import Gateway
from sidecar.shell.requests import PassedOn, RequestFacts

OWNERS_ENDED_MAX = 2
"""A request is given up after so many replicas ended with it."""


class Verdict(Enum):
    """What to do with a request that was given back."""

    GO = "it may be sent to an owner"
    WAIT = "it is not known yet whether its owners are dead"
    POISONOUS = "it may have crashed its owners"
    ENOUGH = "several owners crashed on other requests; the client decides whether to repeat it"


@dataclass
class Suspicion:
    """The owners that one request may have crashed, in order, and those that crashed on other requests.

    A request that may have crashed two replicas is not sent to a third. A replica whose core raises reports the
    request, so that all others are cleared. If a replica is killed, neither the cause nor, at first, the death is
    known: only requests that it had just worked on (`forwarding.SUSPECT_S`) are suspected. It counts as dead if its
    connection broke off, it is no longer a member, and it has reported nothing since. A replica that was only cut off
    reports again or stays a member; one that drains says so.

    `silent` maps owners that broke off to the time; `failed` lists those that reported a crash.
    """

    silent: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    failed_on_others: set[str] = field(default_factory=set)

    def given_back(self, owner: str, given: GivenBack, now_s: float) -> None:
        """Note how an owner gave the request back.

        A failed owner may get the request again before all replicas know, but counts once. An owner that reports again
        and breaks off again is suspected anew.
        """
        if given.owner is Owner.FAILED_ON_ANOTHER:
            self.failed_on_others.add(owner)
        if owner in self.failed or owner in self.failed_on_others:
            self.silent.pop(owner, None)
        elif given.owner is Owner.FAILED:
            self.silent.pop(owner, None)
            self.failed.append(owner)
        elif given.owner is Owner.SILENT:
            self.silent[owner] = now_s

    @property
    def suspected_of(self) -> tuple[str, ...]:
        """The owners that the request may have crashed."""
        return (*self.failed, *self.silent)

    def verdict(self, board: Board, is_member: Callable[[str], bool]) -> Verdict:
        """Return the verdict as of now. It is WAIT while a silent owner is a member.

        A member that vanished only for a while, as when Redis loses its data, comes back.
        """
        for owner, since_s in list(self.silent.items()):
            if board.reported_s.get(owner, -inf) > since_s:
                del self.silent[owner]
        if len(self.suspected_of) >= OWNERS_ENDED_MAX:
            there = sum(is_member(owner) for owner in self.silent)
            return Verdict.POISONOUS if len(self.suspected_of) - there >= OWNERS_ENDED_MAX else Verdict.WAIT
        return Verdict.ENOUGH if len(self.failed_on_others) >= OWNERS_ENDED_MAX else Verdict.GO


logger = logging.getLogger(__name__)

AGAIN_S, AGAIN_S_MAX = 0.02, 0.5
"""The pause between two attempts to find an owner, which grows."""
LEAVING_S = 5.0
"""How long a draining replica looks for an owner: if all replicas leave, there will be none."""


@dataclass
class Trip:
    """The routing state of a request: when it came, and until when an owner is looked for."""

    facts: RequestFacts
    came_s: float
    until_s: float
    task: asyncio.Task[None] | None = None
    why: Cause = field(default_factory=causes.NoOwner)
    """Why the last owner gave it back, or none has it."""
    backend: str = ""
    """The backend that it waits for in our own core."""
    moves: int = 0
    """How many times it was taken back from an engine that was down."""
    suspicion: Suspicion = field(default_factory=Suspicion)

    def facts_now(self, backend: str | None = None) -> RequestFacts:
        """Return the request's facts now: how long it has waited, the rest of the deadline, and its backend if any."""
        waited_s, left_s = monotonic() - self.came_s, self.facts.deadline_s
        return replace(
            self.facts,
            only=self.facts.only if backend is None else (backend,),
            deadline_s=None if left_s is None else max(0.0, left_s - waited_s),
            waited_ns=int(waited_s * 1e9),
        )


class Router:
    """Routes the requests of one replica among several (implements `shell.requests.Elsewhere`).

    `forward_call` returns the Forward call to a member for a request of so many bytes, or None for an unknown member.
    `may_dispatch` returns True if a backend's lease holds now, `is_member` if a replica is still a member.
    """

    def __init__(
        self,
        gateway: Gateway,
        board: Board,
        member: str,
        forward_call: Callable[[str, int], ForwardCall | None],
        may_dispatch: Callable[[str], bool],
        is_member: Callable[[str], bool],
    ) -> None:
        self.may_dispatch = may_dispatch
        self._is_member = is_member
        self.forwards = 0
        self.reroutes = 0
        self.unowned = 0
        self._forwards: dict[Ticket, Forward] = {}
        self._drains_since_s = inf
        self._gateway = gateway
        self._board = board
        self._member = member
        self._forward_call = forward_call

    def submit(self, ticket: Ticket, facts: RequestFacts) -> None:
        """Route a request. Our own core refuses one that names an unknown adapter or comes too late."""
        now_s = monotonic()
        classes = self._gateway.state.config.classes
        patience_s = classes[facts.klass].queue_wait_ns_max / 1e9 if facts.klass in classes else 0.0
        if facts.deadline_s is not None:
            patience_s = min(patience_s, facts.deadline_s)
        trip = Trip(facts, now_s, now_s + patience_s)
        backend = None if self._gateway.state.draining else self._pick(facts)
        if backend is None:
            ticket.trip = trip  # a backend that is discovered later may belong to another replica
            self._gateway.admit(ticket, facts)
        elif self._board.owner_of(backend) == self._member:
            ticket.trip = trip
            trip.backend = backend
            self._gateway.admit(ticket, replace(facts, only=(backend,)))
        else:
            ticket.trip = trip
            self._start_forwarding(ticket, trip)

    @property
    def takes_requests(self) -> bool:
        return any(known.report.state in (SERVING, JOINING) for known in self._board.standings.values())

    def serves(self, backend: str) -> bool:
        known = self._board.standings.get(backend)
        return known is not None and known.report.state in (SERVING, JOINING)

    def given_back(self, ticket: Ticket) -> bool:
        if ticket.trip is None:
            return False
        ticket.dispatch, ticket.dispatched_ns = None, 0
        self._start_forwarding(ticket, ticket.trip, AGAIN_S)
        return True

    def end(self, ticket: Ticket, reason: Reason, cause: Cause) -> bool:
        trip: Trip | None = ticket.trip
        if trip is None or trip.task is None:
            return False
        trip.task.cancel()
        if ticket.settled is not None:
            return True
        is_whole = ticket.came is not None and ticket.came.final  # only the owner's word of the ending is missing
        how: tuple[Reason | None, Cause | None] = (None, None) if is_whole else (reason, cause)
        forward = self._forwards.get(ticket)
        if forward is not None and (is_whole or reason is Reason.CANCELLED):
            ending = self._gateway.ending_of(ticket, trip.facts_now(), *how, forward.backend)
            ticket.settle(ending)  # the owner counts it
            return True
        if forward is not None:
            forward.leave()
        self._gateway.end_here(ticket, trip.facts_now(), *how)
        return True

    def passed_on(self) -> Iterator[PassedOn]:
        for ticket in self._gateway.tickets.values():
            trip: Trip | None = ticket.trip
            if trip is not None and trip.task is not None and ticket.settled is None:
                forward = self._forwards.get(ticket)
                place = ("", "") if forward is None else (forward.owner, forward.backend)
                yield PassedOn(ticket, trip.facts, monotonic() - trip.came_s, *place)

    def ended_with(self, ticket: Ticket) -> Sequence[str]:
        trip: Trip | None = ticket.trip
        return () if trip is None else trip.suspicion.suspected_of

    def abandon(self) -> None:
        for ticket in list(self._gateway.tickets.values()):
            trip: Trip | None = ticket.trip
            if trip is not None and trip.task is not None:
                trip.task.cancel()

    def _start_forwarding(self, ticket: Ticket, trip: Trip, after_s: float = 0.0) -> None:
        chronicle = self._gateway.chronicle
        chronicle.leaves(ticket, trip.facts)
        trip.task = asyncio.create_task(self._forward_or_fail(ticket, trip, after_s))
        # A callback, for a task that is cancelled before it began runs nothing of its own.
        trip.task.add_done_callback(lambda _: chronicle.ended_elsewhere(ticket))

    async def _forward_or_fail(self, ticket: Ticket, trip: Trip, after_s: float) -> None:
        try:
            await self._until_answered(ticket, trip, after_s)
        except Exception as error:
            broken = "request %s (id %s) broke on its way to another replica"
            logger.exception(broken, ticket.request, ticket.client_id)
            if ticket.settled is None:
                self._gateway.end_here(ticket, trip.facts_now(), Reason.BACKEND_FAILED, causes.Broken(str(error)))

    async def _until_answered(self, ticket: Ticket, trip: Trip, after_s: float) -> None:
        """Forward a request to one owner after another until one keeps it or the time is up."""
        pause_s = AGAIN_S
        await asyncio.sleep(after_s)
        while True:
            verdict = trip.suspicion.verdict(self._board, self._is_member)
            if verdict is Verdict.POISONOUS:
                cause = causes.Poisonous(ticket.client_id[:128], tuple(trip.suspicion.suspected_of))
                self._gateway.end_here(ticket, trip.facts_now(), Reason.POISONOUS, cause)
                return
            if verdict is Verdict.ENOUGH:
                self._gateway.end_here(ticket, trip.facts_now(), Reason.CRASHED, trip.why)
                return
            backend = self._pick(trip.facts)
            owner = None if backend is None or verdict is Verdict.WAIT else self._board.owner_of(backend)
            if backend is None or owner == self._member:
                self._admit_again(ticket, trip, backend)
                return
            call = None if owner is None else self._forward_call(owner, trip.facts.size_bytes)
            if owner is not None and call is not None:
                self.forwards += 1
                leg = self._gateway.chronicle.passed_on(ticket, backend, owner)
                forward = Forward(ticket, trip.facts_now(backend), backend, owner, self._gateway, leg)
                given = await self._forward_once(ticket, forward, call)
                if given is None:
                    return
                trip.why, ticket.dispatch, ticket.dispatched_ns = given.why, None, 0
                self._gateway.chronicle.given_back(ticket, given.why)
                trip.suspicion.given_back(owner, given, monotonic())
                self.reroutes += 1
            if self._is_over(trip):
                break
            await asyncio.sleep(min(pause_s, max(0.0, trip.until_s - monotonic())))
            pause_s = min(AGAIN_S_MAX, 2 * pause_s)
        self.unowned += 1
        self._gateway.end_here(ticket, trip.facts_now(), Reason.NOT_OWNER, causes.Unowned(backend, trip.why), backend)

    async def _forward_once(self, ticket: Ticket, forward: Forward, call: ForwardCall) -> GivenBack | None:
        self._forwards[ticket] = forward
        try:
            return await forward.run(call, self._member)
        finally:
            del self._forwards[ticket]

    def gone(self, member: str) -> None:
        """Take back the requests that a former member has not begun to answer."""
        for forward in self._forwards.values():
            if forward.owner == member:
                forward.take_back(causes.NoMember(member))

    def look(self) -> None:
        """Move requests that wait for an engine that is down to a serving one.

        The number of moves of a request is limited, because it may be the cause; leaving a draining engine does not
        count.
        """
        if all(self._board.is_up(backend) for backend in self._gateway.state.backends):
            return  # nearly always true, and there may be many tickets
        for ticket in list(self._gateway.tickets.values()):
            trip: Trip | None = ticket.trip
            if trip is None or ticket.settled is not None:
                continue
            forward = self._forwards.get(ticket)
            if forward is not None and self._may_move(trip, forward.backend):
                forward.take_back(causes.BackendDown(forward.backend))
            elif ticket.request in self._gateway.state.unrouted and self._may_move(trip, trip.backend):
                self._gateway.withdraw(ticket)
                self._start_forwarding(ticket, trip)

    def _may_move(self, trip: Trip, backend: str) -> bool:
        """Return True if a request must leave a backend. Counts the move if the request may be why it is down."""
        is_fault = bool(backend) and not self._board.drains(backend)
        if self._board.is_up(backend) or (is_fault and trip.moves + 1 >= self._gateway.state.config.visits_max):
            return False
        other = self._pick(trip.facts)
        if other is None or not self._board.is_up(other):
            return False
        trip.moves += is_fault
        return True

    def _is_over(self, trip: Trip) -> bool:
        """Return True if the time to look for an owner is up."""
        now_s = monotonic()
        if self._gateway.state.draining:
            self._drains_since_s = min(self._drains_since_s, now_s)
        return now_s >= min(trip.until_s, self._drains_since_s + LEAVING_S)

    def _admit_again(self, ticket: Ticket, trip: Trip, backend: str | None) -> None:
        """Submit the request to our own core."""
        trip.task = None
        trip.backend = backend or ""
        try:
            self._gateway.admit_again(ticket, trip.facts_now(backend))
        except Refused as refused:
            # The driver has counted it.
            ticket.settle(
                self._gateway.ending_of(ticket, trip.facts_now(), refused.reason, causes.Said(refused.message))
            )

    def _pick(self, facts: RequestFacts) -> str | None:
        """Return the backend for a request, or None if our own core must refuse or hold it."""
        try:
            version, places = admission.places(self._gateway.state, facts.received(0, None))
        except Declined:
            return None
        backends = [place.id for place in places]
        return self._board.pick(version, backends, monotonic()) if backends else None
