"""Generate loads by name: the adapter, lengths, arrival time and tenant of each request, independent of any policy.

Adapters, lengths, gaps and tenants come from separate random generators, each seeded by the load's seed and its
purpose: changing the rate changes no length, and changing the lengths changes no adapter.

Distributions of requests over adapters, and the order in which adapters are requested.

Shares are a list indexed by the adapter's number, with the sum 1. The meaning of an exponent depends on its generator:
1 is the classic law of Zipf in `zipf`, and the uniform distribution in `power`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count, islice, pairwise, repeat
from random import Random

from sidecar.errors import Misused, Reason


def no_adapters(adapters: int, skew: float | None) -> list[float]:
    """Return no shares: a load without adapters."""
    return []


def uniform(adapters: int, skew: float | None) -> list[float]:
    """Return equal shares."""
    return [1 / adapters] * adapters


def zipf(adapters: int, skew: float | None) -> list[float]:
    """Return the shares of Zipf's law: p_i proportional to 1 / (i + 1)^a, where a is the skew or 1."""
    exponent = 1.0 if skew is None else skew
    return normal([(number + 1) ** -exponent for number in range(adapters)])


def power(adapters: int, skew: float | None) -> list[float]:
    """Return the shares of numpy's power distribution: floor(N · U^(1/a)), so p_i = ((i+1)/N)^a - (i/N)^a.

    S-LoRA's generator uses it. a is the skew or 0.3. a = 1 is uniform (unlike Zipf's 1), and a smaller a is more
    skewed: low numbers are hot.
    """
    exponent = 0.3 if skew is None else skew
    edges = [(number / adapters) ** exponent for number in range(adapters + 1)]
    return normal([high - low for low, high in pairwise(edges)])


def two_hot(adapters: int, skew: float | None) -> list[float]:
    """Return 45 % for each of two adapters and equal parts of a tenth for the others (.0167 each of six)."""
    hot, others = min(2, adapters), max(0, adapters - 2)
    return normal([0.45] * hot + [0.1 / others for _ in range(others)])


def normal(weights: Sequence[float]) -> list[float]:
    """Return the weights scaled to the sum 1."""
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def drawn(shares: Sequence[float], random: Random) -> Iterator[int]:
    """Yield numbers drawn independently by their shares."""
    bounds = list(accumulate(shares))
    last = len(shares) - 1
    return (min(bisect_right(bounds, random.random() * bounds[-1]), last) for _ in repeat(None))


def in_turn(shares: Sequence[float], random: Random) -> Iterator[int]:
    """Yield 0 to N - 1, over and over."""
    return (number % len(shares) for number in count())


def only_one(shares: Sequence[float], random: Random) -> Iterator[int]:
    """Yield 0 without end, for a load without a choice of adapters."""
    return repeat(0)


