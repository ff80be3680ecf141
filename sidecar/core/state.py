"""All that the core remembers. Records refer to each other by id, so a snapshot is a walk over dataclasses."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from policies.id_queue import IdQueue
from policies.views import BASE, Ordering, Prefetch, Promise, Routing, Waiting
from sidecar.core.config import CoreConfig
from sidecar.core.enums import Cache, Phase, Voided
from sidecar.core.facts import BASE_PACKED, Adapter, EngineFacts, Packed, Suspicion, packed_for
from sidecar.core.lateness import Lateness
from sidecar.core.lengths import Answers, Lengths, Overrun
from sidecar.core.misfits import Misfit, misfit
from sidecar.core.outstanding import Outstanding
from sidecar.core.pace import Runs, Yield
from sidecar.core.prefetch_accounting import Guesses, PrefetchCounts, PrefetchedLoads
from sidecar.core.shadow import EngineShadow
from sidecar.core.silence import Silence
from sidecar.core.store import StoreIndex
from sidecar.core.whereabouts import Whereabouts
from sidecar.model.definition import Definition
from sidecar.model.quote import Quote

NEVER_NS = 1 << 62


@dataclass(frozen=True, slots=True)
class Name(Definition):
    """A name that clients use, with the ids of all its versions by ordinal; `kept` as in `AdapterRegistered`."""

    versions: dict[int, str] = field(kw_only=True)
    kept: tuple[int, ...] = ()

    @property
    def digest(self) -> str:
        """The id of its current version."""
        return self.versions[self.current]

    def holds(self, version: str) -> bool:
        """Return True if the name keeps a version in the store whatever the policies say."""
        return self.pins(version) or any(self.versions.get(ordinal) == version for ordinal in self.kept)

    def pins(self, version: str) -> bool:
        """Return True if an operator wants the version in memory."""
        return self.pinned and version == self.digest


@dataclass(slots=True)
class Version:
    """One immutable version and what was learned about it."""

    adapter: Adapter
    origin: str
    generation: int = 0
    names: dict[str, None] = field(default_factory=dict)
    """The names that stand for it now."""
    requests: int = 0
    used_ns: int = 0
    """When a request last asked for it; 0 if none has."""
    lengths: Lengths = field(default_factory=Lengths)
    answered: bool = False
    """It has answered somewhere. Until then it is on probation: one Load at a time in the whole pool."""
    suspect: bool = False
    """A Load of it was in flight when an engine failed, so it is loaded alone."""
    lost_backends: list[str] = field(default_factory=list)
    quarantined: Suspicion | None = None
    refused_by: dict[str, Quote] = field(default_factory=dict)
    """Backends whose engine rejected a Load of it, with the engine's message; forgotten when the backend restarts."""
    loads: dict[str, int] = field(default_factory=dict)
    """The Load in flight on each backend."""


