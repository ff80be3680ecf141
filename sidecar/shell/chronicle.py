"""Keep what each open request has been through, and the same of those that ended lately.

Own events are kept as they come. What several requests share is kept once: the reasons to wait of a version at a
backend, the way of a version to the engines, and what happened to a backend. All of it is bounded.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Reversible, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from operator import attrgetter
from time import monotonic_ns, perf_counter, time_ns
from typing import Any, TypeVar

from policies.views import BASE
from sidecar.backends.api import Ticket, Traced
from sidecar.config.identities import clipped
from sidecar.core import effects as do
from sidecar.core import eligibility
from sidecar.core import events as ev
from sidecar.core.admission import with_name
from sidecar.core.causes import Cause
from sidecar.core.eligibility import Why
from sidecar.core.enums import Phase, Voided
from sidecar.core.facts import version_of_key
from sidecar.core.state import Request, State
from sidecar.errors import Misused, Reason
from sidecar.shell.requests import RequestFacts
from sidecar.telling import saying
from sidecar.telling.asking import Meant, also_an_id_note, asked_for, same_id_note
from sidecar.telling.durations import readable
from sidecar.telling.record import (
    AnswerBegun,
    CameBack,
    Entry,
    GivenBack,
    Happened,
    News,
    Note,
    PassedOn,
    PromiseVoided,
    Queued,
    QueuedAgain,
    Record,
    Unowned,
    timeline_of,
)
from sidecar.telling.timeline import SLOW_NS, Timeline
from sidecar.telling.verdict import silence
from sidecar.telling.waits import in_the_way

logger = logging.getLogger(__name__)

ENDED_MAX = 2_000
"""Requests that are kept after their end."""
NOTES_MAX = 256
"""Changes of the reason that are kept of a version at a backend."""
NEWS_MAX = 64
"""What is kept of a version, and of a backend."""
SUBJECTS_MAX = 10_000
"""Versions at backends whose reasons are kept, and versions with news."""
LOOK_S = 0.25
SHARE_MAX = 0.01
"""The share of a core that looking at reasons may take; with more to look at, looks become rarer."""
SLICE = 100
"""Reasons that are found, and SLICE * 10 requests that are looked at, before other tasks run."""
FRESH_NS = 50_000_000
"""A reason that was asked so lately is not asked for another arrival."""

Key = tuple[str, str]
"""A backend, "" for none, and a version."""
_T = TypeVar("_T", Note, News)


class _Notes(deque[Note]):
    """The reasons of a version at a backend since each began, and what was in the way when it was asked lately."""

    def __init__(self) -> None:
        super().__init__(maxlen=NOTES_MAX)
        self.latest: Note | None = None


class Chronicle:
    """An observer. `ticket_of(number)` returns the ticket of an open request; `on_end` is told of each ending.

    `waited_ns` has how long requests had waited elsewhere when they came.
    """

    def __init__(
        self,
        state: Callable[[], State],
        ticket_of: Callable[[int], Ticket | None],
        clock_ns: Callable[[], int] = monotonic_ns,
        waited_ns: Mapping[int, int] | None = None,
    ) -> None:
        self._waited_ns = {} if waited_ns is None else waited_ns
        self.on_end: list[Callable[[Record], None]] = []
        self.older = "No journal tells of older ones: it needs data_directory and journal.enabled"
        """What tells of requests that are forgotten here."""
        self._state = state
        self._clock_ns = clock_ns
        self._count = 0
        self._ticket_of = ticket_of
        self._open: dict[int, Record] = {}
        self._ended: OrderedDict[int, Record] = OrderedDict()
        self._notes: OrderedDict[Key, _Notes] = OrderedDict()
        self._of_versions: OrderedDict[str, deque[News]] = OrderedDict()
        self._of_backends: OrderedDict[str, deque[News]] = OrderedDict()
        self._loads: dict[int, tuple[do.Load, Traced | None]] = {}
        """The loads that are under way, each with the trace of the request that it is for."""
        self._packed_ns: dict[str, int] = {}

    # Stories.

    def find(self, asked: Meant) -> list[Record]:
        """Return the requests with a number or a client's id, oldest first; notes and news as far as they are known."""
        found = [
            record
            for record in (*self._ended.values(), *self._open.values())
            if record.client_id == asked.client_id or record.request == asked.number
        ]
        for record in found:
            if record.settle is None:
                self._complete(record)
        return sorted(found, key=attrgetter("number"))

    def silence_of(self, record: Record, now_ns: int) -> str:
        """Return that the backend where an open request waits or runs is stalled or quiet; "" if it is neither."""
        place = record.place if record.place is not None or record.dispatch is None else record.dispatch.backend
        backend = None if record.is_elsewhere else self._state().backends.get(place or "")
        return "" if backend is None else silence(backend, now_ns)

    def at_its_engine(self, record: Record, now_ns: int) -> str:
        """Return for how long an engine has had an open request without a token; "" if that is not long."""
        ticket, dispatch = self._ticket_of(record.request), record.dispatch
        if dispatch is None or record.place is not None or record.first_token_ns is not None:
            return ""
        if ticket is not None and ticket.is_whole:
            return ""  # such an answer comes all at once
        sent_ns = next((at_ns for _, at_ns, what in reversed(record.happened) if what is dispatch), now_ns)
        took_ns = now_ns - sent_ns
        return f"{dispatch.backend} has had it for {readable(took_ns)} without a token" if took_ns >= SLOW_NS else ""

    def now_in_the_way(self, record: Record, now_ns: int) -> str:
        """Return what keeps a waiting request now; "" if that is what was in the way when its reason began."""
        request = self._state().requests.get(record.request)
        if request is None or request.running or request.settled or request.backend is None:
            return ""
        why, notes = self._why(request, now_ns), self._notes.get((request.backend, request.version))
        because = in_the_way(self._state(), request, why, now_ns)
        if notes and (notes[-1].why, notes[-1].because) == (why, because):
            return ""
        return f"now {why.value}: {because}"

    # Steps.

    def observed(self, event: ev.Event, effects: Sequence[do.Effect], now_ns: int) -> None:
        self._count += 1
        handler = _EVENTS.get(type(event))
        if handler is not None:
            handler(self, event, now_ns)
        for effect in effects:
            of_effect = _EFFECTS.get(type(effect))
            if of_effect is not None:
                of_effect(self, effect, now_ns, event, effects)

    def _received(self, event: ev.Received, now_ns: int) -> None:
        state, record = self._state(), self._open.get(event.request)
        request = state.requests.get(event.request)
        arrival = saying.arrived(state, request)
        if record is not None:
            self._add(record, now_ns, CameBack(arrival))
        else:
            record = self._open[event.request] = Record(event, now_ns, time_ns(), self._count)
            if (ticket := self._ticket_of(event.request)) is not None:
                record.peer, record.trace = ticket.peer, ticket.trace
                if ticket.facts is not None:
                    record.operation = ticket.facts.operation
            record.arrival, record.waited_ns = arrival, self._waited_ns.get(event.request, 0)
        if request is None:
            return
        record.version, record.ordinal = request.version, request.ordinal
        record.reserved_tokens = request.view.output_tokens_max
        record.expires_after_ns = request.expires_ns - record.arrived_ns
        earlier_ns = request.view.arrived_ns - record.arrived_ns
        record.promised_ns = None if request.promise is None else request.promise.bound_ns + earlier_ns
        self._see_promise(record, request.voided, now_ns)
        if not request.running:
            self._see_in_queue(record, request, now_ns)

    def _own(self, event: Any, now_ns: int) -> None:
        record = self._open.get(event.request)
        if record is not None:
            self._add(record, now_ns, event)

    def _dispatched(self, effect: do.Dispatch, now_ns: int, *_: Any) -> None:
        record = self._open.get(effect.request)
        if record is not None:
            record.dispatch, record.place = effect, None
            ticket = self._ticket_of(effect.request)
            record.is_carried = ticket is not None and ticket.carrier is not None
            self._add(record, now_ns, effect)

    def _settled(self, effect: do.Settle, now_ns: int, *_: Any) -> None:
        if effect.reason is not Reason.NOT_OWNER:  # else it may go on at another replica: see `given_up`
            self._settle(effect, now_ns)

    def given_up(self, effect: do.Settle) -> None:
        """Note that a request ends in this process, but another replica goes on with it."""
        if effect.reason in (Reason.NOT_OWNER, Reason.CRASHED):
            if (record := self._open.get(effect.request)) is not None:
                record.is_elsewhere = True
            self._settle(effect, self._clock_ns())

    def _settle(self, effect: do.Settle, now_ns: int) -> None:
        record = self._open.get(effect.request)
        if record is not None:
            record.version = record.version or effect.version
            self._end(record, effect, now_ns)

    def _end(self, record: Record, settle: do.Settle, now_ns: int) -> None:
        self._see_promise(record, settle.voided, now_ns)
        record.settle, record.ended_ns = settle, now_ns
        self._add(record, now_ns, settle)
        self._complete(record)
        self._ended[record.request] = self._open.pop(record.request)
        if len(self._ended) > ENDED_MAX:
            self._ended.popitem(last=False)
        for told in self.on_end:
            told(record)

    def _run_failed(self, event: ev.RunFailed, now_ns: int) -> None:
        self._own(event, now_ns)
        record = self._open.get(event.request)
        if record is not None and record.dispatch is not None:
            self._look_after(record.dispatch.backend, now_ns, (record,))

    def _look_after(self, backend: str, now_ns: int, failed: Iterable[Record] = ()) -> None:
        """Look at where requests are after an engine's failure: at all of them, if the engine is lost by it."""
        known = self._state().backends.get(backend)
        if known is None or known.phase is Phase.DOWN or not known.owned:
            failed = self._open.values()
        self._look_at_requests(failed, now_ns)

    def _look_at_requests(self, records: Iterable[Record], now_ns: int) -> None:
        """Note which requests were sent in vain, and in whose queue each waits."""
        requests = self._state().requests
        for record in records:
            request = requests.get(record.request)
            if request is None or request.settled:
                continue
            self._see_promise(record, request.voided, now_ns)
            if self._has_failed(record, request):
                self._add(record, now_ns, QueuedAgain())
            if not request.running:  # else it was sent again in this very step
                self._see_in_queue(record, request, now_ns)

    def _has_failed(self, record: Record, request: Request) -> bool:
        """Return True if its last dispatch was in vain, which was not noted yet."""
        dispatch = record.dispatch
        if dispatch is None or record.place is not None:
            return False
        return request.attempt != dispatch.attempt or not request.running

    def _see_in_queue(self, record: Record, request: Request, now_ns: int) -> None:
        """Note in whose queue a request waits, if that is new, and why it waits there."""
        place = request.backend or ""
        if place != record.place:
            record.place = place
            self._add(record, now_ns, Queued(place, self._note(request, now_ns)))

    def _see_promise(self, record: Record, voided: Voided | None, now_ns: int) -> None:
        if voided is not None and not record.is_voided:
            record.is_voided = True
            self._add(record, now_ns, PromiseVoided(voided))

    def _add(self, record: Record, now_ns: int, what: Happened) -> None:
        self._count += 1
        record.happened.append(Entry(self._count, now_ns, what))

    # The way of a version, and what happens to backends.

    def packed(self, key: str, pack_ns: int) -> None:
        """Note how long the packing took of a fetch that is about to end."""
        self._packed_ns[key] = pack_ns

    def _fetched(self, event: ev.Fetched, now_ns: int) -> None:
        news = self._news(now_ns, "", *saying.FETCHED)
        self._tell(version_of_key(event.key), replace(news, pack_ns=self._packed_ns.pop(event.key, 0)))

    def _fetch_failed(self, event: ev.FetchFailed, now_ns: int) -> None:
        self._tell(version_of_key(event.key), self._news(now_ns, "", *saying.fetch_failed(event)))

    def _load_done(self, event: ev.LoadDone, now_ns: int) -> None:
        load, trace = self._loads.pop(event.load, (None, None))
        if load is not None:
            told = saying.loaded(event, load.backend)
            self._tell(load.digest, self._news(now_ns, load.backend, *told, load=event.load, trace=trace))

    def _load_failed(self, event: ev.LoadFailed, now_ns: int) -> None:
        load, trace = self._loads.pop(event.load, (None, None))
        if load is not None:
            told = saying.load_failed(event)
            self._tell(load.digest, self._news(now_ns, load.backend, *told, load=event.load, trace=trace))
            self._look_after(load.backend, now_ns)

    def _standing(self, event: saying.Standing, now_ns: int) -> None:
        news = self._of_backends.setdefault(event.backend, deque(maxlen=NEWS_MAX))
        self._of_backends.move_to_end(event.backend)
        if len(self._of_backends) > SUBJECTS_MAX:  # backends that have left are kept, too
            self._of_backends.popitem(last=False)
        news.append(self._news(now_ns, event.backend, *saying.standing(event)))
        if isinstance(event, ev.DrainSet | ev.BackendLeaving):
            self._routed_anew(event, now_ns)
        else:
            self._begins_anew(event, now_ns)

    def _routed_anew(self, event: ev.Event, now_ns: int) -> None:
        """See who has moved at once: the next look may be half a minute away where many wait."""
        self._look_at_requests(self._open.values(), now_ns)

    def _begins_anew(
        self, event: ev.BackendUp | ev.BackendLost | ev.BackendGivenUp | ev.BackendRemoved, now_ns: int
    ) -> None:
        """Forget a backend's loads, which end with it without an event of their own, and see who has moved."""
        for load in [load for load, (effect, _) in self._loads.items() if effect.backend == event.backend]:
            del self._loads[load]
        self._routed_anew(event, now_ns)

    def _fetch(self, effect: do.Fetch, now_ns: int, event: ev.Event, effects: Sequence[do.Effect]) -> None:
        dropped = sum(isinstance(other, do.Drop) for other in effects)
        self._tell(effect.digest, self._news(now_ns, "", *saying.fetch(effect, dropped)), effect.key)

    def _drop(self, effect: do.Drop, now_ns: int, *_: Any) -> None:
        version = version_of_key(effect.key)
        if version in self._of_versions:
            self._tell(version, self._news(now_ns, "", *saying.DROPPED))

    def _load(self, effect: do.Load, now_ns: int, *_: Any) -> None:
        backend = self._state().backends.get(effect.backend)
        queue = None if backend is None else backend.queued_by_version.get(effect.digest)
        first = () if queue is None else queue.first_few(SLICE)
        known = [record for number in first if (record := self._open.get(number)) is not None]
        self._look_at_requests(known, now_ns)  # they may have come from another backend in this step
        trace = next((each.trace for each in known if each.trace is not None and each.trace.is_sampled), None)
        self._loads[effect.load] = effect, trace
        self._tell(
            effect.digest, self._news(now_ns, effect.backend, *saying.load(effect), load=effect.load, trace=trace)
        )

    def _heal(self, effect: do.Heal, now_ns: int, event: ev.Event, effects: Sequence[do.Effect]) -> None:
        if effect.version != BASE and not isinstance(event, ev.LoadFailed):
            self._tell(effect.version, self._news(now_ns, effect.backend, *saying.heal(effect)))

    def _quarantine(self, effect: do.Quarantine, now_ns: int, *_: Any) -> None:
        self._tell(effect.digest, self._news(now_ns, "", *saying.quarantine(effect)))

    def _news(self, now_ns: int, backend: str, what: str, text: str, load: int = 0, trace: Any = None) -> News:
        self._count += 1
        return News(self._count, now_ns, backend, what, text, load, trace)

    def _tell(self, version: str, news: News, key: str = "") -> None:
        version = version_of_key(key) or version
        held = self._of_versions.get(version)
        if held is None:
            held = self._of_versions[version] = deque(maxlen=NEWS_MAX)
            if len(self._of_versions) > SUBJECTS_MAX:
                self._of_versions.popitem(last=False)
        held.append(news)
        for backend in (news.backend,) if news.backend else tuple(self._state().backends):
            self._look_at_queue(backend, version, news.at_ns)

    # Reasons.

    def _note(self, request: Request, now_ns: int) -> Note:
        """Return why a request waits that was just queued: what is known of its version there, if that is fresh."""
        state = self._state()
        key = request.backend or "", request.version
        notes = self._notes_of(key)
        backend = state.backends.get(key[0])
        is_first = backend is None or len(backend.queued_by_version.get(key[1], ())) <= 1
        if is_first or notes.latest is None or now_ns - notes.latest.at_ns >= FRESH_NS:
            why = self._why(request, now_ns)
            notes.latest = Note(now_ns, why, in_the_way(state, request, why, now_ns))
            if is_first or not notes or notes[-1].why is not why:
                notes.append(notes.latest)
        return notes.latest

    def _notes_of(self, key: Key) -> _Notes:
        notes = self._notes.get(key)
        if notes is None:
            notes = self._notes[key] = _Notes()
            if len(self._notes) > SUBJECTS_MAX:
                self._notes.popitem(last=False)
        return notes

    def _look_at(self, notes: _Notes, request: Request, now_ns: int) -> None:
        why = self._why(request, now_ns)
        if not notes or notes[-1].why is not why:
            notes.latest = Note(now_ns, why, in_the_way(self._state(), request, why, now_ns))
            notes.append(notes.latest)

    def _why(self, request: Request, now_ns: int) -> Why:
        return Why.BACKEND_DOWN if request.backend is None else eligibility.why_waiting(self._state(), request, now_ns)

    async def watch(self) -> None:
        """Look at the reasons again and again, a slice at a time, for ever."""
        while True:
            spent_s = 0.0
            try:
                spent_s = await self._look()
            except Exception:  # stories would else know no reason from then on
                logger.exception("looking at why requests wait failed; it is tried again")
            await asyncio.sleep(max(LOOK_S, spent_s / SHARE_MAX))

    async def _look(self) -> float:
        """Look at everything, and return the seconds that it took."""
        spent_s = 0.0
        for look in self.looks():
            begun_s = perf_counter()
            look()
            spent_s += perf_counter() - begun_s
            await asyncio.sleep(0)
        return spent_s

    def looks(self) -> Iterator[Callable[[], None]]:
        """Yield looks at where each request waits, and at the reason of each version at each backend: a slice each."""
        state = self._state()
        for some in _slices(list(self._open.values()), SLICE * 10):
            yield partial(self._look_at_requests, some, self._clock_ns())
        keys = [(backend.id, version) for backend in state.backends.values() for version in backend.queued_by_version]
        keys += dict.fromkeys(("", state.requests[number].version) for number in state.unrouted)
        for some_keys in _slices(keys, SLICE):
            yield partial(self._look_at_reasons, some_keys)

    def _look_at_reasons(self, keys: Sequence[Key]) -> None:
        state, now_ns = self._state(), self._clock_ns()
        unrouted: dict[str, int] = {}
        if any(not backend for backend, _ in keys):
            for number in state.unrouted:
                unrouted.setdefault(state.requests[number].version, number)
        for backend, version in keys:
            if backend:
                self._look_at_queue(backend, version, now_ns)
            elif (first := unrouted.get(version)) is not None:
                self._look_at(self._notes_of((backend, version)), state.requests[first], now_ns)

    def _look_at_queue(self, backend: str, version: str, now_ns: int) -> None:
        """Look at why a version waits at a backend; the first of its requests stands for all."""
        state = self._state()
        queue = state.backends[backend].queued_by_version.get(version) if backend in state.backends else None
        if queue:
            self._look_at(self._notes_of((backend, version)), state.requests[queue.first()], now_ns)

    # Requests that other replicas answer.

    def leaves(self, ticket: Ticket, facts: RequestFacts) -> None:
        """Note that another replica is looked for, for a request that is not, or no longer, in this replica's core."""
        number, now_ns = ticket.request, self._clock_ns()
        record = self._open.get(number)
        if record is None:
            received = facts.received(number, None, ticket.client_id)
            record = Record(received, now_ns, time_ns(), self._count, ticket.peer, ticket.trace, facts.operation)
            self._open[number] = record
        elif record.dispatch is not None and record.place is None:
            self._add(record, now_ns, QueuedAgain())
        self._add(record, now_ns, Unowned())
        record.dispatch = record.place = None

    def passed_on(self, ticket: Ticket, backend: str, replica: str) -> int:
        """Note that a replica gets a request. Return the number of this leg, for `Traced.headers`."""
        record = self._open.get(ticket.request)
        if record is None:
            return -1
        leg = -1 - sum(isinstance(entry.what, PassedOn) for entry in record.happened)
        record.is_elsewhere = True
        self._add(record, self._clock_ns(), PassedOn(replica, backend, leg))
        return leg

    def begun_elsewhere(self, ticket: Ticket) -> None:
        """Note that the answer of a request has begun which another replica has."""
        if (record := self._open.get(ticket.request)) is not None:
            self._add(record, self._clock_ns(), AnswerBegun())

    def given_back(self, ticket: Ticket, why: Cause) -> None:
        if (record := self._open.get(ticket.request)) is not None:
            record.is_elsewhere = False
            self._add(record, self._clock_ns(), GivenBack(why))

    def renumbered(self, old: int, new: int) -> None:
        """Note that this replica's core gets a request under a new number."""
        if (record := self._open.pop(old, None)) is not None:
            record.received = replace(record.received, request=new)
            self._open[new] = record

    def ended_here(self, ticket: Ticket) -> None:
        """Note the ending that this replica has given a request which was passed on."""
        if (record := self._open.get(ticket.request)) is not None:
            record.is_elsewhere = False
        self.ended_elsewhere(ticket)

    def ended_elsewhere(self, ticket: Ticket) -> None:
        """Note the ending of a request that another replica had."""
        record = self._open.get(ticket.request)
        if record is not None and ticket.settled is not None:
            record.dispatch = ticket.dispatch
            record.is_carried = ticket.dispatch is not None and ticket.carrier is not None
            settled = with_name(self._state(), ticket.settled, record.received.adapter)
            self._end(record, settled, monotonic_ns())

    # What is known of a request.

    def _complete(self, record: Record) -> None:
        """Add the reasons and the news of the time that it waited."""
        since_ns, places = record.arrived_ns, record.places
        record.notes = {
            backend: _since(self._notes.get((backend, record.version), ()), since_ns, 1) for backend in places
        }
        news = [_since(self._of_versions.get(record.version, ()), since_ns)] if places else []
        if "" in places:
            places.update(self._of_backends)
        news += [_since(self._of_backends.get(backend, ()), since_ns) for backend in places]
        since = [each for told in news for each in told if each.number > record.number]
        record.news = tuple(sorted(since, key=attrgetter("number"))) if since else ()


