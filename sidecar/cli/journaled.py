"""`sidecar simulate --journal`: repeat a live run's requests with similar engines under any policy."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sidecar.cli.show import count
from sidecar.core.config import CoreConfig
from sidecar.core.events import RunEnded
from sidecar.core.facts import Adapter, EngineFacts
from sidecar.errors import Misused, Reason
from sidecar.incident.arrivals import Arrival as Recorded
from sidecar.incident.arrivals import Setting, arrivals_of, lines_of, setting_of
from sidecar.journal.archive import opened
from sidecar.journal.replay import segments_of
from sidecar.lab.sim.flavours import flavour_of
from sidecar.lab.sim.options import BARE, Options
from sidecar.lab.sim.recorded import Sizes, recorded_engine
from sidecar.lab.sim.results import hot_of, percentiles
from sidecar.lab.sim.runs import Run, class_limit, cost_of, given_policies
from sidecar.lab.sim.setup import SECOND_NS, EngineSetup, Setup, Sidecar
from sidecar.lab.sim.tables import Figures
from sidecar.lab.sim.workloads import Arrival, Workload
from sidecar.model.reference import BASE_NAMES, Reference, selected

LIVE = "live"


def journaled(options: Options, path: Path, allowed: Container[str] = ()) -> tuple[list[Run], Figures]:
    """Return the runs that a journal and the options describe, and the live run's figures. Raises Misused.

    `allowed` is what SegmentFile takes.
    """
    setting, recorded = setting_of(path, allowed), list(arrivals_of(path))
    if not recorded or not setting.backends:
        raise Misused(Reason.CONFIG_INVALID, f"{path} has no {'backend' if recorded else 'request'} in it")
    load = _Load(setting, recorded[: options.requests])
    pool, notes = _pool(options, setting, load)
    workload = Workload(
        name=path.name,
        adapters=tuple(load.adapters),
        ranks={name: adapter.rank_max for name, adapter in load.adapters.items()},
        requests=len(load.arrivals),
        open_loop=options.in_flight is None,
        seed=0,
        arrivals=lambda: load.sent(options.in_flight is None),
    )
    notes = (*notes, f"the live run was ordered by {setting.config.ordering}")
    orders = options.compare or (options.order or setting.config.ordering,)
    runs = [
        Run(order, replace(pool, sidecar=_sidecar(options, order, setting.config)), workload, notes) for order in orders
    ]
    return runs, _live(path, recorded[: options.requests], load)


class _Load:
    """A journal's arrivals as a simulation sends them, without those whose adapter was not registered."""

    def __init__(self, setting: Setting, recorded: Sequence[Recorded]) -> None:
        self._setting = setting
        self.adapters: dict[str, Adapter] = {}
        self.arrivals: list[Arrival] = []
        self.names: dict[tuple[int, int], str] = {}
        """The adapter of each recorded request, by life and number."""
        self.guessed = 0
        self.left_out = 0
        self._answers = _Answers()
        for each in recorded:
            self._answers.learn(each)
        shift_ns, before_ns = -recorded[0].at_ns, 0
        for each in recorded:
            if each.at_ns + shift_ns < before_ns:  # another life of the process, with its own clock
                shift_ns = before_ns - each.at_ns
            before_ns = each.at_ns + shift_ns
            self._take_in(each, before_ns)

    def sent(self, open_loop: bool) -> Iterator[Arrival]:
        return iter(self.arrivals) if open_loop else (replace(each, at_ns=None) for each in self.arrivals)

    def _take_in(self, recorded: Recorded, at_ns: int) -> None:
        name = self._name_of(recorded.received.adapter)
        if name is None:
            self.left_out += 1
            return
        self.names[recorded.life, recorded.received.request] = name
        self.guessed += recorded.output_tokens is None
        asked = max(1, recorded.received.output_tokens_max)
        answer = min(asked, max(1, self._answers.expected(recorded)))
        sent = Arrival(
            at_ns,
            name,
            max(1, recorded.received.input_tokens),
            answer,
            asked,
            recorded.received.tenant,
            recorded.received.klass,
        )
        self.arrivals.append(sent)

    def _name_of(self, reference: str) -> str | None:
        """Return the simulated name of a version and note it, or None for an unregistered one."""
        name, selector = Reference.of(reference)
        registered = self._setting.adapters.get(name)
        if registered is None:
            return "" if reference in BASE_NAMES else None
        versions = {version.ordinal: version.adapter for version in registered.versions}
        ordinal: int | None = registered.current
        if selector:
            ordinal = selected(selector, ((number, adapter.digest) for number, adapter in versions.items()))
        if ordinal is None:
            return None
        label = name if ordinal == registered.current else f"{name}/v{ordinal}"
        self.adapters[label] = versions[ordinal]
        return label

    def notes(self) -> Iterator[str]:
        if self.guessed:
            yield f"the journal lacks the answers of {count(self.guessed, 'request')}; the means of others are taken"
        if self.left_out:
            yield f"{count(self.left_out, 'request')} for adapters that were not registered left out"