@dataclass(slots=True)
class Request:
    """A request from admission to its end. `attempt` numbers its dispatches; a late result carries an old number."""

    view: Waiting
    ordinal: int
    expires_ns: int
    deadline_ns: int | None
    size_bytes: int = 0
    only: tuple[str, ...] = ()
    """The ids of backends or pools that it may go to; empty means any."""
    client_id: str = ""
    """The client's own id of the request."""
    expected_tokens: int = 0
    """The output that it is still expected to generate."""
    counted_tokens: int = 0
    """The same when it was counted."""
    unsure_tokens: int = 0
    """What of that is not sure: no answer of its version has been so long."""
    guessed: bool = False
    """All of it is a guess: too few of its version have answered."""
    promise: Promise | None = None
    counted: bool = False
    """It is counted in its backend's `outstanding`."""
    voided: Voided | None = None
    """Why its promise no longer holds."""
    backend: str | None = None
    running: bool = False
    settled: bool = False
    """The client has its ending; only the engine's end is awaited."""
    attempt: int = 0
    tokens: int = 0
    first_token: bool = False
    unheard: bool = False
    """Nothing has to be heard of its answer until the end."""
    unseen: bool = False
    """The answer goes past the sidecar, so `tokens` is an estimate."""
    progressing: bool = False
    """It had tokens already at the last progress report of its engine."""
    heals: int = 0
    engine_failures: int = 0
    region_heals: int = 0
    losses: list[str] = field(default_factory=list)
    pinned_key: str = ""
    cache: Cache | None = None
    fetch: Cache | None = None
    """FETCHED, or HOST from disk, if a fetch was begun for this request; JOINED if it waited for another's."""
    dispatched_ns: int = 0
    fetch_ns: int = 0
    """How long it has waited for its adapter to come into the host store."""
    queued_clock: int = 0
    """When it was queued, by the clock of `Lateness`."""
    fetch_allowed_ns: int = 0
    """How much of `fetch_ns` its promise allows."""
    load_ns: int = 0

    id: int = field(init=False, metadata={"derived": True})
    version: str = field(init=False, metadata={"derived": True})

    def __post_init__(self) -> None:
        self.id, self.version = self.view.id, self.view.version

    def take_version(self, version: str) -> None:
        """Switch to another version."""
        self.view = replace(self.view, version=version)
        self.version = version

    @property
    def footprint(self) -> int:
        """The most tokens that the request may take by its client's limits."""
        return self.view.input_tokens + self.view.output_tokens_max

    def kv_tokens(self, backend: Backend) -> int:
        """Return the KV tokens that it may take at an engine, which cuts an answer at its longest sequence."""
        longest = backend.facts.sequence_tokens_max
        return self.footprint if longest is None else min(self.footprint, longest * self.view.sequences)


@dataclass(slots=True)
class Slot:
    """A version that is open on a backend."""

    opened_ns: int
    pages: int
    load: int | None = None
    running: int = 0
    stale: bool = False
    """The engine lost the version while requests of it still run; it must be loaded again."""

    @property
    def loading(self) -> bool:
        return self.load is not None or self.stale


@dataclass(slots=True)
class LoadRun:
    """A Load in flight."""

    id: int
    backend: str
    digest: str
    key: str
    begun_ns: int


@dataclass(slots=True)
class HealNote:
    at_ns: int
    reason: str
    version: str


@dataclass(slots=True)
class SlotEstimate:
    """The number of pages of a device cache of unknown size that may be open, grown while the engine keeps up.

    A Load makes the engine run one token with the adapter on the device. With free space that takes a steady time; if
    the device is full of adapters in use, the Load waits for one of them to end.
    """

    pages: int = 1
    fastest_ns: int = NEVER_NS
    hold_until_ns: int = 0

    def learn(self, took_ns: int, open_pages: int, own_pages: int, now_ns: int) -> None:
        """Learn from a Load of `own_pages` that took `took_ns` while `open_pages`, its own included, were open."""
        self.fastest_ns = min(self.fastest_ns, took_ns)
        if took_ns > 8 * self.fastest_ns + 50_000_000:
            self.pages = max(1, min(self.pages, open_pages) - own_pages)
            self.hold_until_ns = now_ns + 5_000_000_000
        elif open_pages >= self.pages and now_ns >= self.hold_until_ns:
            self.pages = open_pages + own_pages


@dataclass(slots=True)
class Joining:
    """A backend that has just come up and is spared until `until_ns` while it loads what is planned for it.

    `planned` holds the versions yet to be loaded, once `is_planned` is set.
    """

    until_ns: int
    is_planned: bool = False
    planned: dict[str, None] = field(default_factory=dict)


