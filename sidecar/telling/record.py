"""What the live process keeps of one request, and its timeline.

The reasons to wait are looked at several times a second, for all requests of a version at a backend at once. So a
reason that came and went between two looks is missing here; a replay of the journal has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from operator import itemgetter
from typing import Any, NamedTuple

from policies.record import record
from sidecar.core import effects as do
from sidecar.core import events as ev
from sidecar.core.causes import Cause
from sidecar.core.eligibility import Why
from sidecar.core.enums import Voided
from sidecar.telling import saying
from sidecar.telling.endings import told
from sidecar.telling.life import Life
from sidecar.telling.timeline import FIRST_TOKEN, Timeline
from sidecar.telling.waits import because

NOT_LOOKED_AT = "not looked at"
"""The reason of a wait so long ago, or so many changes ago, that it is not kept any more."""
NO_OWNER = "no owner yet"
"""The reason of a wait while a replica is looked for that owns a backend for the request."""
PASSED_ON = "passed on"
"""The reason of a period in which another replica has the request."""


@record(frozen=True, slots=True)
class Note:
    """Since when the requests of a version wait at a backend for a reason, and what is in their way."""

    at_ns: int
    why: Why
    because: str


@record(frozen=True, slots=True)
class News:
    """What happened to a version, or to a backend; `backend` is "" if it concerns all. `load` numbers a load.

    `number` counts what the chronicle has seen: several steps of the core may have the same time.
    """

    number: int
    at_ns: int
    backend: str
    what: str
    text: str
    load: int = 0
    trace: Any = None
    """The trace of the request for which a load was begun."""
    pack_ns: int = 0
    """How long of a fetch was packing."""


@record(frozen=True, slots=True)
class QueuedAgain:
    """An engine failed before the first token, so the request waits again."""


@record(frozen=True, slots=True)
class Unowned:
    """A replica is looked for that owns a backend for the request: it is in no queue."""

    backend: str = ""


@record(frozen=True, slots=True)
class CameBack:
    """This replica's core got the request, after others had it or this one had given it back; `text` says where."""

    text: str


@record(frozen=True, slots=True)
class PassedOn:
    """Another replica, which owns the backend, got the request. `leg` is what `Traced.headers` was asked for."""

    replica: str
    backend: str
    leg: int


@record(frozen=True, slots=True)
class AnswerBegun:
    """The answer has begun of a request that another replica has."""


@record(frozen=True, slots=True)
class GivenBack:
    """The other replica gave the request back before its first token."""

    why: Cause


@record(frozen=True, slots=True)
class PromiseVoided:
    """What the request was promised was seen to be void."""

    why: Voided


@record(frozen=True, slots=True)
class Queued:
    """It was seen in a backend's queue; "" is where requests wait that no backend can take.

    `note` is why it waited there at first, None if nobody looked.
    """

    backend: str
    note: Note | None = None


Happened = (
    ev.Event
    | do.Dispatch
    | do.Settle
    | QueuedAgain
    | Unowned
    | CameBack
    | PassedOn
    | AnswerBegun
    | GivenBack
    | PromiseVoided
    | Queued
)


_IN_PLACES = (Queued, do.Dispatch)


class Entry(NamedTuple):
    """What happened to a request. `number` counts as that of `News`."""

    number: int
    at_ns: int
    what: Happened | News