def story(chronicle: Chronicle, text: str, now_ns: int, tenant: str | None = None) -> Timeline:
    """Return the timeline of the request that `text` names, for who is confined to a tenant, and name others like it.

    Raises Misused(UNKNOWN_REQUEST).
    """
    asked = asked_for(text)
    found = [record for record in chronicle.find(asked) if tenant is None or record.received.tenant == tenant]
    if not found:
        raise Misused(
            Reason.UNKNOWN_REQUEST,
            f'no request "{clipped(text)}" is known here: it came before the last start, was refused at the door, '
            f"ended more than {ENDED_MAX} requests ago, or came to another replica. {chronicle.older}",
        )
    told = next((record for record in found if record.request == asked.number), found[-1])
    others = [str(record.request) for record in found if record is not told]
    timeline = timeline_of(told, now_ns, hides_others=tenant is not None)
    if timeline.ended_ns is None:
        timeline.notes.append("it has not ended")
        now = "" if tenant is not None else chronicle.now_in_the_way(told, now_ns)
        at_engine = "" if tenant is not None else chronicle.at_its_engine(told, now_ns)
        timeline.notes += filter(None, (at_engine, chronicle.silence_of(told, now_ns), now))
    if told.request == asked.number:
        note = also_an_id_note(text, others)
    else:
        note = same_id_note(asked.client_id or "", [*others, str(told.request)])
    timeline.notes += [note] if note else []
    return timeline