def drifting(numbers: Iterator[int], adapters: int, every: int, random: Random) -> Iterator[int]:
    """Yield the numbers renamed; after each `every` of them, a tenth of the names (at least 1 pair) swap at random."""
    renamed = list(range(adapters))
    for position, number in enumerate(numbers):
        if position and position % every == 0:
            for _ in range(max(1, adapters // 10)):
                one, other = random.randrange(adapters), random.randrange(adapters)
                renamed[one], renamed[other] = renamed[other], renamed[one]
        yield renamed[number]


DRIFT_REQUESTS = 4000
"""The default number of requests between two drifts, for a load with drift."""
LEAST_VARIATION = 1e-6
"""A smaller variation counts as 0: it changes no number of tokens, and its shape would overflow."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a load."""

    at_ns: int | None
    """The time from the load's start; None in a closed loop, in which it is sent when another request has ended."""
    adapter: str
    """Empty for the base model."""
    input_tokens: int
    output_tokens: int
    """The tokens that the engine will generate."""
    output_tokens_max: int = 0
    """The client's limit on output tokens; by default `output_tokens`."""
    tenant: str = ""
    klass: str = "default"

    def __post_init__(self) -> None:
        if self.output_tokens_max < self.output_tokens:
            assert not self.output_tokens_max, f"{self.output_tokens} tokens generated of {self.output_tokens_max}"
            object.__setattr__(self, "output_tokens_max", self.output_tokens)


@dataclass(frozen=True)
class Workload:
    """A named load. Each iteration generates the arrivals again, lazily, so a million requests take no memory."""

    name: str
    adapters: tuple[str, ...]
    """The adapters that may be requested; none for a load of the base model."""
    ranks: Mapping[str, int]
    requests: int
    open_loop: bool
    """True if requests arrive at their own times; False if each is sent when another has ended."""
    seed: int
    arrivals: Callable[[], Iterator[Arrival]] = field(repr=False)
    shares: Mapping[str, float] = field(default_factory=dict, repr=False)
    """Each adapter's expected share of the requests, before any drift."""

    def __iter__(self) -> Iterator[Arrival]:
        return self.arrivals()


@dataclass(frozen=True)
class LoadParameters:
    """The parameters of a named load. Raises Misused for a value out of range.

    Each workload uses only some of them. Variations are coefficients of variation of gamma distributions.
    """

    adapters: int = 64
    input_tokens: int = 1024
    output_tokens: int = 1024
    input_variation: float = 0.0
    """Variation of the prompts' lengths; 0 is fixed."""
    output_variation: float = 0.0
    output_tokens_max: int | None = None
    """Every client's limit on output tokens, and so the longest answer; None: the limit is the answer's length."""
    requests: int = 1024
    seed: int = 1
    rate_per_s: float | None = None
    """Arrivals per second; None is a closed loop."""
    arrival_variation: float = 1.0
    """Variation of the gaps between arrivals; 1 is a Poisson process."""
    skew: float | None = None
    """The exponent of `zipf` and `power`; None is the workload's default."""
    drift_requests: int = 0
    """The number of requests after which a tenth of the adapters swap shares in random pairs; 0: never."""
    tenant_shares: tuple[float, ...] = ()
    """The shares of the tenants t0, t1, … in the arrivals, in any unit; in (20, 1, 1) the first one floods."""
    ranks: tuple[int, ...] = (16,)
    """The adapters' ranks: each in equal numbers, assigned at random."""
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
"""The limit for one prompt or answer; more is taken as a mistake."""

_EXPECTED: list[tuple[tuple[str, ...], float, float, str]] = [
    (("adapters",), 1, 10_000_000, "1 to 10,000,000"),
    (("input_tokens", "output_tokens", "output_tokens_max"), 1, TOKENS_MAX, f"1 to {TOKENS_MAX:,} tokens"),
    (("requests",), 1, 1e12, "1 or more"),
    (("drift_requests",), 0, 1e12, "0 (never) or a number of requests"),
    (("ranks",), 1, 65_536, "1 to 65,536"),
    (("rate_per_s",), 1e-6, 1e9, "arrivals per second, 0.000001 to 1,000,000,000"),
    (("input_variation", "output_variation", "arrival_variation"), 0, 100, "0 (fixed) to 100"),
    (("skew",), 0.001, 100, "0.001 to 100"),
    (("tenant_shares",), 0, 1e12, "shares of 0 or more"),
]
"""Fields, their minimum and maximum, and the text of the range. NaN is in no range."""


def _senseless(name: str, value: object, expected: str) -> Misused:
    return Misused(Reason.CONFIG_INVALID, f"{name.replace('_', '-')} {value} is out of range: expected {expected}")


Picks = Callable[[Sequence[float], Random], Iterator[int]]
"""A function from the shares to an endless iterator of adapter numbers."""


@dataclass(frozen=True)
class Kind:
    """One kind of workload: the adapters' shares, and the order in which they are requested."""

    shares: Callable[[int, float | None], list[float]]
    """A function from the number of adapters and the skew to the shares."""
    picks: Picks = drawn


WORKLOADS: dict[str, Kind] = {
    "base": Kind(no_adapters, only_one),
    "round_robin": Kind(uniform, in_turn),
    "zipf": Kind(zipf),
    "power": Kind(power),
    "two_hot": Kind(two_hot),
}
"""The workloads by name."""


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
    """Return names that sort by number: a007, or a0007 if there are more than a thousand."""
    width = max(3, len(str(number - 1)))
    return tuple(f"a{index:0{width}d}" for index in range(number))


def dealt_ranks(adapters: Sequence[str], ranks: Sequence[int], seed: int) -> dict[str, int]:
    """Return each adapter's rank: each rank in equal numbers, assigned at random."""
    dealt = [ranks[index % len(ranks)] for index in range(len(adapters))]
    source(seed, "ranks").shuffle(dealt)
    return dict(zip(adapters, dealt, strict=True))


def source(seed: int, purpose: str) -> Random:
    """Return the random generator for one purpose; it is the same on every machine."""
    return Random(f"{seed} {purpose}")


def _arrivals(
    picks: Picks, shares: Sequence[float], adapters: Sequence[str], parameters: LoadParameters
) -> Iterator[Arrival]:
    seed, longest = parameters.seed, parameters.output_tokens_max
    numbers = picks(shares, source(seed, "adapters"))
    if parameters.drift_requests:
        numbers = drifting(numbers, len(adapters), parameters.drift_requests, source(seed, "drift"))
    inputs = token_counts(parameters.input_tokens, parameters.input_variation, source(seed, "input"))
    outputs = token_counts(parameters.output_tokens, parameters.output_variation, source(seed, "output"))
    tenants = tenants_of(parameters.tenant_shares, source(seed, "tenants"))
    times = times_ns(parameters.rate_per_s, parameters.arrival_variation, source(seed, "arrivals"))
    requests = islice(zip(numbers, inputs, outputs, tenants, times, strict=False), parameters.requests)
    for number, input_tokens, output_tokens, tenant, at_ns in requests:
        generated = output_tokens if longest is None else min(output_tokens, longest)
        yield Arrival(at_ns, adapters[number], input_tokens, generated, longest or generated, tenant, parameters.klass)


def tenants_of(shares: Sequence[float], random: Random) -> Iterator[str]:
    """Yield each request's tenant: t0, t1, … by their shares, or "" without shares."""
    if not shares:
        return repeat("")
    names = [f"t{number}" for number in range(len(shares))]
    return (names[number] for number in drawn(shares, random))


def times_ns(rate_per_s: float | None, variation: float, random: Random) -> Iterator[int | None]:
    """Yield rising arrival times from the load's start; None without end in a closed loop."""
    if rate_per_s is None:
        return repeat(None)
    return accumulate(round(gap_s * 1e9) for gap_s in amounts(1 / rate_per_s, variation, random))


def amounts(mean: float, variation: float, random: Random) -> Iterator[float]:
    """Yield numbers of this mean and coefficient of variation without end: tokens, or seconds between arrivals.

    They have a gamma distribution with shape 1/CV² and scale mean · CV². A CV of 0 is always the mean, 1 the
    exponential distribution (so that gaps make a Poisson process), and more means bursts.
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
