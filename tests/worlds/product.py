"""The product in a failing environment: wires break, origins are late, clients leave."""

from __future__ import annotations

from dataclasses import replace

from sidecar.core import effects as do
from sidecar.core import events as ev
from sidecar.core.enums import Fault, Seen
from sidecar.core.facts import Adapter, version_id
from sidecar.errors import Reason
from sidecar.lab.engine.messages import Event, Request
from sidecar.lab.sim.product import ATTEMPTS, DISK_NS, LOADS_FROM, PROBE_NS, Product
from sidecar.lab.sim.setup import SECOND_NS, adapter_named
from sidecar.lab.sim.workloads import Arrival, source
from tests.worlds.checks import Checks
from tests.worlds.engines import FaultyWorld
from tests.worlds.names import Names, identity, ranks_of
from tests.worlds.scenario import Scenario

FETCH_FAILS, FETCH_SLOW, FETCH_SLOW_S = 0.1, 0.2, 30.0
DISK_FAILS = 0.2
LEAVES, STALLS, LEAVES_WITHIN_S = 0.15, 0.05, 20.0
DEADLINES_S = (0.5, 30.0)
CARRIED, UNTOLD, TWICE, LATE, LATE_S, ASKED_S = 0.5, 0.05, 0.1, 0.1, 5.0, (5.0, 20.0)
"""Shares of answers that a proxy carries, and of those whose end its log never tells, tells twice, or tells late, by so
many seconds; within how many the engine is asked about one that is not told.
"""
OTHERS_MAX = 20
"""Of answers that a proxy carries for a process before this one, when an engine is reached."""
ESTIMATED = (0.95, 1.05)
"""The count of an answer's tokens by its bytes, as a share of their number."""


