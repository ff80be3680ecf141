"""Faults by seed: the invariants hold in every world, and the checks notice a violation."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from policies.ordering.soft_gated import SoftGated
from policies.views import Backlog, Promise, Waiting
from sidecar.core import effects as do
from sidecar.core import eligibility, queueing, stalls, stealing, storing
from sidecar.core import events as ev
from sidecar.core.core import Core
from sidecar.core.state import Backend
from sidecar.core.step import Step
from sidecar.lab.sim.product import Product
from tests.worlds.scenario import KINDS, draw
from tests.worlds.seeds import run
from tests.worlds.trial import SeedFailed

SEEDS = range(50)
FULL_STORE = 453
"""Loads at a stalled engine fill the host store, and another engine idles unless younger requests may go."""
LARGE = 0
"""A world that takes ten times as long as others."""
QUICK = (1, 3)
PYTORCH = "trtllm_pytorch"


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=pytest.mark.slow) if seed == LARGE or seed >= 16 else seed for seed in SEEDS]
)
def test_holds_under_faults_and_ends_in_peace(seed: int) -> None:
    """Every request ends once, budgets and bounds hold, and after the faults everything ends."""
    run(seed)


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(seed, marks=pytest.mark.slow) if seed == LARGE or 6 <= seed < 24 else seed
        for seed in [*range(24), FULL_STORE]
    ],
)
def test_holds_on_pytorch_engines(seed: int) -> None:
    """The same where requests bring their adapters' paths, loads stall the loop and no batch may exceed the slots.

    Every second world has two slots, and bounds of 2 or 3.
    """
    run(seed, PYTORCH)


def test_an_adapter_too_many_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A core that opens one more than there are slots for fails in a world, whose engine's pages would hold it."""
    limit = eligibility.page_limit
    monkeypatch.setattr(eligibility, "page_limit", lambda backend: limit(backend) + 1)
    with pytest.raises(SeedFailed, match="adapters in flight and the engine has 2 slots"):
        run(10, PYTORCH)


def test_same_effects_from_the_same_seed() -> None:
    """A failing seed alone runs to the same failure: no effect and no time differs, whatever the hash seed."""
    told = [f"{seed} {run(seed).digest}" for seed in QUICK]
    assert told == [f"{seed} {run(seed).digest}" for seed in QUICK]
    program = f"from tests.worlds.seeds import run\nfor seed in {QUICK}: print(seed, run(seed).digest)"
    for hash_seed in ("1",):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        other = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert other.stdout.splitlines() == told, other.stderr


def test_every_kind_of_fault_is_drawn_and_missing() -> None:
    """Each kind of fault is present in some worlds and turned off in others."""
    drawn = [draw(seed) for seed in SEEDS]
    for kind in KINDS:
        assert 5 < sum(scenario.has(kind) for scenario in drawn) < 45, kind
    assert len({scenario.setup.engine.flavour for scenario in drawn}) == 4
    assert len({scenario.sidecar.routing for scenario in drawn}) > 3
    assert any(scenario.parameters.rate_per_s is None for scenario in drawn)


def _fails() -> str:
    """Return what the first failing seed of some says, beginning with those that notice most in the shortest time."""
    for seed in (1, 8, 7, 19, 20, 6, 2, 3, 4, 5, 9, 10, 11, LARGE):
        try:
            run(seed)
        except SeedFailed as failure:
            return str(failure)
    return ""


def test_a_failure_tells_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report has the seed, the time, the drawn parameters, the injected faults and the last steps."""
    monkeypatch.setattr(queueing, "settle", _settled_twice(queueing.settle))
    told = _fails()
    for part in ("seed 1 failed at", "ordering", "faults", "what went wrong, on purpose", "the last steps of the core"):
        assert part in told


def _settled_twice(settle: Callable[..., None]) -> Callable[..., None]:
    def twice(step: Step, request: Any, reason: Any, *rest: Any, **more: Any) -> None:
        settle(step, request, reason, *rest, **more)
        step.emit(next(effect for effect in reversed(step.effects) if isinstance(effect, do.Settle)))

    return twice


def _half_a_bound(promise: Callable[..., Promise | None]) -> Callable[..., Promise | None]:
    def halved(self: SoftGated, request: Waiting, backlog: Backlog, now_ns: int) -> Promise | None:
        made = promise(self, request, backlog, now_ns)
        return None if made is None else replace(made, bound_ns=made.bound_ns // 4)

    return halved


def _leaks_pins(unpin: Callable[[Step, str], None]) -> Callable[[Step, str], None]:
    def forgetful(step: Step, key: str) -> None:
        if step.now_ns % 7:
            unpin(step, key)

    return forgetful


def _forgets_the_void(_: Any) -> Callable[..., None]:
    return lambda step, request, reason: None


def _sends_twice(observe: Callable[[Any, str, Any], None]) -> Callable[[Any, str, Any], None]:
    """A wire that reports the first token of each request twice."""

    def again(product: Any, backend: str, event: Any) -> None:
        observe(product, backend, event._replace(started=event.started * 2))

    return again


def _drops_waking(step: Callable[[Core, ev.Event, int], list[do.Effect]]) -> Callable[..., list[do.Effect]]:
    """A core that never sets a timer."""

    def sleepy(core: Core, event: ev.Event, now_ns: int) -> list[do.Effect]:
        return [effect for effect in step(core, event, now_ns) if not isinstance(effect, do.WakeAt)]

    return sleepy


def _twice_the_seats(seats: Callable[..., int]) -> Callable[..., int]:
    return lambda *given: 2 * seats(*given)


def _forgets_a_request(drop: Callable[..., None]) -> Callable[..., None]:
    """A core that drops expired requests from its queue without an ending."""

    def silent(step: Step, request: Any, *rest: Any, **more: Any) -> None:
        drop(step, request, *rest, **more)
        step.effects[:] = [effect for effect in step.effects if not isinstance(effect, do.Settle)]

    return silent


def _never_reroutes(_: Any) -> Callable[..., None]:
    """A core that never reroutes requests that no backend could take."""
    return lambda step: None


def _never_steals(_: Any) -> Callable[..., bool]:
    """A core that never moves queued requests to an idle backend."""
    return lambda step: False


def _never_suspects(_: Any) -> Callable[..., None]:
    """A core that never suspects an engine of a stall."""
    return lambda step, backend: None


MUTANTS: dict[str, tuple[object, str, Callable[[Any], Any]]] = {
    "settled twice": (queueing, "settle", _settled_twice),
    "a quarter of the bound": (SoftGated, "promise", _half_a_bound),
    "pins leak": (storing, "unpin", _leaks_pins),
    "promises are never void": (queueing, "void_promise", _forgets_the_void),
    "first tokens come twice": (Product, "observe", _sends_twice),
    "no timers": (Core, "step", _drops_waking),
    "twice the seats": (Backend, "seats", _twice_the_seats),
    "requests are lost": (queueing, "drop", _forgets_a_request),
    "an engine idles beside a backlog": (stealing, "steal", _never_steals),
    "a stalled engine is believed": (stalls, "_judge", _never_suspects),
    "what was set aside stays there": (queueing, "route_unrouted", _never_reroutes),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that breaks one promise fails within a few seeds, so the checks can fail."""
    place, attribute, mutate = MUTANTS[name]
    monkeypatch.setattr(place, attribute, mutate(getattr(place, attribute)))
    assert _fails(), f"nobody noticed: {name}"