@dataclass(slots=True)
class Record:
    """One request. Times are monotonic; `utc_ns` is the time of day of its arrival.

    `trace` is its trace, None if it has none. `notes` and `news` are filled in at its end.
    """

    received: ev.Received
    arrived_ns: int
    utc_ns: int
    number: int = 0
    """What the chronicle had counted when it arrived."""
    peer: str = ""
    trace: Any = None
    operation: str = "text_completion"
    waited_ns: int = 0
    """How long it had waited at other replicas before it came to this one."""
    version: str = ""
    ordinal: int = 0
    reserved_tokens: int | None = None
    """What is reserved for it, which is less than it asked for if no engine can generate as much; None if unknown."""
    expires_after_ns: int | None = None
    promised_ns: int | None = None
    arrival: str = "arrived"
    place: str | None = None
    """The backend in whose queue it was seen last; None if it has not been queued."""
    is_voided: bool = False
    is_elsewhere: bool = False
    """True if another replica has it, or has ended it: that one logs and counts its ending."""
    is_carried: bool = False
    """A proxy has carried it to its engine: it has gone the Envoy lane."""
    happened: list[Entry] = field(default_factory=list)
    dispatch: do.Dispatch | None = None
    settle: do.Settle | None = None
    ended_ns: int | None = None
    notes: dict[str, Sequence[Note]] = field(default_factory=dict)
    """By backend."""
    news: Sequence[News] = ()

    @property
    def request(self) -> int:
        return self.received.request

    @property
    def client_id(self) -> str:
        return self.received.client_id

    @property
    def places(self) -> set[str]:
        """The backends in whose queues it was seen, and to which it was sent."""
        return {entry.what.backend for entry in self.happened if isinstance(entry.what, _IN_PLACES)}

    @property
    def first_token_ns(self) -> int | None:
        """When the answer began; None if it did not."""
        return self._last(ev.FirstToken)

    @property
    def sent_ns(self) -> int | None:
        """When it was last sent to an engine; None if it never was."""
        return self._last(do.Dispatch)

    def _last(self, kind: type) -> int | None:
        return next((at_ns for _, at_ns, what in reversed(self.happened) if isinstance(what, kind)), None)

    def entries(self) -> list[Entry]:
        """Return what happened to it, and the news of its version and its backends, in order."""
        news = [Entry(each.number, each.at_ns, each) for each in self.news]
        return sorted([*self.happened, *news], key=itemgetter(0))