class FaultyProduct(Product):
    """A core whose effects may fail when the world carries them out."""

    def __init__(self, scenario: Scenario, world: FaultyWorld, checks: Checks) -> None:
        self.scenario = scenario
        self.faulty = world
        self.checks = checks
        self.peaceful = False
        self._random = source(scenario.seed, "surroundings")
        self._up = dict.fromkeys(scenario.setup.backends, True)
        self._at: dict[str, dict[int, None]] = {backend: {} for backend in scenario.setup.backends}
        """The engine ids of the requests and loads at each engine that somebody listens for."""
        super().__init__(world, scenario.sidecar)
        self._log = source(scenario.seed, "access log")
        self.names = Names(world.workload.adapters, self._make, source(scenario.seed, "operators"))
        self.names.backends = scenario.setup.backends
        for registration in self.names.registrations():
            self.register(registration)

    # What happens to it.

    def step(self, event: ev.Event) -> list[do.Effect]:
        self.checks.coming = event
        effects = super().step(event)
        self.checks.stepped(self.core, event, effects, self.world.now_ns)
        return effects

    def arrive(self, request_id: int, arrival: Arrival) -> None:
        scenario, random = self.scenario, self._random
        adapter = self.names.written(arrival.adapter, random)
        klass = "short" if random.random() < scenario.short_share else "default"
        deadline_ns = None
        if random.random() < scenario.deadline_share and not self.peaceful:
            deadline_ns = self.world.now_ns + round(random.uniform(*DEADLINES_S) * SECOND_NS)
        self._arrivals[request_id] = replace(arrival, klass=klass)
        tokens = arrival.input_tokens, arrival.output_tokens_max
        self._may_leave(request_id)
        self.feed(ev.Received(request_id, adapter, identity(arrival.tenant), klass, *tokens, deadline_ns))

    def observe(self, backend: str, event: Event) -> None:
        """Pass on an event that somebody still listens for."""
        at = self._at[backend]
        heard = Event(
            event.at_ns,
            tuple(started for started in event.started if started in at),
            tuple(ending for ending in event.endings if ending.request_id in at),
            tuple(failure for failure in event.failures if failure.request_id in at),
        )
        for ending in heard.endings:
            del at[ending.request_id]
        for failure in heard.failures:
            del at[failure.request_id]
        carried = tuple(ending for ending in heard.endings if self._is_carried(ending.request_id))
        told = tuple(ending for ending in heard.endings if ending not in carried)
        super().observe(backend, Event(heard.at_ns, heard.started, told, heard.failures))
        for ending in carried:
            self._tell_later(backend, *divmod(ending.request_id, ATTEMPTS), ending.output_tokens)

    def feed(self, event: ev.Event) -> None:
        """Feed an event as the sidecar sees it of an answer that a proxy carries.

        In some worlds its log tells of no progress. There no engine stalls, which nobody could see.
        """
        if not self.scenario.has("log") or self.scenario.has("stalls"):
            super().feed(event)
            return
        if isinstance(event, ev.FirstToken) and self._is_carried(event.request * ATTEMPTS):
            event = replace(event, unheard=True, unseen=True)
        elif isinstance(event, ev.Progress):
            heard = {each: n for each, n in event.tokens.items() if not self._is_carried(each * ATTEMPTS)}
            event = replace(event, tokens=heard)
            if not heard:
                return
        super().feed(event)

    def _is_carried(self, engine_id: int) -> bool:
        """Return True if a proxy carries an answer."""
        if not self.scenario.has("log") or engine_id >= LOADS_FROM:
            return False
        return source(self.scenario.seed, f"carried {engine_id // ATTEMPTS}").random() < CARRIED

    def _tell_later(self, backend: str, request: int, attempt: int, tokens: int) -> None:
        """Tell the end of an answer that a proxy carried as its access log does."""
        log = self._log
        if not self.peaceful and log.random() < UNTOLD:
            self._tell_after(backend, log.uniform(*ASKED_S), ev.RunEnded(request, attempt, 0, Seen.NOTHING))
            return
        left = self.scenario.has("clients") and not self.peaceful and log.random() < LEAVES
        event = ev.RunEnded(request, attempt, max(1, round(tokens * log.uniform(*ESTIMATED))), Seen.ESTIMATED, left)
        is_late = not self.peaceful and log.random() < LATE
        self._tell_after(backend, log.uniform(0, LATE_S) if is_late else 0.0, event)
        if log.random() < TWICE:
            self._tell_after(backend, log.uniform(LATE_S, 2 * LATE_S), event)

    def _tell_after(self, backend: str, seconds: float, event: ev.Event) -> None:
        """Tell it later; until then the seat looks taken, which no bound allows for."""
        if seconds:
            self.checks.trouble(backend, round(seconds * SECOND_NS))
        self.world.after(round(seconds * SECOND_NS), lambda: self.feed(event))

    def register(self, event: ev.AdapterRegistered) -> None:
        """Register a name, and keep its versions' rows for their loads."""
        for each in event.versions:
            version = version_id(each.adapter.digest, each.generation)
            self._engine_rows[version] = self._engine_rows_of(each.adapter.rows[0].rank)
            self._names[each.adapter.digest] = self._names[version] = event.name
        self.feed(event)

    # Faults.

    @property
    def up(self) -> list[str]:
        """The backends that are up, whatever the core knows."""
        return [backend for backend, is_up in self._up.items() if is_up]

    def lose(self, backend: str, cause: str, untold_ns: int, down_ns: int, warm: bool, wires: bool) -> None:
        """Have an engine go, with all it ran.

        `wires`: every stream breaks on its own before anyone says that the backend is gone, which is `untold_ns` from
        now. `warm`: it was only out of reach; its streams are cancelled and its cache is as it was.
        """
        self._up[backend] = False
        runs, at = list(self._at[backend]), self._at[backend]
        at.clear()
        if warm:
            for engine_id in runs:
                self.world.engines[backend].cancel(engine_id, self.world.now_ns)
        else:
            self._start_anew(backend)
        if wires:
            for engine_id in runs:
                self._failed(engine_id, Fault.LOST, cause, False)
        self.world.after(untold_ns, lambda: self.feed(ev.BackendLost(backend, cause)))
        self.world.after(untold_ns + down_ns, lambda: self._return(backend))

    def _start_anew(self, backend: str) -> None:
        self.faulty.restart(backend)
        self.checks.stalls.end(backend)

    def _return(self, backend: str) -> None:
        self._up[backend] = True
        if self.peaceful:
            self._start_anew(backend)
        others = self._log.randrange(OTHERS_MAX) if self.scenario.has("log") and not self.peaceful else 0
        self.feed(ev.BackendUp(backend, self.world.setup.engine.facts(), others))
        if others:
            self._others_end(backend, others)

    def _others_end(self, backend: str, others: int) -> None:
        """Have answers end that a proxy carries for a process before this one. A gauge may rise again meanwhile."""
        for _ in range(others):
            self._measure_after(backend, self._log.uniform(0, LATE_S), self._log.randrange(others))
        self._measure_after(backend, LATE_S, 0)

    def _measure_after(self, backend: str, seconds: float, others: int) -> None:
        self.checks.trouble(backend, round(seconds * SECOND_NS))  # no bound allows for the seats that they have
        event = ev.BackendMeasured(backend, None, None, others=others)
        self.world.after(round(seconds * SECOND_NS), lambda: self.feed(event) if self._up[backend] else None)

    def _probe(self, effect: do.Probe) -> None:
        """Answer a probe; a frozen engine lets it time out."""
        backend, stalls = effect.backend, self.checks.stalls
        stalled = self._up[backend] and stalls.stands_still(backend, self.world.now_ns)
        delay_ns = effect.within_ns if stalled else PROBE_NS
        self.world.after(delay_ns, lambda: self._probed(backend))

    def _probed(self, backend: str) -> None:
        if not self.checks.knows_down(backend):
            alive = self._up[backend] and not self.checks.stalls.stands_still(backend, self.world.now_ns)
            self.feed(ev.BackendProbed(backend, alive))

    def _may_leave(self, request_id: int) -> None:
        if self.peaceful or not self.scenario.has("clients"):
            return
        within = self._random.random()
        if within < LEAVES + STALLS:
            leave: ev.Event = ev.ClientLeft(request_id) if within < LEAVES else ev.ClientStalled(request_id)
            after_ns = round(self._random.uniform(0, LEAVES_WITHIN_S) * SECOND_NS)
            self.world.after(after_ns, lambda: self._leave(request_id, leave))

    def _leave(self, request_id: int, leave: ev.Event) -> None:
        if request_id in self._arrivals and not self.peaceful:
            self.feed(leave)

    # What it does.

    def _fetch(self, effect: do.Fetch) -> None:
        if effect.from_disk:
            self.world.after(DISK_NS, lambda: self._end_fetch(effect, self._fails("disk", DISK_FAILS)))
            return
        self.world.recorder.fetched(self._names[effect.digest], effect.size_bytes)
        delay_ns = self.sidecar.fetch_ns(effect.size_bytes)
        if self._fails("fetch", FETCH_SLOW):
            delay_ns += round(self._random.uniform(0, FETCH_SLOW_S) * SECOND_NS)
        self.world.after(delay_ns, lambda: self._end_fetch(effect, self._fails("fetch", FETCH_FAILS)))

    def _end_fetch(self, effect: do.Fetch, failed: bool) -> None:
        if failed:
            self.feed(ev.FetchFailed(effect.key, Reason.ADAPTER_UNAVAILABLE, "the origin does not answer"))
        else:
            self.feed(ev.Fetched(effect.key))

    def _spill(self, effect: do.Spill) -> None:
        failed = self._fails("disk", DISK_FAILS)
        told = ev.SpillFailed(effect.key, "no space left") if failed else ev.Spilled(effect.key)
        self.world.after(DISK_NS, lambda: self.feed(told))

    def _fails(self, kind: str, share: float) -> bool:
        return self.scenario.has(kind) and not self.peaceful and self._random.random() < share

    def _submit(self, backend: str, request: Request) -> None:
        if self._up[backend]:
            self._at[backend][request.request_id] = None
            super()._submit(backend, request)
        elif not self.checks.knows_down(backend) and self._random.random() < 0.5:
            self._failed(request.request_id, Fault.LOST, "connection refused", False)

    def _failed(self, engine_id: int, fault: Fault, text: str, cancelled: bool) -> None:
        for at in self._at.values():
            at.pop(engine_id, None)
        super()._failed(engine_id, fault, text, cancelled)

    def _cancel_at(self, backend: str, engine_id: int) -> None:
        if self._up[backend]:
            super()._cancel_at(backend, engine_id)

    def _make(self, name: str, ordinal: int) -> Adapter:
        rank = ranks_of(self.world.workload.ranks, name, ordinal)
        return adapter_named(f"{name}-v{ordinal}", rank, self._rows_of(rank), self.world.setup.engine.shape)
