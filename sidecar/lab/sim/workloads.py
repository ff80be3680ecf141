"""Loads by name: which adapter is asked for, how much, when and by whom. The same arrivals whatever policy serves them.

Adapters, lengths, gaps and tenants are drawn from generators of their own, each seeded by the load's seed and its
purpose: changing the rate changes no length, and changing the lengths no adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice, repeat
from random import Random

from sidecar.errors import Misused, Reason
from sidecar.lab.sim import popularity

DRIFT_REQUESTS = 4000
"""The usual interval of drift, where there is any."""
LEAST_VARIATION = 1e-6
"""Less than this shows in no number of tokens, and its shape would leave the range of floating point."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a load. `at_ns` counts from the load's start."""

    at_ns: int | None
    """None in a closed loop: it is sent when a place among those in flight is free."""
    adapter: str
    """Empty for the base model."""
    input_tokens: int
    output_tokens: int
    """What the engine will generate."""
    output_tokens_max: int = 0
    """What the client asks for at most; left out, exactly what will be generated."""
    tenant: str = ""
    klass: str = "default"

    def __post_init__(self) -> None:
        if self.output_tokens_max < self.output_tokens:
            assert not self.output_tokens_max, f"{self.output_tokens} tokens generated of {self.output_tokens_max}"
            object.__setattr__(self, "output_tokens_max", self.output_tokens)


@dataclass(frozen=True)
class Workload:
    """A named load; iterating gives the arrivals anew each time, lazily: a million requests take no memory."""

    name: str
    adapters: tuple[str, ...]
    """Every adapter that may be asked for; none for a load of the base model."""
    ranks: Mapping[str, int]
    requests: int
    open_loop: bool
    """Arrivals come at their own times; otherwise each takes the place of one that has ended."""
    seed: int
    arrivals: Callable[[], Iterator[Arrival]] = field(repr=False)
    shares: Mapping[str, float] = field(default_factory=dict, repr=False)
    """Each adapter's share of the requests in the long run, before any drift."""

    def __iter__(self) -> Iterator[Arrival]:
        return self.arrivals()


@dataclass(frozen=True)
class LoadParameters:
    """What a load by name can be given; raises Misused for what makes no sense.

    A workload reads what it has a use for. Variations are coefficients of variation of gamma distributions.
    """

    adapters: int = 64
    input_tokens: int = 1024
    output_tokens: int = 1024
    input_variation: float = 0.0
    """Of the lengths; 0 is fixed."""
    output_variation: float = 0.0
    output_tokens_max: int | None = None
    """What every client asks for at most, and so the longest answer; None: each asks for what it gets."""
    requests: int = 1024
    seed: int = 1
    rate_per_s: float | None = None
    """Arrivals per second; None is a closed loop."""
    arrival_variation: float = 1.0
    """Of the gaps; 1 is Poisson."""
    skew: float | None = None
    """The exponent of `zipf` and `power`; None is the workload's own usual one."""
    drift_requests: int = 0
    """After each so many requests a tenth of the adapters swap places in random pairs; 0: never."""
    tenant_shares: tuple[float, ...] = ()
    """Tenants t0, t1, … and their shares of the arrivals, in any unit: (20, 1, 1) is one that floods."""
    ranks: tuple[int, ...] = (16,)
    """Adapters take these in equal numbers, dealt at random."""
    klass: str = "default"

    def __post_init__(self) -> None:
        for names, low, high, expected in _EXPECTED:
            for name in names:
                value = getattr(self, name)
                values = value if isinstance(value, tuple) else (value,)
                if not all(each is None or low <= each <= high for each in values):
                    raise _senseless(name, value, expected)
        if not self.ranks:
            raise _senseless("ranks", "()", "one or more")
        if self.tenant_shares and not sum(self.tenant_shares):
            raise _senseless("tenant_shares", self.tenant_shares, "one above 0")


TOKENS_MAX = 2**31 - 1
"""Of one prompt or answer: more is a mistake, not a load."""

_EXPECTED: list[tuple[tuple[str, ...], float, float, str]] = [
    (("adapters",), 1, 10_000_000, "1 to 10,000,000"),
    (("input_tokens", "output_tokens", "output_tokens_max"), 1, TOKENS_MAX, f"1 to {TOKENS_MAX:,} tokens"),
    (("requests",), 1, 1e12, "1 or more"),
    (("drift_requests",), 0, 1e12, "0 (never) or a number of requests"),
    (("ranks",), 1, 65_536, "1 to 65,536"),
    (("rate_per_s",), 1e-6, 1e9, "arrivals per second, a millionth to a thousand million"),
    (("input_variation", "output_variation", "arrival_variation"), 0, 100, "0 (fixed) to 100"),
    (("skew",), 0.001, 100, "0.001 to 100"),
    (("tenant_shares",), 0, 1e12, "shares of 0 or more"),
]
"""The fields, their least and most, and the range in words. NaN is in none."""


def _senseless(name: str, value: object, expected: str) -> Misused:
    return Misused(Reason.CONFIG_INVALID, f"{name.replace('_', '-')} {value} makes no load: expected {expected}")


