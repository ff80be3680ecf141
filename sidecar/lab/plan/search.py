"""The search for a plan: the fewest engines, then the slots with the most headroom, that meet a goal in simulation.

For each number of engines the few candidates with the best bounds are simulated on the first sample; one that meets the
goal there must meet it on all samples. If the engines are too few, their number grows in growing strides; the least
number is then found between the last that missed and the first that met. The search ends without a plan when more
engines no longer help.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from sidecar.core.config import ClassLimit
from sidecar.lab.plan.candidates import Candidate, Site, at
from sidecar.lab.plan.demand import Sample
from sidecar.lab.plan.goal import Goal, Outcome
from sidecar.lab.sim.results import Result
from sidecar.lab.sim.runs import FOR_EVER
from sidecar.lab.sim.setup import SECOND_NS, Setup, Sidecar
from sidecar.lab.sim.simulate import simulate
from sidecar.lab.sim.statistics import percentile
from sidecar.lab.sim.workloads import Arrival, Workload
from sidecar.pace.cost import CostModel

SIMULATED = 4
"""How many candidates with the same number of engines are simulated."""
BACKENDS_MAX = 32
ALIKE = 1.05
"""Figures of candidates that differ by less than this factor count as equal."""
HELPS = 1.03
"""More engines that raise the headroom by less than this factor do not help."""
IN_VAIN = 2
AMPLE = 2.0
"""Beyond this headroom the growth that a plan allows counts, and no longer the waits of these samples."""
SLOWER = 1.10
"""The factor of the what-if run: step times are known to about a tenth."""
SETTLED_NS = 10 * SECOND_NS
"""The time between the last warming request and the sample."""
RISING, RISING_S = 1.5, 1.0
"""Waits rise if those of the last third exceed this factor times the middle third's mean, and this many seconds."""

Telling = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """A candidate and its outcomes, on one sample or more."""

    candidate: Candidate
    outcomes: tuple[Outcome, ...]

    def headroom(self, goal: Goal) -> float:
        """Return the least headroom of all samples."""
        return min(goal.headroom(outcome) for outcome in self.outcomes)


@dataclass
class Found:
    """The plan, or the nearest one, and what it is compared with."""

    goal: Goal
    chosen: Trial
    meets: bool
    curve: list[Trial] = field(default_factory=list)
    """Other slots with as many engines, by rising slots, each on the first sample."""
    slower: Outcome | None = None
    """The plan on the first sample if steps took `SLOWER` times as long."""
    simulations: int = 0
    requests: int = 0


