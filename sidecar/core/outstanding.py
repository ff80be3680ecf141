"""What is outstanding at one backend, queued and running, counted incrementally."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from sidecar.core.pace import Demand

WEIGHT_UNITS = 1_000_000


@dataclass(slots=True)
class Outstanding:
    """Sums over a backend's requests. `expected_tokens` are those still expected to be generated."""

    requests: int = 0
    input_tokens: int = 0
    expected_tokens: int = 0
    queued_tokens: int = 0
    """The part of `expected_tokens` of queued requests."""
    guessed: int = 0
    """How many queued requests have a length that is a guess."""
    unsure_tokens: int = 0
    """The part of `queued_tokens` that is not sure, all of theirs included."""
    footprint_tokens: int = 0
    tenants: dict[str, int] = field(default_factory=dict)
    """Expected tokens plus the number of requests of each tenant that has any."""
    weights: dict[str, float] = field(default_factory=dict)
    """The weights of the same tenants."""
    weight_units: int = field(init=False, metadata={"derived": True})
    """The sum of the weights in units of 1/WEIGHT_UNITS: an integer, so the order of additions does not matter."""
    lengths: dict[int, int] = field(default_factory=dict)
    """How many requests may generate up to this many tokens, rounded up to three significant bits."""

    def __post_init__(self) -> None:
        self.weight_units = sum(map(_units, self.weights.values()))

    def add(self, tenant: str, weight: float, input_tokens: int, expected_tokens: int, tokens_max: int) -> None:
        """Count a request that is queued."""
        self.requests += 1
        self.input_tokens += input_tokens
        self.expected_tokens += expected_tokens
        self.queued_tokens += expected_tokens
        self.footprint_tokens += input_tokens + tokens_max
        if tenant not in self.tenants:
            self.weights[tenant] = weight
            self.weight_units += _units(weight)
        self.tenants[tenant] = self.tenants.get(tenant, 0) + expected_tokens + 1
        length = rounded_up(tokens_max)
        self.lengths[length] = self.lengths.get(length, 0) + 1

    def doubt(self, unsure_tokens: int, guessed: bool) -> None:
        """Note what of a queued request is not sure."""
        self.unsure_tokens += unsure_tokens
        self.guessed += guessed

    def left_queue(self, expected_tokens: int, unsure_tokens: int, guessed: bool) -> None:
        """Count a request as queued no longer; it is still outstanding."""
        self.queued_tokens -= expected_tokens
        self.unsure_tokens -= unsure_tokens
        self.guessed -= guessed

    def reweigh(self, weight_of: Callable[[str], float]) -> bool:
        """Take changed weights; return True if the share of any tenant here has changed."""
        weights = {tenant: weight_of(tenant) for tenant in self.weights}
        if weights == self.weights:
            return False
        self.weights = weights
        self.weight_units = sum(map(_units, weights.values()))
        return True

    def remove(self, tenant: str, input_tokens: int, expected_tokens: int, tokens_max: int) -> None:
        """Forget a request that has ended; `expected_tokens` is what it was still expected to generate."""
        self.requests -= 1
        self.input_tokens -= input_tokens
        self.expected_tokens -= expected_tokens
        self.footprint_tokens -= input_tokens + tokens_max
        self._take_from_tenant(tenant, expected_tokens + 1)
        length = rounded_up(tokens_max)
        self.lengths[length] -= 1
        if not self.lengths[length]:
            del self.lengths[length]

    def generated(self, tenant: str, tokens: int) -> None:
        """Subtract expected tokens that have arrived."""
        self.expected_tokens -= tokens
        self.tenants[tenant] -= tokens

    @property
    def longest_tokens(self) -> int:
        """The longest output that any of them may generate, rounded up."""
        return max(self.lengths, default=1)

    def demand(self, versions: int) -> Demand:
        """Return the sums in the form from which an engine's pace is computed."""
        return Demand(self.requests, self.input_tokens, self.expected_tokens, self.footprint_tokens, versions)

    def share_of(self, tenant: str) -> float:
        """Return a tenant's share of the engine among tenants with something outstanding, from 0 to 1."""
        return _units(self.weights[tenant]) / self.weight_units

    def _take_from_tenant(self, tenant: str, tokens: int) -> None:
        left = self.tenants[tenant] - tokens
        if left:
            self.tenants[tenant] = left
        else:
            del self.tenants[tenant]
            self.weight_units -= _units(self.weights.pop(tenant))


def _units(weight: float) -> int:
    return max(1, round(weight * WEIGHT_UNITS))


def rounded_up(tokens: int) -> int:
    """Return a number rounded up to three significant bits: four values per octave."""
    dropped_bits = max(0, tokens.bit_length() - 3)
    return -(-tokens >> dropped_bits) << dropped_bits