Picks = Callable[[Sequence[float], Random], Iterator[int]]
"""From the shares: adapter numbers without end."""


@dataclass(frozen=True)
class Kind:
    """One workload: how often each adapter is asked for, and in what order."""

    shares: Callable[[int, float | None], list[float]]
    """From the number of adapters and the skew."""
    picks: Picks = popularity.drawn


WORKLOADS: dict[str, Kind] = {
    "base": Kind(popularity.nobody, popularity.only_one),
    "round_robin": Kind(popularity.uniform, popularity.in_turn),
    "zipf": Kind(popularity.zipf),
    "power": Kind(popularity.power),
    "two_hot": Kind(popularity.two_hot),
}
"""Every workload that can be named: a function and a line each."""


def workload(name: str, parameters: LoadParameters) -> Workload:
    """Return the load of this name. Raises Misused for a name that is not in `WORKLOADS`."""
    kind = WORKLOADS.get(name)
    if kind is None:
        raise Misused(Reason.CONFIG_INVALID, f'no workload is called "{name}"; there are {", ".join(WORKLOADS)}')
    shares = kind.shares(parameters.adapters, parameters.skew)
    adapters = adapter_names(len(shares))
    return Workload(
        name=name,
        adapters=adapters,
        ranks=dealt_ranks(adapters, parameters.ranks, parameters.seed),
        requests=parameters.requests,
        open_loop=parameters.rate_per_s is not None,
        seed=parameters.seed,
        arrivals=lambda: _arrivals(kind.picks, shares, adapters or ("",), parameters),
        shares=dict(zip(adapters, shares, strict=True)),
    )


def adapter_names(number: int) -> tuple[str, ...]:
    """Return names that sort as their numbers do: a007, and a0007 where there are more than a thousand."""
    width = max(3, len(str(number - 1)))
    return tuple(f"a{index:0{width}d}" for index in range(number))


def dealt_ranks(adapters: Sequence[str], ranks: Sequence[int], seed: int) -> dict[str, int]:
    """Return each adapter's rank: equal numbers of each, dealt at random."""
    dealt = [ranks[index % len(ranks)] for index in range(len(adapters))]
    source(seed, "ranks").shuffle(dealt)
    return dict(zip(adapters, dealt, strict=True))


def source(seed: int, purpose: str) -> Random:
    """Return the generator of one purpose; the same on every machine."""
    return Random(f"{seed} {purpose}")


def _arrivals(
    picks: Picks, shares: Sequence[float], adapters: Sequence[str], parameters: LoadParameters
) -> Iterator[Arrival]:
    seed, longest = parameters.seed, parameters.output_tokens_max
    numbers = picks(shares, source(seed, "adapters"))
    if parameters.drift_requests:
        numbers = popularity.drifting(numbers, len(adapters), parameters.drift_requests, source(seed, "drift"))
    inputs = token_counts(parameters.input_tokens, parameters.input_variation, source(seed, "input"))
    outputs = token_counts(parameters.output_tokens, parameters.output_variation, source(seed, "output"))
    tenants = tenants_of(parameters.tenant_shares, source(seed, "tenants"))
    times = times_ns(parameters.rate_per_s, parameters.arrival_variation, source(seed, "arrivals"))
    requests = islice(zip(numbers, inputs, outputs, tenants, times, strict=False), parameters.requests)
    for number, input_tokens, output_tokens, tenant, at_ns in requests:
        generated = output_tokens if longest is None else min(output_tokens, longest)
        yield Arrival(at_ns, adapters[number], input_tokens, generated, longest or generated, tenant, parameters.klass)


def tenants_of(shares: Sequence[float], random: Random) -> Iterator[str]:
    """Yield who sends each request: t0, t1, … by their shares; nobody in particular without any."""
    if not shares:
        return repeat("")
    names = [f"t{number}" for number in range(len(shares))]
    return (names[number] for number in popularity.drawn(shares, random))


def times_ns(rate_per_s: float | None, variation: float, random: Random) -> Iterator[int | None]:
    """Yield arrival times from the load's start, rising; None for ever in a closed loop."""
    if rate_per_s is None:
        return repeat(None)
    return accumulate(round(gap_s * 1e9) for gap_s in amounts(1 / rate_per_s, variation, random))


def amounts(mean: float, variation: float, random: Random) -> Iterator[float]:
    """Yield amounts of this mean and coefficient of variation without end: of tokens, of seconds between arrivals.

    The gamma family throughout: a coefficient of variation of 0 is the mean itself, 1 the exponential distribution (so
    gaps make a Poisson process), more means bursts. Shape 1/CV², scale mean · CV².
    """
    if variation < LEAST_VARIATION:
        return repeat(mean)
    shape, scale = 1 / variation**2, mean * variation**2
    return (random.gammavariate(shape, scale) for _ in repeat(None))


def token_counts(mean: int, variation: float, random: Random) -> Iterator[int]:
    """Yield whole numbers of tokens, at least 1 each, without end."""
    if variation < LEAST_VARIATION:
        return repeat(mean)
    return (max(1, round(amount)) for amount in amounts(mean, variation, random))
