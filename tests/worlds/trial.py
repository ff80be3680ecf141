"""Run one seed, from its draw to its verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from sidecar.core.core import Core
from sidecar.lab.sim.records import Recorder
from sidecar.lab.sim.setup import SECOND_NS
from sidecar.lab.sim.workloads import source, workload
from tests.worlds.bounds import Bounds
from tests.worlds.checks import Checks
from tests.worlds.engines import FaultyWorld
from tests.worlds.misfortune import Misfortune
from tests.worlds.product import FaultyProduct
from tests.worlds.scenario import Scenario, draw
from tests.worlds.violation import hold

Books = Callable[[Core], None]
SHOWN = 40


@dataclass(frozen=True)
class Verdict:
    """The results of a seed without violations."""

    seed: int
    digest: str
    """A hash over every effect and its time."""
    requests: int
    reasons: dict[str, int]
    """The number of requests by ending."""
    voided: dict[str, int]
    bounded: int
    nearest_to_bound: float
    unnoticed: int
    """Bounds exceeded because of a fault that was not detected in time."""
    faults: int
    steps: int
    virtual_s: float
    reached: dict[str, int] = field(default_factory=dict)
    """How often each bound was reached, in worlds with small bounds."""


class SeedFailed(Exception):
    """A seed with a violation; the message has all details."""


def run_seed(
    seed: int, books: Books = lambda _: None, idle: Books = lambda _: None, flavour: str | None = None
) -> Verdict:
    """Run the world of a seed through its faults and then in peace.

    `books` is asked now and then, and `idle` at the end, whether the core's own counts agree. Raises SeedFailed.
    """
    scenario = draw(seed, flavour)
    bounds = Bounds(source(seed, "bounds"), scenario.has("limits"))
    with bounds.set():
        verdict = _run(scenario, bounds, books, idle)
    return replace(verdict, reached=bounds.reached)


def _run(scenario: Scenario, bounds: Bounds, books: Books, idle: Books) -> Verdict:
    checks, recorder = Checks(scenario, books), Recorder()
    world = FaultyWorld(scenario, workload(scenario.load, scenario.parameters), recorder)
    product = FaultyProduct(scenario, world, checks)
    load = scenario.parameters
    product.core.state.config = bounds.of(product.core.state.config, load.input_tokens + load.output_tokens)
    misfortune = Misfortune(scenario, world, product, checks)
    try:
        misfortune.begin()
        world.run(product)
        checks.ended(product.core)
        _agree(checks, recorder)
        hold(not recorder.batches_failed, f"{recorder.batches_failed} batches had more adapters than slots")
        died = [engine.died for engine in world.engines.values() if engine.died]
        hold(not died, f"an engine has ended: {died}")
        idle(product.core)
    except Exception as error:
        raise SeedFailed(_report(scenario, world, checks, misfortune, error)) from error
    return Verdict(
        seed=scenario.seed,
        digest=checks.digest,
        requests=len(checks.clients),
        reasons=checks.reasons,
        voided={why.value: count for why, count in checks.voided.items()},
        bounded=checks.bounded,
        nearest_to_bound=checks.nearest_to_bound,
        unnoticed=len(checks.unnoticed),
        faults=len(misfortune.happened),
        steps=checks.steps,
        virtual_s=world.now_ns / SECOND_NS,
    )


def _agree(checks: Checks, recorder: Recorder) -> None:
    """Check that the simulator's own record agrees."""
    hold(not recorder.unfinished, f"{recorder.unfinished[:5]} have no ending in the record")
    hold(not recorder.counts["doubled"], f"{recorder.counts['doubled']} doubled in the record")
    over = [request for request, _, _ in recorder.over_bound if request not in checks.unnoticed]
    hold(not over, f"over their bound in the record: {over[:5]}")
    hold(recorder.counts["offered"] == len(checks.clients), "the record has other requests")


def _report(scenario: Scenario, world: FaultyWorld, checks: Checks, misfortune: Misfortune, error: Exception) -> str:
    phase = "in peace" if checks.peace_ns else "under faults"
    steps = [
        f"{now_ns / SECOND_NS:10.3f}  {_short(event)}" + "".join(f"\n{'':14}→ {_short(effect)}" for effect in effects)
        for now_ns, event, effects in list(checks.history)[-SHOWN:]
    ]
    return "\n".join(
        (
            f"seed {scenario.seed} failed at {world.now_ns / SECOND_NS:.3f} s, {phase}, step {checks.steps}:",
            f"{type(error).__name__}: {error}",
            "",
            scenario.describe(),
            "",
            "what went wrong, on purpose:",
            *misfortune.happened[-SHOWN:],
            "",
            "the last steps of the core:",
            *steps,
            f"the last event: {_short(checks.coming)}",
        )
    )


def _short(thing: object, longest: int = 300) -> str:
    text = repr(thing)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