class _Telling:
    """Turns a record into a timeline. At any moment the request waits here, or an engine or another replica has it."""

    def __init__(self, record: Record, now_ns: int, hides_others: bool) -> None:
        self._record = record
        self._hides_others = hides_others
        self._until_ns = now_ns if record.ended_ns is None else record.ended_ns
        self._life = Life(record.received, record.arrived_ns)
        line = self._life.timeline
        line.arrived_utc, line.version, line.ordinal = _utc(record.utc_ns), record.version, record.ordinal
        line.expires_after_ns, line.promised_ns = record.expires_after_ns, record.promised_ns
        if record.reserved_tokens is not None:
            line.reserved_tokens = record.reserved_tokens
        self._since_ns = record.arrived_ns
        self._has_it: Queued | Unowned | do.Dispatch | PassedOn | None = Queued("")

    def tell(self) -> Timeline:
        record = self._record
        self._life.moment(record.arrived_ns, "arrived", "arrived" if self._hides_others else record.arrival)
        for _, at_ns, what in record.entries():
            _TOLD.get(type(what), _Telling._own)(self, at_ns, what)
        if record.settle is None:
            self._hand_over(self._until_ns, None)
        self._life.put_in_order()
        return self._life.timeline

    @property
    def _attempt(self) -> int:
        return self._has_it.attempt if isinstance(self._has_it, do.Dispatch) else 0

    def _hand_over(self, at_ns: int, to: Queued | Unowned | do.Dispatch | PassedOn | None) -> None:
        """End the period of who has the request, and say who has it now."""
        had = self._has_it
        if isinstance(had, Queued):
            self._waited(had, self._since_ns, at_ns)
        elif isinstance(had, PassedOn):
            self._life.begin(PASSED_ON, self._since_ns, had.backend, f"replica {had.replica} had it")
            if self._record.is_elsewhere:
                self._life.timeline.notes = [f"replica {had.replica} has the rest of the story: ask it"]
        elif isinstance(had, Unowned):
            self._life.begin(NO_OWNER, self._since_ns, "", "a replica is looked for that owns its backend")
        elif isinstance(had, do.Dispatch) and isinstance(to, Queued):
            self._life.failed(had.backend, self._since_ns, at_ns)
        self._life.end(at_ns)
        self._has_it, self._since_ns = to, at_ns

    def _own(self, at_ns: int, what: ev.Event) -> None:
        self._life.own_event(what, at_ns, self._attempt)

    def _sent(self, at_ns: int, what: do.Dispatch) -> None:
        had = self._has_it
        self._hand_over(at_ns, what)
        waited_in = had.backend if isinstance(had, Queued) and had.note is not None else ""  # else it went at once
        self._life.sent(what, at_ns, "" if self._hides_others else waited_in)

    def _queued(self, at_ns: int, what: Queued) -> None:
        self._hand_over(at_ns, what)
        if what.backend and not self._hides_others:
            self._life.moment(at_ns, "routed", saying.queued(what.backend))

    def _queued_again(self, at_ns: int, what: QueuedAgain) -> None:
        had = self._has_it
        self._hand_over(at_ns, Queued(had.backend if had is not None else ""))
        self._life.moment(at_ns, *saying.QUEUED_AGAIN)

    def _passed_on(self, at_ns: int, what: PassedOn) -> None:
        self._hand_over(at_ns, what)
        self._life.moment(at_ns, "passed_on", f"passed on to replica {what.replica}, which owns {what.backend}")

    def _begun(self, at_ns: int, what: AnswerBegun) -> None:
        self._hand_over(at_ns, None)
        self._life.moment(at_ns, FIRST_TOKEN, "first token")

    def _unowned(self, at_ns: int, what: Unowned) -> None:
        self._hand_over(at_ns, what)

    def _came_back(self, at_ns: int, what: CameBack) -> None:
        self._hand_over(at_ns, Queued(""))
        text = "" if self._hides_others else f", and {what.text}"
        self._life.moment(at_ns, "came_back", f"came back to this replica{text}")

    def _given_back(self, at_ns: int, what: GivenBack) -> None:
        self._hand_over(at_ns, Unowned())
        self._life.moment(at_ns, "given_back", f"given back: {told(what.why)}")

    def _voided(self, at_ns: int, what: PromiseVoided) -> None:
        self._life.voided(what.why, at_ns)

    def _news(self, at_ns: int, what: News) -> None:
        had = self._has_it
        is_standing = what.what == "backend"
        if isinstance(had, Queued | Unowned):
            concerns = what.backend in ("", had.backend) if had.backend else is_standing
        else:
            concerns = isinstance(had, do.Dispatch) and is_standing and what.backend == had.backend
        if concerns and not (self._hides_others and is_standing):
            self._life.moment(at_ns, what.what, what.text)

    def _ended(self, at_ns: int, what: do.Settle) -> None:
        self._hand_over(at_ns, None)
        self._life.ended(what, at_ns, is_told=not self._hides_others)

    def _waited(self, queued: Queued, since_ns: int, until_ns: int) -> None:
        """Add the periods of a wait at one backend. Its own note is the reason at its begin, else the last one before.

        What is noted of its version later says what was in the way when the reason began, for all of its requests.
        """
        if until_ns <= since_ns:
            return
        backend, before, rest = queued.backend, None, []
        for note in self._record.notes.get(backend, ()):
            if note.at_ns <= since_ns:
                before = note
            elif note.at_ns < until_ns:
                rest.append(note)
        first = queued.note or before
        if first is None and rest and rest[0].at_ns - since_ns <= LOOK_LATE_NS:
            first, rest = rest[0], rest[1:]
        reason, because = self._said(first)
        if (reason, backend) != (self._life.reason, self._life.backend):
            self._life.begin(reason, since_ns, backend, because)
        for note in rest:
            reason, because = self._said(note)
            if reason != self._life.reason:
                self._life.begin(reason, note.at_ns, backend, because)

    def _said(self, note: Note | None) -> tuple[str, str]:
        if note is None:
            return NOT_LOOKED_AT, "too much has happened since"
        if not self._hides_others:
            return note.why.value, note.because
        return note.why.value, because(note.why, "its backend", "its adapter")


_TOLD: dict[type, Callable[[_Telling, int, Any], None]] = {
    do.Dispatch: _Telling._sent,
    do.Settle: _Telling._ended,
    QueuedAgain: _Telling._queued_again,
    Queued: _Telling._queued,
    Unowned: _Telling._unowned,
    CameBack: _Telling._came_back,
    PassedOn: _Telling._passed_on,
    AnswerBegun: _Telling._begun,
    GivenBack: _Telling._given_back,
    PromiseVoided: _Telling._voided,
    News: _Telling._news,
}
LOOK_LATE_NS = 1_000_000_000
"""A reason that was seen so soon after a wait began was its reason from the beginning."""


def timeline_of(record: Record, now_ns: int, hides_others: bool = False) -> Timeline:
    """Return a request's timeline until now. With `hides_others` it names no other adapter, request or tenant."""
    return _Telling(record, now_ns, hides_others).tell()


def _utc(utc_ns: int) -> str:
    at = datetime.fromtimestamp(utc_ns / 1e9, UTC)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