@dataclass
class _Answers:
    """The lengths of answers, by adapter and overall."""

    tokens: dict[str, int] = field(default_factory=dict)
    known: dict[str, int] = field(default_factory=dict)

    def learn(self, recorded: Recorded) -> None:
        if recorded.output_tokens is not None:
            for key in dict.fromkeys(("", recorded.received.adapter)):
                self.tokens[key] = self.tokens.get(key, 0) + recorded.output_tokens
                self.known[key] = self.known.get(key, 0) + 1

    def expected(self, recorded: Recorded) -> int:
        """Return an answer's length; if unknown, the mean; without a mean, the requested length."""
        if recorded.output_tokens is not None:
            return recorded.output_tokens
        key = recorded.received.adapter if recorded.received.adapter in self.known else ""
        return round(self.tokens[key] / self.known[key]) if key in self.known else recorded.received.output_tokens_max


def _pool(options: Options, setting: Setting, load: _Load) -> tuple[Setup, tuple[str, ...]]:
    facts = next(iter(setting.backends.values()))
    flavour = options.engine or flavour_of(facts.kind, EngineSetup.flavour)
    rank = max((adapter.rank_max for adapter in load.adapters.values()), default=EngineSetup.rank)
    cost = cost_of(options, flavour, facts.rank_max or rank)
    sizes = Sizes(options.seats, options.slots, options.host_slots)
    engine, is_alike = recorded_engine(facts, load.adapters, cost, flavour, sizes)
    pool = Setup(
        engine=engine,
        engines=options.backends or len(setting.backends),
        in_flight=options.in_flight or 1,
        adapters=load.adapters if is_alike else {},
    )
    return pool, (*load.notes(), *_pool_notes(setting.backends, engine, is_alike))


def _pool_notes(backends: dict[str, EngineFacts], engine: EngineSetup, is_alike: bool) -> Iterator[str]:
    first, *others = backends
    differing = [name for name in others if backends[name] != backends[first]]
    if differing:
        yield f"{', '.join(differing)} differ from {first}; all are simulated as {first} is"
    if not is_alike:
        yield f"engines are simulated as {engine.shape.name} with {engine.slots:,} slots, whatever they were built as"


def _sidecar(options: Options, order: str, config: CoreConfig) -> Sidecar | None:
    """Return the live run's sidecar, with the options' changes."""
    if order == BARE:
        return None
    ran = Sidecar(
        ordering=order,
        routing=config.routing,
        eviction=config.eviction,
        prefetch=config.prefetch,
        store_bytes=config.store_bytes,
        classes={name: class_limit(options, limit) for name, limit in config.classes.items()},
        queued_max=config.queued_max,
        tenant_weights=config.tenant_weights,
    )
    return replace(ran, **given_policies(options))


# The live run.


def _live(path: Path, recorded: Sequence[Recorded], load: _Load) -> Figures:
    """Return the figures of the live run, as far as a journal holds them."""
    arrived_ns = {(each.life, each.received.request): each.at_ns for each in recorded}
    waits_s: dict[str, list[float]] = {"all": [], "hot": [], "cold": []}
    hot = hot_of(list(load.names.values()))
    ended_ns = answered = tokens = 0
    with opened(path) as place:
        for line in lines_of(segments_of(place), ("FirstToken", "RunEnded")):
            key = (line.life, line.event.request)
            if key not in arrived_ns:
                continue
            if isinstance(line.event, RunEnded):
                answered, tokens = answered + 1, tokens + line.event.output_tokens
                ended_ns = max(ended_ns, line.at_ns)
                continue
            wait_s = (line.at_ns - arrived_ns[key]) / SECOND_NS
            for group in ("all", "hot" if load.names.get(key) in hot else "cold"):
                waits_s[group].append(wait_s)
    seconds = max(1, ended_ns - recorded[0].at_ns) / SECOND_NS
    return {
        "label": LIVE,
        "throughput_tokens_per_s": tokens / seconds,
        "wait_s": percentiles({name: sorted(values) for name, values in waits_s.items()}),
        "requests": {"offered": len(recorded), "answered": answered},
        "simulated_s": seconds,
    }