def _since(held: Reversible[_T], since_ns: int, before: int = 0) -> tuple[_T, ...]:
    """Return what was noted from a time on, and so many before it."""
    found: list[_T] = []
    for each in reversed(held):
        if each.at_ns < since_ns:
            before -= 1
            if before < 0:
                break
        found.append(each)
    return tuple(reversed(found)) if found else ()


def _slices(what: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    each = iter(what)
    while slice_ := list(islice(each, size)):
        yield slice_


_EVENTS: dict[type, Callable[[Chronicle, Any, int], None]] = {
    ev.Received: Chronicle._received,
    ev.FirstToken: Chronicle._own,
    ev.RunFailed: Chronicle._run_failed,
    ev.ClientLeft: Chronicle._own,
    ev.ClientStalled: Chronicle._own,
    ev.Fetched: Chronicle._fetched,
    ev.FetchFailed: Chronicle._fetch_failed,
    ev.LoadDone: Chronicle._load_done,
    ev.LoadFailed: Chronicle._load_failed,
    ev.BackendUp: Chronicle._standing,
    ev.BackendLost: Chronicle._standing,
    ev.DrainSet: Chronicle._standing,
    ev.BackendLeaving: Chronicle._standing,
    ev.BackendTaken: Chronicle._routed_anew,
    ev.ConfigChanged: Chronicle._routed_anew,
    ev.BackendGivenUp: Chronicle._begins_anew,
    ev.BackendRemoved: Chronicle._standing,
}
_EFFECTS: dict[type, Callable[..., None]] = {
    do.Fetch: Chronicle._fetch,
    do.Drop: Chronicle._drop,
    do.Load: Chronicle._load,
    do.Dispatch: Chronicle._dispatched,
    do.Settle: Chronicle._settled,
    do.Heal: Chronicle._heal,
    do.Quarantine: Chronicle._quarantine,
}
