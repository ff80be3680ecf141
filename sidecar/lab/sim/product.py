"""Simulate the product in front of the engines: the production core, with its effects carried out in virtual time.

Loads that an engine is sent one at a time, because each holds up all that it runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import cache
from time import perf_counter_ns
from typing import assert_never

from sidecar.backends.faults import classify
from sidecar.config.plugins import policies_of
from sidecar.core import effects as do
from sidecar.core import events as ev
from sidecar.core.core import Core
from sidecar.core.enums import Fault
from sidecar.core.facts import NamedVersion
from sidecar.lab.engine.messages import Event, QueueFull, Request
from sidecar.lab.engine.pages import Row
from sidecar.lab.sim.setup import Sidecar, adapter_named, engine_rows
from sidecar.lab.sim.workloads import Arrival
from sidecar.lab.sim.world import World

Send = Callable[[str, Request], None]


class OneAtATime:
    """Sends each backend a load when the one before has ended."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._waiting: dict[str, deque[Request]] = {}
        """By backend, the load under way first."""

    def begin(self, backend: str, load: Request) -> None:
        waiting = self._waiting.setdefault(backend, deque())
        waiting.append(load)
        if len(waiting) == 1:
            self._send(backend, load)

    def ended(self, request_id: int) -> None:
        """Send what waits behind a load that has ended. An unknown id is one of a lost engine."""
        for backend, waiting in self._waiting.items():
            if waiting and waiting[0].request_id == request_id:
                waiting.popleft()
                if waiting:
                    self._send(backend, waiting[0])
                return

    def lost(self, backend: str) -> None:
        """Forget the loads of an engine that is gone."""
        self._waiting.pop(backend, None)


LOADS_FROM = 1 << 40
"""Request ids at an engine: from this number on they are Loads; below, request · ATTEMPTS + attempt."""
ATTEMPTS = 64
PROGRESS_NS = 1_000_000_000
PROBE_NS = 100_000_000
DISK_NS = 20_000_000
"""Time of the disk tier to write or to read an adapter."""


