"""Measure what tenants use: seats, slots, bytes of the host store, requests, tokens and loads.

A run uses its seats from its dispatch to its end. A version uses its slots for as long as it is in an engine, and bytes
for as long as it is in the host store: a **stay**. The time of a stay within a period belongs to the tenants that used
the version there, in proportion to their seat time; to nobody if none did. What engines had besides, seats without a
run and slots without a version, is idle time, so that the rows of an engine add up to all that it had.

The meter is told what happens and when, in nanoseconds of a clock that never goes back. It knows no hours: `cut` ends
one period and begins the next.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from policies.record import record

NOBODY, NO_TENANT, OTHERS = "(idle)", "(none)", "(others)"
BASE, UNKNOWN = "(base)", "(unknown)"
OUTCOMES = ("ok", "refused", "expired", "cancelled", "failed")
ROWS_MAX = 20_000
"""Rows of a period. Tenants that come after that share rows: clients may claim any number of tenants."""
ROWS_UNSENT_MAX = ROWS_MAX // 4
"""Beyond so many rows, tenants of which nothing was sent to an engine share rows: they cost who claims them nothing."""

Key = tuple[str, str, str, str]
"""Tenant, adapter, version, backend; "" where there is none."""


def tenant_shown(tenant: str) -> str:
    """Return a tenant's name in rows. No client can choose one of ours: those begin with a parenthesis."""
    if not tenant:
        return NO_TENANT
    return f"\\{tenant}" if tenant[0] in "(\\" else tenant


def tenant_of(shown: str) -> str:
    """Return the tenant of a row's name; OTHERS for those that share one."""
    return "" if shown == NO_TENANT else shown.removeprefix("\\")


@dataclass(slots=True)
class Used:
    """The figures of one row; times are in nanoseconds."""

    requests: dict[str, int] = field(default_factory=dict)
    """By outcome."""
    input_tokens: int = 0
    input_tokens_estimated: int = 0
    output_tokens: int = 0
    output_tokens_estimated: int = 0
    seat_ns: int = 0
    slot_ns: int = 0
    loads: int = 0
    load_bytes: int = 0
    stored_byte_ns: int = 0
    engine_ns: int = 0
    """How long the backend was up; only in the row of its idle time."""

    def copy(self) -> Used:
        return Used(
            dict(self.requests), self.input_tokens, self.input_tokens_estimated, self.output_tokens,
            self.output_tokens_estimated, self.seat_ns, self.slot_ns, self.loads, self.load_bytes,
            self.stored_byte_ns, self.engine_ns,
        )  # fmt: skip


Rows = dict[Key, Used]


@dataclass(slots=True)
class Stay:
    """A version in an engine or in the store, from `since_ns`. `weight` is its slots or its bytes."""

    since_ns: int
    weight: int
    nobody: Key
    """The row of its time if no tenant used it."""
    is_stored: bool
    users: dict[Key, int] = field(default_factory=dict)
    """Seat time by row."""

    def shared(self, until_ns: int) -> list[tuple[Key, int]]:
        """Return what each row gets of the time up to now; the parts add up to it exactly."""
        whole = self.weight * (until_ns - self.since_ns)
        users = dict(self.users)  # one step of the interpreter: the loop may add to it meanwhile
        total = sum(users.values())
        if not total:
            return [(self.nobody, whole)]
        parts, given, counted = [], 0, 0
        for key, seat_ns in users.items():
            counted += seat_ns
            upto = whole * counted // total
            parts.append((key, upto - given))
            given = upto
        return parts


@dataclass(slots=True)
class Run:
    since_ns: int
    sequences: int
    key: Key
    stays: tuple[Hashable, ...]


@dataclass(slots=True)
class Engine:
    """What one backend has, and what of it is in use. It has nothing while it is down or another replica's."""

    since_ns: int
    seats: int = 0
    slots: int = 0
    is_up: bool = False
    seats_used: int = 0
    slots_used: int = 0
    idle_seat_ns: int = 0
    idle_slot_ns: int = 0
    up_ns: int = 0

    def advance(self, now_ns: int) -> None:
        """Count the time up to now. More in use than there is, as after a gauge fell, leaves nothing idle."""
        past_ns = now_ns - self.since_ns
        if self.is_up and past_ns:
            self.up_ns += past_ns
            if self.seats > self.seats_used:
                self.idle_seat_ns += (self.seats - self.seats_used) * past_ns
            if self.slots > self.slots_used:
                self.idle_slot_ns += (self.slots - self.slots_used) * past_ns
        self.since_ns = now_ns


@record(frozen=True, slots=True)
class Snapshot:
    """A period as it was at one moment. `rows` does the work, so that a thread can do it."""

    until_ns: int
    used: list[tuple[Key, Used]]
    stays: list[Stay]
    engines: list[tuple[str, Engine]]

    def rows(self) -> Rows:
        """Return the figures of the period by row."""
        rows = {key: used.copy() for key, used in self.used}
        for stay in self.stays:
            _share(rows, stay, self.until_ns)
        for backend, engine in self.engines:
            if engine.up_ns:
                idle = _row(rows, (NOBODY, "", "", backend))
                idle.seat_ns += engine.idle_seat_ns
                idle.slot_ns += engine.idle_slot_ns
                idle.engine_ns += engine.up_ns
        return rows


