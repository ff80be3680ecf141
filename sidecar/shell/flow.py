"""What flows through the pool: tokens a second by backend, adapter and tenant, and what was open in each slot."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sidecar.backends.api import Backend, Ticket
from sidecar.core.effects import Dispatch, Effect, Settle
from sidecar.core.events import Event, Progress
from sidecar.core.state import State

WINDOW_NS = 5_000_000_000
"""Rates are means over this time."""
LANES_SECONDS = 60
"""How far back lanes reach."""


@dataclass
class Tokens:
    """Tokens: in all, and by the id of a backend and the name of an adapter and of a tenant."""

    total: float = 0
    backends: dict[str, float] = field(default_factory=dict)
    adapters: dict[str, float] = field(default_factory=dict)
    tenants: dict[str, float] = field(default_factory=dict)

    def add(self, run: _Run, tokens: int) -> None:
        self.total += tokens
        parts = (self.backends, run.backend), (self.adapters, run.adapter), (self.tenants, run.tenant)
        for counts, name in parts:
            counts[name] = counts.get(name, 0) + tokens


@dataclass
class Rates:
    """Tokens a second, as `Tokens`; None where all that runs answers at once, so that nobody has counted any."""

    total: float | None
    backends: dict[str, float | None]
    adapters: dict[str, float | None]
    tenants: dict[str, float | None]


@dataclass(slots=True)
class _Run:
    backend: str
    adapter: str
    tenant: str
    tokens: int = 0
    """Those that reports of progress have brought."""


class TokenRates:
    """An observer that counts tokens as they come. Install it while somebody looks.

    Tokens count when a report of progress brings them; the rest of an answer counts when it ends. An engine that counts
    its tokens knows its rate better.
    """

    def __init__(self, state: State, tickets: Mapping[int, Ticket], backends: Mapping[str, Backend]) -> None:
        self._state = state
        self._tickets = tickets
        self._backends = backends
        self._runs: dict[int, _Run] = {}
        self._slices: deque[tuple[int, Tokens]] = deque()
        """What came since each time, the oldest first; a slice takes a second."""
        self._begun_ns: int | None = None

    def observed(self, event: Event, effects: Sequence[Effect], now_ns: int) -> None:
        if isinstance(event, Progress):
            for request, tokens in event.tokens.items():
                self._came(request, tokens, now_ns)
        for effect in effects:
            if isinstance(effect, Dispatch):
                self._run_of(effect.request)
            elif isinstance(effect, Settle):
                run = self._runs.pop(effect.request, None)
                if run is not None and effect.output_tokens > run.tokens:
                    self._slice(now_ns).add(run, effect.output_tokens - run.tokens)

    def rates(self, now_ns: int) -> Rates | None:
        """Return tokens a second over the last seconds, or None if less than a second was watched."""
        self._slice(now_ns)
        while self._slices[0][0] < now_ns - WINDOW_NS:
            self._slices.popleft()
        assert self._begun_ns is not None
        watched_ns = min(now_ns - self._begun_ns, WINDOW_NS)
        if watched_ns < 1_000_000_000:
            return None
        seconds, slices = watched_ns / 1e9, [tokens for _, tokens in self._slices]
        counted = _rates((tokens.backends for tokens in slices), seconds)
        known = ((name, backend.signs().tokens_per_s) for name, backend in self._backends.items())
        measured = {name: rate for name, rate in known if rate is not None}
        total = sum(tokens.total for tokens in slices) / seconds
        total += sum(rate - counted.get(name, 0) for name, rate in measured.items())
        runs = [self._state.requests[each] for backend in self._state.backends.values() for each in backend.running]
        at_once = [each.id in self._tickets and self._tickets[each.id].is_whole for each in runs]
        adapters = _rates((tokens.adapters for tokens in slices), seconds)
        tenants = _rates((tokens.tenants for tokens in slices), seconds)
        return Rates(
            None if not total and at_once and all(at_once) and not measured else total,
            {**_known(counted, (each.backend or "" for each in runs), at_once), **measured},
            _known(adapters, (each.view.name for each in runs), at_once),
            _known(tenants, (each.view.tenant for each in runs), at_once),
        )

    def _came(self, request: int, tokens: int, now_ns: int) -> None:
        run = self._run_of(request)
        if run is not None and tokens:
            run.tokens += tokens
            self._slice(now_ns).add(run, tokens)

    def _run_of(self, request: int) -> _Run | None:
        known = self._runs.get(request)
        if known is None and (held := self._state.requests.get(request)) is not None:
            known = self._runs[request] = _Run(held.backend or "", held.view.name, held.view.tenant)
        return known

    def _slice(self, now_ns: int) -> Tokens:
        """Return where tokens that come now are counted."""
        if self._begun_ns is None:
            self._begun_ns = now_ns
        if not self._slices or now_ns - self._slices[-1][0] >= 1_000_000_000:
            self._slices.append((now_ns, Tokens()))
        return self._slices[-1][1]


def _rates(slices: Iterable[Mapping[str, float]], seconds: float) -> dict[str, float]:
    rates: dict[str, float] = {}
    for counts in slices:
        for name, tokens in counts.items():
            rates[name] = rates.get(name, 0) + tokens / seconds
    return rates


def _known(rates: dict[str, float], names: Iterable[str], at_once: Sequence[bool]) -> dict[str, float | None]:
    """Return the rates, None in place of 0 where all runs of a name answer at once."""
    silent: dict[str, bool] = {}
    for name, is_whole in zip(names, at_once, strict=True):
        silent[name] = silent.get(name, True) and is_whole
    return {**rates, **{name: None for name, is_silent in silent.items() if is_silent and not rates.get(name)}}


class Lanes:
    """What was open in the slots of each backend in the last minute. `sample` is called once a second.

    A version keeps its lane while it is open; one that opens takes the first free lane.
    """

    def __init__(self, state: Callable[[], State]) -> None:
        self._state = state
        self._samples: dict[str, deque[tuple[str, ...]]] = {}

    def sample(self) -> None:
        """Note what is open now."""
        backends = self._state().backends
        for gone in self._samples.keys() - backends.keys():
            del self._samples[gone]
        for backend in backends.values():
            samples = self._samples.setdefault(backend.id, deque(maxlen=LANES_SECONDS))
            samples.append(_placed(samples[-1] if samples else (), backend.slots))

    def of(self, backend: str) -> list[list[str]]:
        """Return the lanes of a backend: in each the versions by second, the oldest first; "" while it was free."""
        samples = self._samples.get(backend, ())
        count = max(map(len, samples), default=0)
        return [[sample[lane] if lane < len(sample) else "" for sample in samples] for lane in range(count)]


def _placed(before: tuple[str, ...], held: Mapping[str, object]) -> tuple[str, ...]:
    """Return which version is in which lane; the last lane is in use."""
    if len(held) == sum(map(bool, before)) and all(version in held for version in before if version):
        return before  # the same tuple: a minute without a change takes the memory of one sample
    lanes = [version if version in held else "" for version in before]
    for version in held:
        if version not in lanes:
            if "" in lanes:
                lanes[lanes.index("")] = version
            else:
                lanes.append(version)
    while lanes and not lanes[-1]:
        lanes.pop()
    return tuple(lanes)