class Product:
    """Drives a core: gives it events from clients and engines, and carries out its effects."""

    def __init__(self, world: World, sidecar: Sidecar) -> None:
        self.world = world
        self.sidecar = sidecar
        config = sidecar.core_config()
        self.core = Core(config, policies_of(config))
        self.steps_ns = 0
        """Real time spent in the core."""
        self._arrivals: dict[int, Arrival] = {}
        self._registered: dict[str, None] = {}
        self._engine_rows: dict[str, tuple[Row, ...]] = {}
        self._names: dict[str, str] = {}
        self._rows_of = cache(world.setup.engine.adapter_rows)
        self._engine_rows_of = cache(lambda rank: engine_rows(self._rows_of(rank)))
        self._kind = world.setup.engine.kind
        self._loads = OneAtATime(self._send_load)
        self._reported: dict[str, dict[int, int]] = {}
        """Tokens generated when progress was last reported, by backend and request id at the engine."""
        self._wake_ns: int | None = None
        self._events: deque[ev.Event] = deque()
        """Events to be given to the core; the first is being handled."""
        facts = world.setup.engine.facts()
        for backend in world.setup.backends:
            self.feed(ev.BackendAdded(backend, facts))
            self.feed(ev.BackendUp(backend, facts))

    # Events.

    def arrive(self, request_id: int, arrival: Arrival) -> None:
        if arrival.adapter and arrival.adapter not in self._registered:
            self._register(arrival.adapter)
        self._arrivals[request_id] = arrival
        self.feed(
            ev.Received(
                request_id,
                arrival.adapter,
                arrival.tenant,
                arrival.klass,
                arrival.input_tokens,
                arrival.output_tokens_max,
            )
        )

    def observe(self, backend: str, event: Event) -> None:
        recorder = self.world.recorder
        for engine_id in event.started:
            if engine_id < LOADS_FROM:
                request_id, attempt = divmod(engine_id, ATTEMPTS)
                recorder.started(request_id, event.at_ns)
                self.feed(ev.FirstToken(request_id, attempt))
        for ending in event.endings:
            if ending.request_id >= LOADS_FROM:
                self._loads.ended(ending.request_id)
                self.feed(ev.LoadDone(ending.request_id - LOADS_FROM))
            else:
                request_id, attempt = divmod(ending.request_id, ATTEMPTS)
                self.feed(ev.RunEnded(request_id, attempt, ending.output_tokens))
        for failure in event.failures:
            self._failed(failure.request_id, classify(failure.text), failure.text, failure.cancelled)

    def feed(self, event: ev.Event) -> None:
        """Give the core an event and carry out its effects.

        Events fed meanwhile, such as the next request of a client that has just been answered, are handled afterwards.
        """
        self._events.append(event)
        if len(self._events) > 1:
            return
        while self._events:
            for effect in self.step(self._events[0]):
                self.carry_out(effect)
            self._events.popleft()

    def step(self, event: ev.Event) -> list[do.Effect]:
        """Give the core an event and return its effects."""
        if isinstance(event, ev.BackendLost):
            self._loads.lost(event.backend)
        began_ns = perf_counter_ns()
        effects = self.core.step(event, self.world.now_ns)
        self.steps_ns += perf_counter_ns() - began_ns
        return effects

    def _register(self, name: str) -> None:
        setup = self.world.setup
        rank = self.world.workload.ranks.get(name, setup.engine.rank)
        known = setup.adapters.get(name)
        adapter = known or adapter_named(name, rank, self._rows_of(rank), setup.engine.shape)
        self._registered[name] = None
        self._engine_rows[adapter.digest] = engine_rows(known.rows) if known else self._engine_rows_of(rank)
        self._names[adapter.digest] = name
        self.feed(ev.AdapterRegistered(name, 1, versions=(NamedVersion(1, adapter, f"origin/{name}"),)))

    def _failed(self, engine_id: int, fault: Fault, text: str, cancelled: bool) -> None:
        if engine_id >= LOADS_FROM:
            self._loads.ended(engine_id)
            self.feed(ev.LoadFailed(engine_id - LOADS_FROM, fault, text))
            return
        request_id, attempt = divmod(engine_id, ATTEMPTS)
        if cancelled:
            self.feed(ev.RunEnded(request_id, attempt, 0))
        else:
            self.feed(ev.RunFailed(request_id, attempt, fault, text))

    # Effects.

    def carry_out(self, effect: do.Effect) -> None:
        """Carry out an effect. Raises AssertionError for an unknown one."""
        match effect:
            case do.WakeAt():
                self._wake(effect)
            case do.Dispatch():
                self._dispatch(effect)
            case do.Settle():
                self._settle(effect)
            case do.Load():
                self._load(effect)
            case do.Fetch():
                self._fetch(effect)
            case do.Spill():
                self._spill(effect)
            case do.CancelRun():
                self._cancel(effect)
            case do.Probe():
                self._probe(effect)
            case do.Drop() | do.DropDisk():
                pass  # no bytes are held here: the core counts those of both tiers
            case do.RegisterRegions():
                pass  # emulated engines share no memory
            case do.Heal() | do.Quarantine():
                pass  # notes for observers
            case do.Answer():
                pass  # operators' requests are made for their changes, and nothing waits for the reply
            case _:
                assert_never(effect)

    def _fetch(self, effect: do.Fetch) -> None:
        self.world.recorder.fetched(self._names[effect.digest], effect.size_bytes)
        self.world.after(self.sidecar.fetch_ns(effect.size_bytes), lambda: self.feed(ev.Fetched(effect.key)))

    def _spill(self, effect: do.Spill) -> None:
        self.world.after(DISK_NS, lambda: self.feed(ev.Spilled(effect.key)))

    def _load(self, effect: do.Load) -> None:
        self.world.recorder.loaded(self._names[effect.digest])
        rows = self._engine_rows[effect.digest]
        request = Request(LOADS_FROM + effect.load, 1, 0, task_id=effect.packed.task_id, rows=rows)
        if self._kind.reads_files:
            self._loads.begin(effect.backend, request)
        else:
            self._send_load(effect.backend, request)

    def _send_load(self, backend: str, request: Request) -> None:
        self.world.after(self.sidecar.hop_ns, lambda: self._submit(backend, request))

    def _watch(self, backend: str) -> None:
        """Report an engine's progress to the core every `PROGRESS_NS` while it runs something."""
        if backend not in self._reported:
            self._reported[backend] = {}
            self.world.after(PROGRESS_NS, lambda: self._progress(backend))

    def _progress(self, backend: str) -> None:
        engine, before = self.world.engines[backend], self._reported.pop(backend)
        event = engine.run(self.world.now_ns)  # it may stand at its last event, long ago, and would look silent
        assert event is None, f"{backend} was not run up to now: {event}"
        now = engine.progress()
        if not now:
            return
        tokens = {
            engine_id // ATTEMPTS: count - before.get(engine_id, 0)
            for engine_id, count in now.items()
            if engine_id < LOADS_FROM and count > before.get(engine_id, 0)
        }
        self._reported[backend] = now
        self.world.after(PROGRESS_NS, lambda: self._progress(backend))
        if tokens:
            self.feed(ev.Progress(backend, tokens))

    def _dispatch(self, effect: do.Dispatch) -> None:
        self._watch(effect.backend)
        self.world.recorder.dispatched(effect.request, effect.backend, self.world.now_ns)
        arrival = self._arrivals[effect.request]
        request = Request(
            effect.request * ATTEMPTS + effect.attempt,
            arrival.input_tokens,
            arrival.output_tokens_max,
            task_id=effect.task_id or None,
            rows=self._engine_rows[effect.digest] if effect.task_id and self._kind.reads_files else None,
            stop_after=arrival.output_tokens,
        )
        self.world.after(self.sidecar.hop_ns, lambda: self._submit(effect.backend, request))

    def _submit(self, backend: str, request: Request) -> None:
        try:
            self.world.submit(backend, request)
        except QueueFull as error:
            self._failed(request.request_id, Fault.QUEUE_FULL, str(error), False)

    def _cancel(self, effect: do.CancelRun) -> None:
        engine_id = effect.request * ATTEMPTS + effect.attempt
        after_ns = self.sidecar.hop_ns + self._kind.cancels_after_ns
        self.world.after(after_ns, lambda: self._send_cancel(effect.backend, engine_id))

    def _send_cancel(self, backend: str, engine_id: int) -> None:
        self.world.engines[backend].cancel(engine_id, self.world.now_ns)

    def _probe(self, effect: do.Probe) -> None:
        """Answer that the engine is alive: an emulated engine always steps, however slowly."""
        self.world.after(PROBE_NS, lambda: self.feed(ev.BackendProbed(effect.backend, True)))

    def _settle(self, effect: do.Settle) -> None:
        del self._arrivals[effect.request]
        self.world.recorder.settled(effect, self.world.now_ns)
        self.world.over(effect.request)

    def _wake(self, effect: do.WakeAt) -> None:
        self._wake_ns = effect.at_ns
        self.world.after(max(0, effect.at_ns - self.world.now_ns), lambda: self._tick(effect.at_ns))

    def _tick(self, at_ns: int) -> None:
        if self._wake_ns == at_ns:
            self._wake_ns = None
            self.feed(ev.Tick())
