"""A small world in virtual time around `Core`: engines, an adapter store and clients that answer its effects.

Everything is deterministic. The engine cache is written from TensorRT-LLM's behaviour and independently of
`sidecar/core/shadow.py`: pages, eviction by least recent completion, a miss error for absent weights. After every step
the world checks the invariants.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import assert_never

from sidecar.config.plugins import policies_of
from sidecar.core import effects as fx
from sidecar.core import eligibility
from sidecar.core import events as ev
from sidecar.core.config import CoreConfig
from sidecar.core.core import Core
from sidecar.core.enums import Fault, Outcome, Phase, Voided
from sidecar.core.facts import Adapter, EngineFacts, NamedVersion, Row
from sidecar.core.outstanding import Outstanding
from sidecar.core.state import Backend, Queued
from sidecar.core.whereabouts import Whereabouts
from sidecar.errors import Reason

MS = 1_000_000
SECOND = 1000 * MS
BASE_MODEL = "tiny-llama"
ATTN_Q = (64, 64)
BLOB_BYTES = 2048
"""The packed size of `adapter_of(...)` at rank 8: one row of 8 x (64 + 64) float16."""
BOOKS_A_STEP = 16
"""The books are counted again after every step with up to so many requests, and more rarely with more, for that costs
time for each request."""


def adapter_of(name: str, rank: int = 8, base_model: str = BASE_MODEL, rows: int = 1) -> Adapter:
    """Return a version whose digest begins with its name."""
    held = tuple(Row("attn_q", 1, layer, rank, *ATTN_Q) for layer in range(rows))
    return Adapter(f"{name}-0123456789abcdef", base_model, held, "bfloat16")


def two_pages(name: str) -> Adapter:
    """Return a version that takes two pages of `facts_of(...)` and 16 blobs of `BLOB_BYTES`."""
    return adapter_of(name, rank=64, rows=2)


def facts_of(host_pages: int | None = 4, device_pages: int | None = 4, seats: int | None = 8) -> EngineFacts:
    """Return an engine that takes rank 64 on attn_q of 2 layers; a page holds one row of rank 64."""
    return EngineFacts(
        base_models=(BASE_MODEL,), dtype="float16", rank_max=64, modules={"attn_q": ATTN_Q}, layers=2,
        host_pages=host_pages, device_pages=device_pages, seats=seats,
    )  # fmt: skip


@dataclass
class Run:
    """A request or a Load at an engine; `epoch` is the engine's life it belongs to."""

    digest: str
    epoch: int
    answered_tokens: int = 0
    ended: bool = False


@dataclass
class Engine:
    """The actual state of one backend. `host_pages` may differ from what the core was told."""

    id: str
    facts: EngineFacts
    host_pages: int = 4
    load_ns: int = 5 * MS
    first_token_ns: int = 10 * MS
    run_ns: int = 30 * MS
    answer_tokens: int = 10
    queue_max: int | None = None
    """Beyond so many requests at once, the engine refuses with "queue full"."""
    up: bool = False
    epoch: int = 0
    done: OrderedDict[str, int] = field(default_factory=OrderedDict)
    """Idle cache entries and their pages, least recent completion first."""
    active: dict[str, list[int]] = field(default_factory=dict)
    """Entries in use: [pages, users]."""
    runs: dict[tuple[int, int], Run] = field(default_factory=dict)
    loads: dict[int, Run] = field(default_factory=dict)
    crash_on_load: set[str] = field(default_factory=set)
    reject_load: dict[str, str] = field(default_factory=dict)
    run_faults: list[Fault] = field(default_factory=list)
    """Faults for the next dispatches, one each."""
    load_faults: list[Fault] = field(default_factory=list)
    load_faults_of: dict[str, list[Fault]] = field(default_factory=dict)
    """Faults for the next Loads: of any version, or of one."""
    fault_rate: float = 0.0
    silent: bool = False
    """Accepts everything and never answers."""
    frozen: bool = False
    """Accepts everything, and answers only after `World.thaw`."""
    unsaid: list[Callable[[], None]] = field(default_factory=list)
    misses: int = 0
    evicted: int = 0

    def holds(self, digest: str) -> bool:
        return digest == "" or digest in self.done or digest in self.active

    def lie(self) -> None:
        """Lose every idle entry silently."""
        self.done.clear()

    def restart(self) -> None:
        self.epoch += 1
        self.done.clear()
        self.active.clear()
        self.runs.clear()
        self.loads.clear()

    def put(self, digest: str, pages: int) -> Fault | None:
        """Load weights into the host cache, or return the engine's fault."""
        if self.holds(digest):
            return None
        free = self.host_pages - sum(self.done.values()) - sum(pages for pages, _ in self.active.values())
        if free < pages and not self.done:
            return Fault.FULL
        while free < pages and self.done:
            _, freed = self.done.popitem(last=False)
            free += freed
            self.evicted += 1
        if free < pages:
            return Fault.PAGE_CLAIM
        self.done[digest] = pages
        return None

    def begin(self, digest: str) -> None:
        if digest in self.done:
            self.active[digest] = [self.done.pop(digest), 0]
        if digest:
            self.active[digest][1] += 1

    def end(self, digest: str) -> None:
        held = self.active.get(digest)
        if held is None:
            return
        held[1] -= 1
        if not held[1]:
            del self.active[digest]
            self.done[digest] = held[0]