class Search:
    """One search. `telling` is called with what is being simulated."""

    def __init__(
        self,
        site: Site,
        goal: Goal,
        sidecar: Sidecar,
        *,
        backends: int | None = None,
        slots: int | None = None,
        backends_max: int = BACKENDS_MAX,
        telling: Telling = lambda what: None,
    ) -> None:
        """`backends` and `slots` fix what is otherwise searched for."""
        self.site, self.goal, self.sidecar = site, goal, sidecar
        self._slots = slots
        self._least, self._most = (backends, backends) if backends else (1, backends_max)
        self._telling = telling
        self._trials: dict[tuple[int, int], Trial] = {}
        self._simulations = self._requests = 0

    def run(self) -> Found:
        """Return the plan. `meets` is False if no candidate meets the goal on all samples."""
        met = self._smallest()
        chosen = met or self._nearest()
        found = Found(self.goal, chosen, met is not None)
        found.curve = self._curve(chosen.candidate.backends)
        found.slower = self._slowed(chosen.candidate)
        found.simulations, found.requests = self._simulations, self._requests
        return found

    # Engines.

    def _smallest(self) -> Trial | None:
        """Return the plan with the fewest engines, or None."""
        missed, backends, in_vain, best = 0, self._first(), 0, 0.0
        while backends <= self._most:
            met = self._met(backends)
            if met is not None:
                return self._between(missed, met)
            headroom = self._best_headroom(backends)
            in_vain = 0 if headroom > HELPS * best else in_vain + 1
            if best and in_vain >= IN_VAIN:
                break
            missed, best = backends, max(best, headroom)
            backends = min(self._most, backends + max(1, backends // 4)) if backends < self._most else self._most + 1
        return None

    def _first(self) -> int:
        """Return the fewest engines whose bounds allow the goal; the most if none do."""
        asked = range(self._least, self._most + 1)
        return next((each for each in asked if any(one.could(self.goal) for one in self._at(each))), self._most)

    def _between(self, missed: int, met: Trial) -> Trial:
        """Return the smallest plan above a number of engines that missed, by bisection."""
        low = max(missed, self._first() - 1)
        while met.candidate.backends - low > 1:
            middle = (low + met.candidate.backends) // 2
            better = self._met(middle)
            if better is None:
                low = middle
            else:
                met = better
        return met

    def _best_headroom(self, backends: int) -> float:
        return max(trial.headroom(self.goal) for trial in self._trials.values() if trial.candidate.backends == backends)

    # Slots.

    def _at(self, backends: int) -> list[Candidate]:
        if self._slots is not None:
            return [self.site.candidate(self._slots, backends)]
        return list(at(self.site, backends))

    def _met(self, backends: int) -> Trial | None:
        """Return the candidate with the most headroom that meets the goal on all samples, or None."""
        trials = [self._trial(candidate) for candidate in self._best(backends)]
        for trial in self._by_preference(trials):
            whole = self._on_all(trial)
            if whole.headroom(self.goal) >= 1:
                return whole
        return None

    def _by_preference(self, trials: Sequence[Trial]) -> Iterator[Trial]:
        """Yield the trials that meet the goal, those with the most headroom first.

        Among about equal headrooms the order is: the most load by the bounds, the shortest waits at the 99th
        percentile, the shortest longest wait, the most memory left for KV.
        """
        left = [trial for trial in trials if trial.headroom(self.goal) >= 1]
        while left:
            near = _nearly(left, lambda trial: min(AMPLE, trial.headroom(self.goal)))
            near = _nearly(near, lambda trial: trial.candidate.spare_tokens_per_s(self.goal.wait_s))
            near = _nearly(near, lambda trial: 1 / max(1e-9, trial.outcomes[0].wait_p99_s))
            near = _nearly(near, lambda trial: 1 / max(1e-9, trial.outcomes[0].wait_max_s))
            chosen = min(near, key=lambda trial: trial.candidate.slots)
            left.remove(chosen)
            yield chosen

    def _best(self, backends: int) -> list[Candidate]:
        """Return the candidates with the best bounds, by rising slots; just one if none can meet the goal."""
        liked = sorted(self._at(backends), key=self._liking)
        able = [candidate for candidate in liked if candidate.could(self.goal)]
        return sorted(able[:SIMULATED] or liked[:1], key=lambda each: each.slots)

    def _liking(self, candidate: Candidate) -> tuple[bool, float, float, int]:
        reachable = candidate.reachable.tokens_per_s
        return not candidate.could(self.goal), candidate.mean_wait_s, -reachable, candidate.slots

    def _nearest(self) -> Trial:
        """Return the trial with the most headroom, and of those the one with the fewest engines."""
        best = max(trial.headroom(self.goal) for trial in self._trials.values())
        near = [trial for trial in self._trials.values() if trial.headroom(self.goal) * HELPS >= best]
        nearest = min(near, key=lambda each: (each.candidate.backends, -each.headroom(self.goal), each.candidate.slots))
        return self._on_all(nearest)

    def _curve(self, backends: int) -> list[Trial]:
        candidates = at(self.site, backends) if self._slots is None else self._at(backends)
        return [self._trial(candidate) for candidate in candidates]

    # Simulations.

    def _trial(self, candidate: Candidate) -> Trial:
        place = (candidate.backends, candidate.slots)
        if place not in self._trials:
            self._trials[place] = Trial(candidate, (self._simulated(candidate, 0),))
        return self._trials[place]

    def _on_all(self, trial: Trial) -> Trial:
        """Return a trial on all samples."""
        others = range(len(trial.outcomes), len(self.site.demand.samples))
        more = tuple(self._simulated(trial.candidate, sample) for sample in others)
        whole = replace(trial, outcomes=trial.outcomes + more)
        self._trials[trial.candidate.backends, trial.candidate.slots] = whole
        return whole

    def _slowed(self, candidate: Candidate) -> Outcome:
        cost = candidate.site.cost
        slower = CostModel(cost.table, SLOWER * cost.scale, cost.lora_rank)
        site = replace(candidate.site, cost=slower)
        return self._simulated(replace(candidate, site=site), 0, f", steps {SLOWER - 1:.0%} longer")

    def _simulated(self, candidate: Candidate, sample: int, how: str = "") -> Outcome:
        tried = self.site.demand.samples[sample]
        self._telling(f"{_counted(candidate.backends, 'engine')}, {_counted(candidate.slots, 'slot')}{how}")
        self._simulations += 1
        self._requests += tried.load.requests
        return run(candidate, tried, self.sidecar)


def sidecar_for(goal: Goal, open_loop: bool) -> Sidecar:
    """Return the product's sidecar with a request class for a goal: no request waits longer than allowed.

    Others are held back for a request at the latest after half of the allowed wait.
    """
    sidecar, usual = Sidecar(), ClassLimit() if open_loop else FOR_EVER
    limit_ns = usual.queue_wait_ns_max if goal.wait_max_s is None else round(goal.wait_max_s * SECOND_NS)
    patience_ns = min(usual.patience_ns, int(goal.wait_s * SECOND_NS / 2)) if goal.wait_s < 1e9 else usual.patience_ns
    return replace(sidecar, classes={"default": replace(usual, queue_wait_ns_max=limit_ns, patience_ns=patience_ns)})


def _nearly(trials: Sequence[Trial], value: Callable[[Trial], float]) -> list[Trial]:
    """Return the trials with the largest value, or nearly the largest."""
    best = max(map(value, trials))
    return [trial for trial in trials if value(trial) * ALIKE >= best]


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def run(candidate: Candidate, sample: Sample, sidecar: Sidecar) -> Outcome:
    """Simulate a sample on a candidate from a warm start: the pool is judged as if it had served for a while.

    At first no adapter is anywhere, and the first load of each is made on probation, one at a time in the whole pool.
    With timed arrivals each adapter is therefore requested once before the sample. In a closed loop all clients send at
    once in the beginning, and those first requests are not judged.
    """
    setup = candidate.setup(sidecar)
    if not sample.load.open_loop:
        return _outcome(simulate(setup, sample.load), sample, setup.in_flight)
    return _outcome(simulate(setup, warmed(sample, setup)), sample, len(sample.asked_for))


def warmed(sample: Sample, setup: Setup) -> Workload:
    """Return a sample preceded by one short request for each of its adapters, far enough apart to load it."""
    assert setup.sidecar is not None
    engine = setup.engine
    size_bytes = max(engine.adapter_bytes, 1)
    copies_ns = engine.cost.adapter_put_ns(size_bytes) + engine.cost.adapter_copy_ns(size_bytes)
    apart_ns = 2 * (setup.sidecar.fetch_ns(size_bytes) + copies_ns) + SECOND_NS // 10
    names = sample.asked_for
    begin_ns = len(names) * apart_ns + SETTLED_NS

    def arrivals() -> Iterator[Arrival]:
        first = (Arrival(number * apart_ns, name, 1, 1) for number, name in enumerate(names))
        return chain(first, (replace(each, at_ns=begin_ns + (each.at_ns or 0)) for each in sample.load))

    return replace(sample.load, requests=len(names) + sample.load.requests, arrivals=arrivals)


def _outcome(result: Result, sample: Sample, not_judged: int) -> Outcome:
    """Return the outcome, with the first `not_judged` waits left out.

    With timed arrivals, the tail after the last first token, in which nothing new arrives, is not counted.
    """
    recorder, load = result.recorder, sample.load
    waits = list(recorder.waits_s)[not_judged:]
    unanswered = recorder.counts["offered"] - recorder.counts["answered"]
    ordered = sorted(waits) + [math.inf] * unanswered
    warming = not_judged if load.open_loop else 0
    seconds = result.seconds if sample.span_s is None else sample.span_s + (waits[-1] if waits else 0.0)
    return Outcome(
        seed=load.seed,
        tokens_per_s=max(0, recorder.output_tokens - warming) / max(1e-9, seconds),
        asked_tokens_per_s=sample.tokens_per_s,
        wait_p50_s=percentile(ordered, 50),
        wait_p99_s=percentile(ordered, 99),
        wait_max_s=percentile(ordered, 100),
        waits=len(ordered),
        unanswered=unanswered,
        rising=load.open_loop and _rising(waits),
        mean_batch=result.as_json()["mean_batch"],
    )


def _rising(waits_s: list[float]) -> bool:
    third = len(waits_s) // 3
    if not third:
        return False
    middle, last = waits_s[third : 2 * third], waits_s[2 * third :]
    return sum(last) / len(last) > max(RISING * sum(middle) / len(middle), RISING_S)
