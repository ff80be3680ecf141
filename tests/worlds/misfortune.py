"""Run two phases: random faults, then none, in which everything must end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from sidecar.core import events as ev
from sidecar.lab.sim.setup import SECOND_NS
from sidecar.lab.sim.workloads import Arrival, source
from tests.worlds.checks import Checks
from tests.worlds.engines import FaultyWorld
from tests.worlds.product import FaultyProduct
from tests.worlds.scenario import Scenario

UNTOLD_S, DOWN_S, SLOW_S = 10.0, 20.0, 40.0
STALL_S, BACK_S = (3.0, 40.0), 5.0
GIVEN_UP_S = 30.0
"""`progress_timeout_s`: a run without progress for so long is lost."""
SLOWER = (2.0, 20.0)
BURST = (10, 60)
SETTLES_NS = 45 * SECOND_NS
"""By this time after the last fault, engines are back and late answers have arrived."""
LOOK_EVERY_NS = 30 * SECOND_NS
PROBES, PROBE_EVERY_NS = 30, SECOND_NS // 5
STEP_FAILS = "CUDA runtime error in cudaEventSynchronize: an illegal memory access was encountered"


class Misfortune:
    """The faults of a world, drawn from its seed."""

    def __init__(self, scenario: Scenario, world: FaultyWorld, product: FaultyProduct, checks: Checks) -> None:
        self.scenario = scenario
        self.happened: list[str] = []
        self._world = world
        self._product = product
        self._checks = checks
        self._random = source(scenario.seed, "misfortune")
        self._draining: dict[str, None] = {}
        acts: dict[str, Callable[[str], str]] = {
            "loss": self._lose,
            "slow": self._slow,
            "lies": self._lie,
            "step": self._break_step,
            "bursts": self._burst,
            "operators": self._operate,
            "drain": self._drain,
            "stalls": self._stall,
            "config": self._configure,
        }
        self._acts = [act for kind, act in acts.items() if scenario.has(kind)]

    def begin(self) -> None:
        self._next()
        self._world.after(round(self.scenario.peace_s * SECOND_NS), self._make_peace)

    def _next(self) -> None:
        gap_s = self._random.expovariate(1 / self.scenario.fault_every_s)
        self._world.after(round(gap_s * SECOND_NS), self._one)

    def _one(self) -> None:
        up = self._product.up
        if self._product.peaceful or not self._acts:
            return
        if up:
            act = self._random.choice(self._acts)
            self._note(act(self._random.choice(up)))
        self._next()

    def _note(self, what: str) -> None:
        if what:
            self.happened.append(f"{self._world.now_ns / SECOND_NS:10.3f}  {what}")

    # What goes wrong.

    def _lose(self, backend: str) -> str:
        random = self._random
        untold_s = random.choice([0.0, random.uniform(0, UNTOLD_S)])
        down_s = random.uniform(0.1, DOWN_S)
        warm, wires = random.random() < 0.3, random.random() < 0.5
        self._checks.trouble(backend, round(untold_s * SECOND_NS))
        self._product.lose(
            backend, "connection reset", round(untold_s * SECOND_NS), round(down_s * SECOND_NS), warm, wires
        )
        told = "and its streams break first" if wires else "with what it ran"
        return f"{backend} is lost {told}, said after {untold_s:.1f} s, back {down_s:.1f} s later, warm: {warm}"

    def _slow(self, backend: str) -> str:
        factor, for_s = self._random.uniform(*SLOWER), self._random.uniform(1, SLOW_S)
        self._world.pace(backend, factor)
        self._checks.trouble(backend, round(for_s * SECOND_NS))
        self._world.after(round(for_s * SECOND_NS), lambda: self._world.pace(backend, 1.0))
        return f"{backend} takes {factor:.1f} times as long for {for_s:.1f} s"

    def _stall(self, backend: str) -> str:
        stalls, for_s = self._checks.stalls, self._random.uniform(*STALL_S)
        back_s = self._random.uniform(0.1, BACK_S)
        if not stalls.begin(backend, self._world.now_ns, round(for_s * SECOND_NS)):
            return ""
        engine = self._world.engines[backend]
        self._world.freeze(backend, round(for_s * SECOND_NS))
        self._checks.trouble(backend, round(min(for_s, GIVEN_UP_S) * SECOND_NS))

        def give_up() -> None:
            if self._world.engines[backend] is engine and backend in self._product.up:
                self._product.lose(backend, "it answered nothing", 0, round(back_s * SECOND_NS), False, False)

        if for_s > GIVEN_UP_S:
            self._world.after(round(GIVEN_UP_S * SECOND_NS), give_up)
        return f"{backend} makes no step for {min(for_s, GIVEN_UP_S):.1f} s" + (
            f" and is given up, back after {back_s:.1f} s" if for_s > GIVEN_UP_S else ""
        )

    def _lie(self, backend: str) -> str:
        self._world.engines[backend].lose_idle_adapters()
        return f"{backend} loses its idle adapters"

    def _break_step(self, backend: str) -> str:
        if not self._world.is_busy(backend):
            return ""
        self._world.engines[backend].break_next_step(STEP_FAILS)
        return f"{backend}'s next step fails"

    def _burst(self, backend: str) -> str:
        count, load = self._random.randint(*BURST), self.scenario.parameters
        adapter = self._random.choice(self._world.workload.adapters or ("",))
        for _ in range(count):
            self._send(adapter, load.output_tokens)
        return f"{count} requests of {adapter or 'the base model'} at once"

    def _operate(self, backend: str) -> str:
        event = self._product.names.act()
        if event is None:
            return ""
        if isinstance(event, ev.AdapterRegistered):
            self._product.register(event)
            return f"{event.name} is {event.versions[0].adapter.digest}, pinned: {event.pinned}"
        self._product.feed(event)
        return f"{event}"

    def _drain(self, backend: str) -> str:
        if backend in self._draining:
            del self._draining[backend]
        else:
            self._draining[backend] = None
        draining = backend in self._draining
        self._product.feed(ev.DrainSet(backend, draining))
        return f"{backend} {'drains' if draining else 'takes requests again'}"

    def _configure(self, backend: str) -> str:
        random, config = self._random, self._product.core.state.config
        classes = {
            name: replace(limit, patience_ns=random.randint(0, 20) * SECOND_NS)
            for name, limit in config.classes.items()
        }
        weights = {tenant: random.choice([0.5, 1.0, 4.0]) for tenant in ("t0", "t1")}
        rate, joining_ns = random.choice([0, config.prefetch_bytes_per_s]), random.choice([0, config.joining_ns_max])
        changed = replace(
            config, classes=classes, tenant_weights=weights, prefetch_bytes_per_s=rate, joining_ns_max=joining_ns
        )
        self._product.feed(ev.ConfigChanged(changed))
        return f"the configuration has weights {weights}, classes {classes}"

    def _send(self, adapter: str, output_tokens: int) -> None:
        """Send a request with the same limits as the load's."""
        load = self.scenario.parameters
        tenant, asked = "t0" if load.tenant_shares else "", load.output_tokens_max or output_tokens
        self._world.send(Arrival(None, adapter, load.input_tokens, output_tokens, asked, tenant))

    # Peace.

    def _make_peace(self) -> None:
        """Stop all faults: every remaining request must be served or refused, and end."""
        world, product, now_ns = self._world, self._product, self._world.now_ns
        self._note("the faults stop")
        product.peaceful = world.honest = True
        self._checks.peace(now_ns, now_ns + SETTLES_NS)
        for backend in self.scenario.setup.backends:
            world.pace(backend, 1.0)
            world.queue_without_limit(backend)
            product.feed(ev.DrainSet(backend, False))
            if self.scenario.has("small") and backend in product.up:
                product.lose(backend, "its cache is enlarged", 0, SECOND_NS, warm=False, wires=False)
        for event in product.names.make_peace():
            if isinstance(event, ev.AdapterRegistered):
                product.register(event)
            else:
                product.feed(event)
        world.after(SETTLES_NS, self._settled)

    def _settled(self) -> None:
        """Send requests that must be answered, and check periodically that something moves."""
        for event in self._product.names.make_peace():  # a Load that was under way may have died late
            if isinstance(event, ev.ReleaseAsked):
                self._product.feed(event)
        adapters = (*self._world.workload.adapters, "")
        for number in range(PROBES):
            adapter = adapters[number % len(adapters)]
            self._world.after(number * PROBE_EVERY_NS, lambda adapter=adapter: self._send(adapter, 8))  # type: ignore[misc]
        self._look()

    def _look(self) -> None:
        self._checks.still_moves(self._world.now_ns)
        if self._checks.waiting:
            self._world.after(LOOK_EVERY_NS, self._look)