class Meter:
    """The figures of the current period. Ids of runs, and of what holds stays, are the caller's."""

    def __init__(self) -> None:
        self.on_use: Callable[[str, int], None] = lambda tenant, seat_ns: None
        """Told of seat time by tenant as it is counted."""
        self._rows: Rows = {}
        self._engines: dict[str, Engine] = {}
        self._runs: dict[Hashable, Run] = {}
        self._stays: dict[Hashable, Stay] = {}

    # What engines have.

    def engine(self, backend: str, seats: int, slots: int, is_up: bool, now_ns: int) -> None:
        """Note what a backend has from now on."""
        engine = self._engine(backend, now_ns)
        engine.seats, engine.slots, engine.is_up = seats, slots, is_up

    def _engine(self, backend: str, now_ns: int) -> Engine:
        engine = self._engines.get(backend)
        if engine is None:
            engine = self._engines[backend] = Engine(now_ns)
        engine.advance(now_ns)
        return engine

    # What is used.

    def began(self, run: Hashable, key: Key, sequences: int, stays: tuple[Hashable, ...], now_ns: int) -> None:
        """Note that a run of so many sequences began. It is a use of `stays`."""
        self._runs[run] = Run(now_ns, sequences, self._known(key), stays)
        self._engine(key[3], now_ns).seats_used += sequences

    def ended(self, run: Hashable, now_ns: int) -> None:
        ended = self._runs.pop(run, None)
        if ended is None:
            return
        self._engine(ended.key[3], now_ns).seats_used -= ended.sequences
        seat_ns = self._use(ended, now_ns)
        _row(self._rows, ended.key).seat_ns += seat_ns

    def lost(self, backend: str, now_ns: int) -> None:
        """Note that all runs of a backend have ended with it."""
        for run in [run for run, begun in self._runs.items() if begun.key[3] == backend]:
            self.ended(run, now_ns)

    def _use(self, run: Run, now_ns: int) -> int:
        """Add a run's time since it was last counted to the stays that it used, and return it."""
        seat_ns = run.sequences * (now_ns - run.since_ns)
        for held in run.stays:
            stay = self._stays.get(held)
            if stay is not None:
                stay.users[run.key] = stay.users.get(run.key, 0) + seat_ns
        run.since_ns = now_ns
        self.on_use(run.key[0], seat_ns)
        return seat_ns

    def came(self, held: Hashable, backend: str, slots: int, key: Key, now_ns: int) -> None:
        """Note that a version takes slots of a backend. `key` is the row of its time if nobody uses it."""
        self._stays[held] = Stay(now_ns, slots, key, is_stored=False)
        self._engine(backend, now_ns).slots_used += slots

    def stored(self, held: Hashable, size_bytes: int, key: Key, now_ns: int) -> None:
        """Note that a version takes bytes of the store."""
        self._stays[held] = Stay(now_ns, size_bytes, key, is_stored=True)

    def gone(self, held: Hashable, now_ns: int) -> None:
        """Note that a version has left its engine or the store.

        A run that goes on, since the engine had lost the version before, counts for the version's next stay.
        """
        stay = self._stays.pop(held, None)
        if stay is None:
            return
        if not stay.is_stored:
            self._engine(stay.nobody[3], now_ns).slots_used -= stay.weight
        _share(self._rows, stay, now_ns)

    # What is counted.

    def settled(
        self, key: Key, outcome: str, tokens: tuple[int, int], are_estimated: tuple[bool, bool] = (False, False)
    ) -> None:
        """Count a request that ended, with the tokens of its prompt and of its answer."""
        used = _row(self._rows, self._known(key))
        used.requests[outcome] = used.requests.get(outcome, 0) + 1
        used.input_tokens += tokens[0]
        used.output_tokens += tokens[1]
        if are_estimated[0]:
            used.input_tokens_estimated += tokens[0]
        if are_estimated[1]:
            used.output_tokens_estimated += tokens[1]

    def loaded(self, key: Key, size_bytes: int) -> None:
        """Count a version that was brought into an engine."""
        used = _row(self._rows, self._known(key))
        used.loads += 1
        used.load_bytes += size_bytes

    def _known(self, key: Key) -> Key:
        """Return the row of a key: its own, or that of all others once there are too many."""
        if key in self._rows or len(self._rows) < (ROWS_MAX if key[3] else ROWS_UNSENT_MAX):
            return key
        return (OTHERS, *key[1:])

    # Periods.

    def snapshot(self, now_ns: int) -> Snapshot:
        """Return the current period up to now."""
        for engine in self._engines.values():
            engine.advance(now_ns)
        for run in self._runs.values():
            _row(self._rows, run.key).seat_ns += self._use(run, now_ns)
        engines = [(name, _as_it_is(engine)) for name, engine in self._engines.items()]
        return Snapshot(now_ns, list(self._rows.items()), list(self._stays.values()), engines)

    def cut(self, now_ns: int) -> Snapshot:
        """Return the current period up to now, and begin the next one."""
        period = self.snapshot(now_ns)
        self._rows = {}
        self._stays = {
            held: Stay(now_ns, stay.weight, stay.nobody, stay.is_stored) for held, stay in self._stays.items()
        }
        for name, engine in list(self._engines.items()):
            engine.idle_seat_ns = engine.idle_slot_ns = engine.up_ns = 0
            if not (engine.is_up or engine.seats_used or engine.slots_used):
                del self._engines[name]
        return period


def _as_it_is(engine: Engine) -> Engine:
    return Engine(
        engine.since_ns, idle_seat_ns=engine.idle_seat_ns, idle_slot_ns=engine.idle_slot_ns, up_ns=engine.up_ns
    )


def _row(rows: Rows, key: Key) -> Used:
    used = rows.get(key)
    if used is None:
        used = rows[key] = Used()
    return used


def _share(rows: Rows, stay: Stay, until_ns: int) -> None:
    for key, amount in stay.shared(until_ns):
        used = _row(rows, key)
        if stay.is_stored:
            used.stored_byte_ns += amount
        else:
            used.slot_ns += amount