@dataclass(slots=True)
class Backend:
    """One engine endpoint: its facts, its queue and the beliefs about its caches."""

    id: str
    facts: EngineFacts
    ordering: Ordering = field(metadata={"policy": True})
    phase: Phase = Phase.DOWN
    draining: bool = False
    owned: bool = True
    """This replica owns its queue."""
    epoch: int = 0
    """The epoch of that ownership; 0 with a single replica."""
    pool: str = ""
    """The pool in which it was discovered; "" for one that is configured by address."""
    leaving: bool = False
    """It is about to go and takes nothing new."""
    fresh: bool = False
    """Its engine is new to this process: once up it has none of the adapters that others have."""
    running: dict[int, None] = field(default_factory=dict)
    more_sequences: int = 0
    """The sequences of its runs beyond one each."""
    kv_reserved: int = 0
    kv_of_others: deque[int] = field(default_factory=lambda: deque(maxlen=3))
    """KV tokens in use beyond the sidecar's own, as last measured; a gauge lags behind runs that have just ended."""
    others: int = 0
    """Requests in the engine that this process did not send: those that a proxy carries for one before it."""
    queued: dict[int, None] = field(default_factory=dict)
    queued_by_version: dict[str, IdQueue] = field(default_factory=dict)
    outstanding: Outstanding = field(default_factory=Outstanding)
    slowness: float = 1.0
    """Actual over nominal step time."""
    slowness_promised: float = 1.0
    """The smallest slowness on which a standing promise rests, where the pace is learned."""
    steps: Yield = field(default_factory=Yield)
    """The evidence for `slowness`."""
    yielded: Yield = field(default_factory=Yield)
    """Actual over expected time of its whole output."""
    runs: Runs = field(default_factory=Runs)
    overrun: Overrun = field(default_factory=Overrun)
    silence: Silence = field(default_factory=Silence)
    slots: dict[str, Slot] = field(default_factory=dict)
    busy: dict[str, None] = field(default_factory=dict)
    """The open versions whose slots are needed."""
    resting: dict[str, None] = field(default_factory=dict)
    """The open versions without queued requests."""
    busy_pages: int = 0
    stale: dict[str, None] = field(default_factory=dict)
    """The versions whose slot is stale."""
    shadow: EngineShadow = field(default_factory=EngineShadow)
    estimate: SlotEstimate = field(default_factory=SlotEstimate)
    loads: dict[int, None] = field(default_factory=dict)
    lone_load: int | None = None
    """A suspect's Load in flight: beside it nothing else is loaded, and no request that lost a backend is sent."""
    full_until_ns: int = 0
    """The engine's host cache was full: no Load before this time or the next completion."""
    full_backoff_ns: int = 0
    seats_learned: int | None = None
    seats_credit: int = 0
    pages_learned: int | None = None
    """The limit of open pages since the engine evicted an open version: it holds less than believed."""
    pages_credit: int = 0
    quiet_until_ns: int = 0
    quiet_backoff_ns: int = 0
    warmups: dict[str, None] = field(default_factory=dict)
    """Versions that an operator wants loaded here."""
    ahead: PrefetchedLoads = field(default_factory=PrefetchedLoads)
    heals: deque[HealNote] = field(default_factory=lambda: deque(maxlen=16))

    def seats(self, config: CoreConfig) -> int:
        """Return the sequences that may be in flight: the engine's batch and a few, but one at least.

        They are fewer once its queue was full, and while it answers what this process did not send.
        """
        allowed = max(1, self.seats_at_best(config) - self.others) if self.others else self.seats_at_best(config)
        return allowed if self.seats_learned is None else min(allowed, self.seats_learned)

    def seats_at_best(self, config: CoreConfig) -> int:
        """Return the same for an engine whose queue was never full."""
        declared = self.facts.seats or config.seats_default
        slack = int(declared * config.seat_slack)
        return declared + (slack if self.facts.queue_max is None else min(slack, self.facts.queue_max))

    def can_seat(self, sequences: int, config: CoreConfig) -> bool:
        """Return True if a request of this many sequences can ever fit."""
        return sequences == 1 or sequences <= self.seats_at_best(config)

    @property
    def kv_free(self) -> int | None:
        """KV tokens that may still be sent; None if the size of the cache is unknown."""
        if self.facts.kv_tokens is None:
            return None
        return self.facts.kv_tokens - self.kv_reserved - min(self.kv_of_others, default=0)

    @property
    def sequences(self) -> int:
        """Sequences that run."""
        return len(self.running) + self.more_sequences

    @property
    def in_flight(self) -> int:
        return len(self.running) + self.more_sequences + len(self.loads)

    @property
    def serves(self) -> bool:
        """True if requests may wait here: the engine is up as far as is known."""
        return self.phase is Phase.UP and not self.draining and not self.leaving and self.owned

    @property
    def drain_word(self) -> str:
        """What operators call the state of a backend that is drained."""
        return "draining" if self.running else "drained"

    @property
    def takes_requests(self) -> bool:
        """True if requests are sent here now."""
        return self.serves and not self.silence.suspected

    @property
    def group(self) -> str:
        """The id that a request names to go to any backend like this one: its pool, or itself."""
        return self.pool or self.id

    def slot_busy(self, version: str, slot: Slot) -> bool:
        """Return True if a slot is needed. An idle one is closed when another version waits."""
        return slot.running > 0 or slot.load is not None or bool(self.queued_by_version.get(version))

    def recount(self, version: str) -> None:
        """Count a version's slot as busy or not, after a change to it."""
        slot = self.slots.get(version)
        if slot is None or version in self.queued_by_version:
            self.resting.pop(version, None)
        else:
            self.resting[version] = None
        is_busy = slot is not None and self.slot_busy(version, slot)
        if slot is not None and is_busy and version not in self.busy:
            self.busy[version] = None
            self.busy_pages += slot.pages
        elif slot is not None and not is_busy and version in self.busy:
            del self.busy[version]
            self.busy_pages -= slot.pages

    def close_slot(self, version: str) -> None:
        slot = self.slots.pop(version)
        self.stale.pop(version, None)
        self.resting.pop(version, None)
        if version in self.busy:
            del self.busy[version]
            self.busy_pages -= slot.pages

    def slot_in_use(self, slot: Slot) -> bool:
        return slot.running > 0 or slot.load is not None