class World:
    """The core and its environment. `run()` lets time pass until nothing more happens."""

    def __init__(self, config: CoreConfig | None = None, engines: int = 1, seed: int = 0, **facts: int | None) -> None:
        self.config = config or CoreConfig(store_bytes=64 * BLOB_BYTES)
        self.core = Core(self.config, policies_of(self.config))
        self.random = Random(seed)
        self.now_ns = 1 * SECOND
        self.engines: dict[str, Engine] = {}
        self.adapters: dict[str, Adapter] = {}
        self.fetch_ns = 20 * MS
        self.unfetchable: dict[str, tuple[Reason, str]] = {}
        self.events: list[tuple[int, ev.Event]] = []
        self.effects: list[fx.Effect] = []
        self.by_step: list[list[fx.Effect]] = []
        self.settled: dict[int, fx.Settle] = {}
        self.dispatches: dict[int, list[fx.Dispatch]] = {}
        self.ended_ns: dict[int, int] = {}
        self.patient: dict[int, None] = {}
        """Requests that nothing but a stuck core would let expire."""
        self.nearest_to_bound = 0.0
        """The longest wait, as a share of its promised bound, among promises that stood."""
        self.voided: dict[Voided, int] = {}
        self._agenda: list[tuple[int, int, Callable[[], None]]] = []
        self._sequence = 0
        self._wake: int | None = None
        self._requests = 0
        self._asks = 0
        self._blobs: dict[str, str] = {}
        self._answered: set[str] = set()
        self._had_token: set[int] = set()
        self._known_down: set[str] = set()
        self._leaving: set[str] = set()
        self._lives = 0
        self._unchecked = 0
        for number in range(engines):
            self.add_engine(f"b{number}", facts_of(**facts))

    # What a test does.

    def add_engine(self, backend: str, facts: EngineFacts, up: bool = True, **added: object) -> Engine:
        self._lives += 1000  # what an earlier engine of this id still has under way is not this one's
        engine = self.engines[backend] = Engine(backend, facts, host_pages=facts.host_pages or 4, epoch=self._lives)
        self._known_down.add(backend)
        self.feed(ev.BackendAdded(backend, facts, **added))  # type: ignore[arg-type]
        if up:
            self.bring_up(backend)
        return engine

    def bring_up(self, backend: str) -> None:
        engine = self.engines[backend]
        engine.restart()
        engine.up = True
        self._known_down.discard(backend)
        self.feed(ev.BackendUp(backend, engine.facts))

    def lose(self, backend: str, cause: str = "connection reset", wires_first: bool = False) -> None:
        """Kill an engine. With `wires_first`, its streams break before the backend is reported as gone."""
        engine = self.engines[backend]
        engine.up = False
        runs, loads = list(engine.runs), list(engine.loads)
        engine.restart()
        if wires_first:
            for load in loads:
                self.feed(ev.LoadFailed(load, Fault.LOST, cause))
            for request, attempt in runs:
                tokens = 1 if request in self._had_token else 0
                self.feed(ev.RunFailed(request, attempt, Fault.LOST, cause, tokens))
        self._known_down.add(backend)
        self.feed(ev.BackendLost(backend, cause))

    def leave(self, backend: str, leaving: bool = True, serves_queue: bool = False) -> None:
        """Report that a backend is leaving, or stays after all."""
        if not leaving:
            self._leaving.discard(backend)
        elif not serves_queue and not self.core.state.backends[backend].leaving:
            self._leaving.add(backend)
        self.feed(ev.BackendLeaving(backend, leaving, serves_queue))

    def thaw(self, backend: str) -> None:
        """Resume a frozen engine."""
        engine = self.engines[backend]
        engine.frozen = False
        unsaid, engine.unsaid = engine.unsaid, []
        for say in unsaid:
            say()

    def remove(self, backend: str, late: bool = False, successor: EngineFacts | None = None) -> None:
        """Remove a backend. With `late`, its pending answers still arrive afterwards. `successor` has its id then."""
        engine = self.engines.pop(backend)
        runs, loads = list(engine.runs), list(engine.loads)
        self._known_down.add(backend)
        self._leaving.discard(backend)
        added = None
        if successor is not None:
            self._lives += 1000
            self.engines[backend] = Engine(backend, successor, successor.host_pages or 4, epoch=self._lives)
            added = ev.BackendAdded(backend, successor, fresh=True)
        self.feed(ev.BackendRemoved(backend, "it is gone", added))
        if late:
            for load in loads:
                self.feed(ev.LoadDone(load))
            for request, attempt in runs:
                self.feed(ev.RunEnded(request, attempt, 10))
            self.feed(ev.Progress(backend, {request: 3 for request, _ in runs}))
            self.feed(ev.BackendLost(backend, "too late"))

    def register(self, *names: str, **options: object) -> None:
        for name in names:
            self.register_as(name, adapter_of(name), **options)

    def register_as(
        self, name: str, adapter: Adapter, *others: NamedVersion, ordinal: int = 1, generation: int = 0,
        **options: object,
    ) -> None:  # fmt: skip
        self.adapters[name] = adapter
        current = NamedVersion(ordinal, adapter, f"origin/{name}", generation)
        self.feed(ev.AdapterRegistered(name, ordinal, versions=(current, *others), **options))  # type: ignore[arg-type]

    def pin(self, name: str, pinned: bool) -> None:
        """Pin or unpin a registered name, as an operator does."""
        self.register_as(name, self.adapters[name], pinned=pinned)

    def digest(self, name: str) -> str:
        return self.adapters[name].digest

    def send(
        self, adapter: str = "", *, tenant: str = "", klass: str = "default", deadline_ns: int | None = None,
        input_tokens: int = 10, output_tokens: int = 10, size_bytes: int = 0, only: tuple[str, ...] = (),
        sequences: int = 1, client_id: str = "",
    ) -> int:  # fmt: skip
        """Send one request now and return its id. `deadline_ns` counts from now."""
        self._requests += 1
        deadline = None if deadline_ns is None else self.now_ns + deadline_ns
        if deadline is None and klass == "default":
            self.patient[self._requests] = None
        received = ev.Received(
            self._requests, adapter, tenant, klass, input_tokens, output_tokens, deadline, "", size_bytes, only,
            sequences, client_id,
        )  # fmt: skip
        self.feed(received)
        return self._requests

    def ask(self, make: Callable[[int], ev.Event]) -> fx.Answer:
        self._asks += 1
        self.feed(make(self._asks))
        return next(e for e in self.by_step[-1] if isinstance(e, fx.Answer))

    def feed(self, event: ev.Event) -> list[fx.Effect]:
        """Pass one event to the core, carry out its effects, and check the invariants."""
        self.events.append((self.now_ns, event))
        made = self.core.step(event, self.now_ns)
        self.by_step.append(made)
        self.effects += made
        for effect in made:
            self._check_effect(effect)
            self._act(effect)
        self._unchecked += BOOKS_A_STEP
        if self._unchecked >= len(self.core.state.requests):
            self._unchecked = 0
            check_books(self.core)
        self._check_limits(made)
        assert not any(self.core.state.backends[backend].queued for backend in self._leaving)
        if isinstance(event, ev.Received):
            self._check_spared(event.request)
        return made

    def run(self, for_ns: int | None = None, steps_max: int = 200_000) -> None:
        """Let time pass for `for_ns`, or until nothing is left to happen."""
        until = None if for_ns is None else self.now_ns + for_ns
        for _ in range(steps_max):
            if not self._agenda or (until is not None and self._agenda[0][0] > until):
                break
            at_ns, _, act = heapq.heappop(self._agenda)
            self.now_ns = max(self.now_ns, at_ns)
            act()
        else:
            raise AssertionError(f"still busy after {steps_max} steps")
        if until is not None:
            self.now_ns = max(self.now_ns, until)

    def after(self, delay_ns: int, act: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._agenda, (self.now_ns + delay_ns, self._sequence, act))

    # What a test asks.

    def of(self, kind: type[fx.Effect]) -> list:  # type: ignore[type-arg]
        return [effect for effect in self.effects if isinstance(effect, kind)]

    def outcomes(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for settle in self.settled.values():
            counts[settle.outcome.value] = counts.get(settle.outcome.value, 0) + 1
        return counts

    def unsettled(self) -> list[int]:
        return [request for request in range(1, self._requests + 1) if request not in self.settled]

    def assert_all_ok(self) -> None:
        bad = [settle for settle in self.settled.values() if settle.outcome is not Outcome.OK]
        assert not bad, bad[:3]
        assert not self.unsettled(), self.unsettled()[:10]

    # How the surroundings answer.

    def _act(self, effect: fx.Effect) -> None:
        match effect:
            case fx.Fetch():
                self.after(self.fetch_ns, lambda: self._finish_fetch(effect))
            case fx.Load():
                load_epoch = self.engines[effect.backend].epoch
                self.after(0, lambda: self._load_arrives(effect, load_epoch))
            case fx.Dispatch():
                epoch = self.engines[effect.backend].epoch
                self.after(0, lambda: self._run_arrives(effect, epoch))
            case fx.CancelRun():
                self.after(1 * MS, lambda: self._end_run(effect.backend, effect.request, effect.attempt))
            case fx.Probe():
                self.after(1 * MS, lambda: self._probed(effect.backend))
            case fx.WakeAt():
                self._wake = effect.at_ns
                self.after(max(0, effect.at_ns - self.now_ns), lambda: self._tick(effect.at_ns))
            case fx.Settle() | fx.Drop():
                pass  # `_check_effect` takes them in
            case fx.Spill() | fx.DropDisk():
                pass  # the disk tier is slow for ever: tests that are about it answer themselves
            case fx.RegisterRegions() | fx.Heal() | fx.Quarantine() | fx.Answer():
                pass  # nothing comes of them
            case _:
                assert_never(effect)

    def _tick(self, at_ns: int) -> None:
        if self._wake == at_ns:
            self._wake = None
            self.feed(ev.Tick())

    def _probed(self, backend: str) -> None:
        if backend in self.engines and backend not in self._known_down:
            alive = not self.engines[backend].frozen
            self.feed(ev.BackendProbed(backend, alive, "" if alive else "it made no step"))

    def _finish_fetch(self, effect: fx.Fetch) -> None:
        failure = self.unfetchable.get(effect.digest)
        if failure is not None:
            del self._blobs[effect.key]
            self.feed(ev.FetchFailed(effect.key, *failure))
        else:
            self._blobs[effect.key] = "held"
            self.feed(ev.Fetched(effect.key))

    def _load_arrives(self, effect: fx.Load, epoch: int) -> None:
        engine = self.engines.get(effect.backend)
        if engine is None or engine.epoch != epoch or engine.silent:
            return
        if not engine.up:
            self.feed(ev.LoadFailed(effect.load, Fault.LOST, "connection refused"))
            return
        if effect.digest in engine.crash_on_load:
            self.after(engine.load_ns, lambda: self._crash(engine, epoch))
            return
        fault = self._pick_fault(engine, engine.load_faults_of.get(effect.digest) or engine.load_faults)
        if effect.digest in engine.reject_load:
            self.feed(ev.LoadFailed(effect.load, Fault.REJECTED, engine.reject_load[effect.digest]))
            return
        fault = fault or engine.put(effect.digest, effect.packed.pages)
        if fault is not None:
            self.feed(ev.LoadFailed(effect.load, fault, f"engine says {fault.value}"))
            return
        engine.begin(effect.digest)
        engine.loads[effect.load] = Run(effect.digest, epoch)
        self.after(engine.load_ns, lambda: self._load_ends(engine, effect, epoch))

    def _load_ends(self, engine: Engine, effect: fx.Load, epoch: int) -> None:
        if engine.frozen:
            engine.unsaid.append(lambda: self._load_ends(engine, effect, epoch))
            return
        if self._lives_on(engine, epoch):
            del engine.loads[effect.load]
            engine.end(effect.digest)
            self._answered.add(effect.digest)
            self.feed(ev.LoadDone(effect.load))

    def _lives_on(self, engine: Engine, epoch: int) -> bool:
        return self.engines.get(engine.id) is engine and engine.epoch == epoch

    def _crash(self, engine: Engine, epoch: int) -> None:
        if self._lives_on(engine, epoch) and engine.up:
            self.lose(engine.id, "the engine died")

    def _pick_fault(self, engine: Engine, scripted: list[Fault]) -> Fault | None:
        if scripted:
            return scripted.pop(0)
        if engine.fault_rate and self.random.random() < engine.fault_rate:
            return self.random.choice(list(Fault))
        return None

    def _run_arrives(self, effect: fx.Dispatch, epoch: int) -> None:
        engine = self.engines.get(effect.backend)
        if engine is None or engine.epoch != epoch or engine.silent:
            return
        backend = self.core.state.backends[effect.backend]
        if not engine.up:
            self.feed(ev.RunFailed(effect.request, effect.attempt, Fault.LOST, "connection refused"))
            return
        fault = self._pick_fault(engine, engine.run_faults)
        if fault is None and engine.queue_max is not None and len(engine.runs) >= engine.queue_max:
            fault = Fault.QUEUE_FULL
        if fault is None and effect.attach:
            fault = engine.put(effect.digest, self.core.state.packed_for(effect.digest, backend).pages)
        if fault is None and not engine.holds(effect.digest):
            engine.misses += 1
            fault = Fault.MISS
        if fault is not None:
            self.feed(ev.RunFailed(effect.request, effect.attempt, fault, f"engine says {fault.value}"))
            return
        engine.begin(effect.digest)
        engine.runs[effect.request, effect.attempt] = Run(effect.digest, epoch)
        jitter = self.random.randrange(1, 1000)
        self.after(engine.first_token_ns + jitter, lambda: self._first_token(engine, effect, epoch))
        self.after(engine.run_ns + jitter, lambda: self._run_ends(engine, effect, epoch))

    def _first_token(self, engine: Engine, effect: fx.Dispatch, epoch: int) -> None:
        if engine.frozen:
            engine.unsaid.append(lambda: self._first_token(engine, effect, epoch))
            return
        run = engine.runs.get((effect.request, effect.attempt))
        if self._lives_on(engine, epoch) and run is not None:
            run.answered_tokens = 1
            if effect.request not in self.settled:
                if engine.first_token_ns <= SECOND:  # else the engine is slower than any promise allows for
                    self._check_wait(effect.request, "had its first token")
                assert effect.request not in self._had_token, f"request {effect.request} got tokens of two runs"
                self._had_token.add(effect.request)
            self.feed(ev.FirstToken(effect.request, effect.attempt))

    def _run_ends(self, engine: Engine, effect: fx.Dispatch, epoch: int) -> None:
        if engine.frozen:
            engine.unsaid.append(lambda: self._run_ends(engine, effect, epoch))
            return
        if self._lives_on(engine, epoch):
            run = engine.runs.get((effect.request, effect.attempt))
            if run is not None:
                run.answered_tokens = engine.answer_tokens
            self._end_run(engine.id, effect.request, effect.attempt)

    def _end_run(self, backend: str, request: int, attempt: int) -> None:
        engine = self.engines.get(backend)
        run = None if engine is None else engine.runs.pop((request, attempt), None)
        if engine is not None and run is not None:
            engine.end(run.digest)
            self.feed(ev.RunEnded(request, attempt, run.answered_tokens))

    def fail_run(self, request: int, fault: Fault, tokens: int = 0) -> None:
        """End a running request with an engine error."""
        last = self.dispatches[request][-1]
        engine = self.engines[last.backend]
        run = engine.runs.pop((request, last.attempt))
        engine.end(run.digest)
        self.feed(ev.RunFailed(request, last.attempt, fault, f"engine says {fault.value}", tokens))

    # What must always hold.

    def _check_effect(self, effect: fx.Effect) -> None:
        match effect:
            case fx.Fetch():
                assert effect.key not in self._blobs, f"{effect.key} is fetched twice"
                self._blobs[effect.key] = "coming"
            case fx.Drop():
                assert self._blobs.pop(effect.key) == "held", f"{effect.key} was dropped while it was fetched"
                assert not any(load.key == effect.key for load in self.core.state.loads.values()), (
                    "dropped under a Load"
                )
            case fx.Load():
                assert effect.backend not in self._known_down, f"a Load for {effect.backend}, which is down"
                assert effect.backend not in self._leaving, f"a Load for {effect.backend}, which is about to go"
                assert self._blobs.get(effect.packed.key) == "held", (
                    f"{effect.packed.key} is loaded and not in the store"
                )
            case fx.Dispatch():
                self._check_dispatch(effect)
            case fx.Settle():
                assert effect.request not in self.settled, f"request {effect.request} was settled twice"
                self._check_ending(effect)
                self.settled[effect.request] = effect
                self.ended_ns[effect.request] = self.now_ns
            case _:
                pass

    def _check_spared(self, request_id: int) -> None:
        """Check that a joining backend gets only requests that no other backend can take."""
        state = self.core.state
        request = state.requests.get(request_id)
        if request is None or request.backend not in state.joining:
            return
        others = [
            place.id
            for place in eligibility.servers_for(state, request)
            if place.takes_requests and eligibility.long_enough(place, request.view.input_tokens)
        ]
        assert set(others) <= set(state.joining), f"request {request_id} waits at {request.backend}, which joins"

    def _check_dispatch(self, effect: fx.Dispatch) -> None:
        assert effect.backend not in self._leaving, f"request {effect.request} goes to {effect.backend}, about to go"
        assert effect.backend not in self._known_down, (
            f"request {effect.request} goes to {effect.backend}, which is down"
        )
        if effect.attach:
            assert self._blobs.get(effect.packed_key) == "held", (
                f"{effect.packed_key} goes along and is not in the store"
            )
        assert effect.request not in self.settled, f"request {effect.request} is dispatched after its end"
        assert effect.request not in self._had_token, f"request {effect.request} is sent again after a token"
        before = self.dispatches.setdefault(effect.request, [])
        assert effect.attempt == len(before) + 1, f"request {effect.request} skipped an attempt"
        before.append(effect)
        request = self.core.state.requests[effect.request]
        assert request.expires_ns > self.now_ns, f"request {effect.request} had expired"
        self._check_wait(effect.request, "was dispatched")

    def _check_wait(self, request_id: int, what: str) -> None:
        """Check a promise that is not void: it covers the first token, and so the dispatch."""
        request = self.core.state.requests[request_id]
        if request.promise is not None:
            waited_ns, bound_ns = self.now_ns - request.view.arrived_ns, request.promise.bound_ns
            assert waited_ns <= bound_ns, f"request {request_id} {what} after {waited_ns} ns, its bound is {bound_ns}"
            self.nearest_to_bound = max(self.nearest_to_bound, waited_ns / bound_ns)

    def _check_ending(self, effect: fx.Settle) -> None:
        """Check the promise of a request that ended without a token, and that a promise is voided only once."""
        assert effect.bound_ns is None or not effect.voided, f"request {effect.request} has a bound that is void"
        if effect.bound_ns is not None and effect.request not in self._had_token:
            assert effect.queue_ns <= effect.bound_ns, f"request {effect.request} waited for longer than its bound"
        if effect.voided:
            self.voided[effect.voided] = self.voided.get(effect.voided, 0) + 1

    def _check_limits(self, made: list[fx.Effect]) -> None:
        state = self.core.state
        for load in state.loads.values():
            others = [o for o in state.loads.values() if o.digest == load.digest and o is not load]
            assert not any(o.backend == load.backend for o in others), f"two Loads of {load.digest} at {load.backend}"
            held_up = len(others) == 1 and any(self.engines[o.backend].frozen for o in (load, *others))
            proven = load.digest in self._answered
            assert not others or held_up or proven, f"{load.digest} is on probation and loads twice"
        for effect in made:
            if isinstance(effect, fx.Dispatch | fx.Load):
                self._check_backend(effect.backend)
            if isinstance(effect, fx.Dispatch) and effect.digest:
                backend = state.backends[effect.backend]
                assert effect.digest in backend.slots, f"{effect.digest} is dispatched without a slot"
                believed = effect.attach or effect.digest in backend.shadow.host
                assert believed, f"{effect.digest} is dispatched and not believed resident"
            if isinstance(effect, fx.Load):
                version, backend = state.versions[effect.digest], state.backends[effect.backend]
                assert not version.suspect or len(backend.loads) == 1, (
                    f"the suspect {effect.digest} is not loaded alone"
                )

    def _check_backend(self, backend_id: str) -> None:
        state = self.core.state
        backend = state.backends[backend_id]
        sequences = [state.requests[request].view.sequences for request in backend.running]
        taken = sum(sequences) + sum(load.backend == backend_id for load in state.loads.values())
        assert taken <= backend.seats(self.config) or (len(sequences) == 1 and taken == sequences[0]), (
            f"{backend_id}: over its seats"
        )
        host = backend.facts.host_pages
        if host is not None:
            versions = {state.requests[r].version for r in backend.running} | {
                load.digest for load in state.loads.values() if load.backend == backend_id
            }
            pages = sum(state.packed_for(version, backend).pages for version in versions)
            assert pages <= host, f"{backend_id}: {pages} pages in flight and the engine has {host}"


def check_books(core: Core) -> None:
    """Assert that the core's counts are consistent."""
    state = core.state
    store = state.store
    assert store.bytes_used <= store.budget_bytes
    assert store.bytes_used == sum(entry.size_bytes for entry in store.entries.values())
    _check_pins(core)
    for index in (store, state.disk):
        for digest in {entry.digest for entry in index.entries.values()}:
            assert sorted(index.keys_of(digest)) == sorted(k for k, e in index.entries.items() if e.digest == digest)
    waiting = [request for request in state.requests.values() if not request.running and not request.settled]
    assert state.queued == len(waiting)
    tenants: dict[str, Queued] = {}
    counted = Queued()
    for request in waiting:
        counted.count(request, 1)
        tenants.setdefault(request.view.tenant, Queued()).count(request, 1)
    assert state.waiting == counted
    assert state.tenant_queued == tenants
    assert state.joining.keys() <= state.backends.keys()
    assert all(backend in state.backends for _, backend in state.prefetches.values())
    assert all(request.backend is None or request.backend in state.backends for request in state.requests.values())
    where = Whereabouts()
    where.find(state)
    assert state.where == where
    for backend in state.backends.values():
        _check_outstanding(core, backend)
        running = [state.requests[request] for request in backend.running]
        assert backend.sequences == sum(request.view.sequences for request in running)
        assert backend.kv_reserved == sum(request.kv_tokens(backend) for request in running)
        busy = {version: slot.pages for version, slot in backend.slots.items() if backend.slot_busy(version, slot)}
        assert (sorted(backend.busy), backend.busy_pages) == (sorted(busy), sum(busy.values()))
        assert sorted(backend.resting) == sorted(backend.slots.keys() - backend.queued_by_version.keys())
        for digest, slot in backend.slots.items():
            assert slot.running == sum(request.version == digest for request in running)
        assert sorted(backend.queued) == sorted(i for line in backend.queued_by_version.values() for i in line)
        if backend.phase is Phase.DOWN:
            assert not backend.running
            assert not backend.loads
            assert not backend.queued


def _check_outstanding(core: Core, backend: Backend) -> None:
    queued = [core.state.requests[request] for request in backend.queued]
    every = queued + [core.state.requests[request] for request in backend.running]
    counted = Outstanding()
    for request in every:
        view = request.view
        counted.add(
            view.tenant,
            core.state.config.weight_of(view.tenant),
            view.input_tokens,
            request.expected_tokens,
            view.output_tokens_max,
        )
    for request in queued:
        counted.doubt(request.unsure_tokens, request.guessed)
    counted.queued_tokens = sum(request.expected_tokens for request in queued)
    assert backend.outstanding == counted


def _check_pins(core: Core) -> None:
    state = core.state
    expected: dict[str, int] = {}
    for request in state.requests.values():
        if request.pinned_key:
            expected[request.pinned_key] = expected.get(request.pinned_key, 0) + 1
    for load in state.loads.values():
        expected[load.key] = expected.get(load.key, 0) + 1
    for key, entry in state.disk.entries.items():
        if not entry.ready:  # it is being written
            expected[key] = expected.get(key, 0) + 1
    assert {key: entry.pins for key, entry in state.store.entries.items() if entry.pins} == expected


def assert_idle(core: Core) -> None:
    """Assert that nothing is left behind once every request has ended."""
    state = core.state
    assert not state.requests
    assert not state.wanted
    assert not state.unrouted
    assert not state.loads
    for backend in state.backends.values():
        assert backend.in_flight == 0
        assert backend.kv_reserved == 0
    assert all(not entry.pins for entry in state.store.entries.values())


def with_facts(facts: EngineFacts, **changes: object) -> EngineFacts:
    return replace(facts, **changes)  # type: ignore[arg-type]