@dataclass(slots=True)
class Queued:
    """What is queued: requests, tokens that they may take, bytes of their messages."""

    requests: int = 0
    tokens: int = 0
    size_bytes: int = 0

    def over(
        self, tokens: int, size_bytes: int, requests_max: int, tokens_max: int, bytes_max: int
    ) -> tuple[str, int, int] | None:
        """Return which limit one more request would pass, how much is queued of that, and the limit; None if none."""
        if self.requests >= requests_max:
            return "requests", self.requests, requests_max
        if self.tokens + tokens > tokens_max:
            return "tokens", self.tokens, tokens_max
        return ("bytes", self.size_bytes, bytes_max) if self.size_bytes + size_bytes > bytes_max else None

    def count(self, request: Request, sign: int) -> None:
        self.requests += sign
        view = request.view
        self.tokens += sign * (view.input_tokens + view.output_tokens_max)
        self.size_bytes += sign * request.size_bytes


@dataclass(slots=True)
class State:
    """Everything. Fields marked `derived` are left out of snapshots and computed anew."""

    config: CoreConfig
    store: StoreIndex
    disk: StoreIndex
    routing: Routing = field(metadata={"policy": True})
    prefetch: Prefetch = field(metadata={"policy": True})
    guesses: Guesses = field(default_factory=Guesses)
    disk_paused_until_ns: int = 0
    names: dict[str, Name] = field(default_factory=dict)
    versions: dict[str, Version] = field(default_factory=dict)
    base_lengths: Lengths = field(default_factory=Lengths)
    """The lengths of the base model's answers."""
    answers: Answers = field(default_factory=Answers)
    """Those of all adapters."""
    backends: dict[str, Backend] = field(default_factory=dict)
    requests: dict[int, Request] = field(default_factory=dict)
    unrouted: dict[int, None] = field(default_factory=dict)
    loads: dict[int, LoadRun] = field(default_factory=dict)
    load_count: int = 0
    suspects: dict[str, None] = field(default_factory=dict)
    """The versions whose `suspect` is set."""
    joining: dict[str, Joining] = field(default_factory=dict)
    """The backends that have just come up and are still spared."""
    ahead_of_removed: PrefetchCounts = field(default_factory=PrefetchCounts)
    """Prefetch counts of backends that were removed."""
    draining: bool = False
    waiting: Queued = field(default_factory=Queued)
    tenant_queued: dict[str, Queued] = field(default_factory=dict)
    voided: dict[Voided, int] = field(default_factory=dict)
    """How many promises became void, by reason."""
    timers: list[tuple[int, int]] = field(default_factory=list)
    """A heap of (time, request id); request 0 only wakes the scheduler."""
    wake_ns: int = NEVER_NS
    listen_ns: int = NEVER_NS
    """When engines are next checked for silence."""
    steal_from: int = 0
    """Where the next search for a version worth a load begins among those that are queued."""
    steal_ns: int = 0
    """When idle engines next look for a version worth a load; in the past if none is due."""
    wanted: dict[str, IdQueue] = field(default_factory=dict)
    """The queued requests that need each packed key."""
    lateness: Lateness = field(default_factory=Lateness)
    """How long needed blobs have been on their way."""
    hungry_heap: list[tuple[int, str]] = field(default_factory=list)
    """Keys that may have to be fetched, by queue position; stale entries are dropped at the top."""
    fetched_for: dict[str, int] = field(default_factory=dict)
    """The request for which each running fetch was begun; others joined it."""
    prefetches: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Packed keys that an operator wants here: key → (digest, backend with that layout)."""
    groups: list[EngineFacts] = field(default_factory=list, metadata={"derived": True})
    """The facts that differ among backends, as far as they decide what an engine can serve."""
    alike: dict[str, int] = field(default_factory=dict, metadata={"derived": True})
    """The place in `groups` of each backend's facts."""
    examples: dict[int, Backend] = field(default_factory=dict, metadata={"derived": True})
    """A backend for each of them."""
    packed: dict[str, dict[int, Packed]] = field(default_factory=dict, metadata={"derived": True})
    """The packed form of each version, by group."""
    fits: dict[str, dict[int, Misfit | None]] = field(default_factory=dict, metadata={"derived": True})
    """Why engines cannot serve each version, by group."""
    pool_changed: bool = field(default=False, metadata={"derived": True})
    """A backend's eligibility has changed in this step."""
    where: Whereabouts = field(default_factory=Whereabouts, metadata={"derived": True})
    """Where versions are queued and held."""
    places: dict[str, int] = field(default_factory=dict, metadata={"derived": True})
    """The place of each backend among all."""
    full: dict[str, None] = field(default_factory=dict, metadata={"derived": True})
    """Backends that had no free seat at the last look and where nothing has ended since."""
    servers: dict[str, tuple[Backend, ...]] = field(default_factory=dict, metadata={"derived": True})
    """The backends that can serve each version."""
    servers_of_groups: dict[tuple[tuple[int, ...], tuple[str, ...]], tuple[Backend, ...]] = field(
        default_factory=dict, metadata={"derived": True}
    )
    """The same by the groups that fit, and the backends that have refused to load a version."""
    takers: dict[int, tuple[tuple[str, ...], int]] = field(default_factory=dict, metadata={"derived": True})
    """By the identity of such a tuple: those that are up, and the longest prompt that all of them take."""
    longest: dict[int, int] = field(default_factory=dict, metadata={"derived": True})
    """By the same: the longest sequence that any of them runs."""
    pool_version: int = field(default=0, metadata={"derived": True})
    """Counts the changes of backends and of what they can serve, for those who keep what follows from these."""

    @property
    def queued(self) -> int:
        """How many requests are queued."""
        return self.waiting.requests

    def packed_for(self, version: str, backend: Backend) -> Packed:
        """Return the packed form of a version that this backend takes."""
        if version == BASE:
            return BASE_PACKED
        try:
            return self.packed[version][self.alike[backend.id]]
        except KeyError:
            group, held = self.group_of(backend), self.versions[version]
            known = packed_for(held.adapter, self.groups[group], held.generation)
            self.packed.setdefault(version, {})[group] = known
            return known

    def group_of(self, backend: Backend) -> int:
        """Return the place in `groups` of a backend's facts."""
        group = self.alike.get(backend.id)
        if group is None:
            facts = replace(backend.facts, seats=None, kv_tokens=None, pace=None, queue_max=None)
            if facts not in self.groups:
                self.groups.append(facts)
            group = self.alike[backend.id] = self.groups.index(facts)
        return group

    def one_of_each_group(self) -> Collection[Backend]:
        """Return a backend for each of the facts that differ."""
        if not self.examples:
            for backend in self.backends.values():
                self.examples.setdefault(self.group_of(backend), backend)
        return self.examples.values()

    def in_order(self, backends: Collection[str]) -> list[Backend]:
        """Return backends by id, in configured order."""
        if len(backends) > 1:
            if not self.places:
                self.places = {backend: place for place, backend in enumerate(self.backends)}
            backends = sorted(backends, key=self.places.__getitem__)
        return [self.backends[each] for each in backends]

    def is_at_hand(self, version: str, backend: Backend) -> bool:
        """Return True if a backend's engine or the host store has a version, so that it can be opened without a fetch.

        Of the checks before an opening this is the cheapest, so it comes first.
        """
        return version in backend.shadow.host.held or self.store.has(self.packed_for(version, backend).key)

    def wanting(self, version: str) -> list[Backend]:
        """Return the backends at which requests wait for a version, or an operator wants it loaded."""
        found = dict.fromkeys(self.where.queued.get(version, ()))
        found.update((each.id, None) for each in self.backends.values() if each.warmups and version in each.warmups)
        return self.in_order(found)

    def operator_holds(self, digest: str) -> bool:
        """Return True if a name keeps the version in the store, at least in its lowest tier."""
        version = self.versions.get(digest)
        return version is not None and any(self.names[name].holds(digest) for name in version.names)

    def memory_holds(self, digest: str) -> bool:
        """Return True if the version is kept in memory: pinned, or kept without a disk tier."""
        if not self.disk.budget_bytes:
            return self.operator_holds(digest)
        version = self.versions.get(digest)
        return version is not None and any(self.names[name].pins(digest) for name in version.names)

    def forget_derived(self, digest: str = "", backend: str = "") -> None:
        """Forget values derived for a removed version, or for a backend with new facts."""
        if backend:
            self.alike.pop(backend, None)
            self.forget_servers()
        else:
            self.packed.pop(digest, None)
            self.fits.pop(digest, None)
            self.forget_servers_of(digest)

    def forget_servers(self) -> None:
        """Forget which backends serve what: a backend came, went, drains, is suspected or has new facts."""
        self.pool_changed = True
        self.full.clear()
        self.examples.clear()
        self.places.clear()
        self.servers.clear()
        self.servers_of_groups.clear()
        self.takers.clear()
        self.longest.clear()
        self.pool_version += 1

    def forget_servers_of(self, version: str) -> None:
        self.servers.pop(version, None)

    def misfit_of(self, version: str, backend: Backend) -> Misfit | None:
        """Return why an engine cannot serve a version by its facts alone, or None."""
        try:
            return self.fits[version][self.alike[backend.id]]
        except KeyError:
            group = self.group_of(backend)
            found = misfit(self.versions[version].adapter, self.groups[group])
            self.fits.setdefault(version, {})[group] = found
            return found

    def next_position(self, key: str) -> int | None:
        """Return the id of the first queued request that needs a blob, or None."""
        queue = self.wanted.get(key)
        return None if queue is None else queue.head()

    def set_timer(self, at_ns: int, request: int = 0) -> None:
        heapq.heappush(self.timers, (at_ns, request))
