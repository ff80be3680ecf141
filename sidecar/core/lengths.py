"""How long answers are: what a request will generate, by what answers of its version were.

A client's limit is what it needs, and then its answers end there; or it is generous, and then they end by themselves,
however large it is. An answer that ended at its limit tells only that it would have been at least as long. So lengths
are estimated as lifetimes are, of which some are cut off (Kaplan and Meier, "Nonparametric Estimation from Incomplete
Observations", 1958). A fraction of the limits was used before: it is wrong as soon as clients change their limits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sidecar.core.outstanding import rounded_up

LENGTHS_KEPT = 0.99
"""The factor by which each answer reduces the weight of earlier ones."""
LEARNED = 5
"""Until so many answers have ended, their lengths say too little."""
OVERRUN, OVERRUN_SEEN, OVERRUN_KEPT = 1.5, 16, 0.98
"""Answers have become longer if the last 50 or so had this many times the tokens expected; chance does that rarely."""
WEIGHT_MAX = 1e9
NEGLIGIBLE = 1e-3


@dataclass(slots=True)
class Alike:
    """Answers of about one length: the weight of those that ended by themselves, of those cut, and their tokens."""

    ended: float = 0.0
    cut: float = 0.0
    tokens: float = 0.0

    @property
    def weight(self) -> float:
        return self.ended + self.cut

    @property
    def length(self) -> float:
        """Their mean length in tokens."""
        return self.tokens / self.weight


@dataclass(slots=True)
class Lengths:
    """The lengths of a version's answers; recent ones weigh more."""

    alike: dict[int, Alike] = field(default_factory=dict)
    """By their lengths, rounded up to three significant bits."""
    next_weight: float = 1.0
    answers: int = 0
    """How many have ended, counted up to LEARNED."""

    @property
    def known(self) -> bool:
        return self.answers >= LEARNED

    def learn(self, tokens: int, limit: int) -> None:
        """Learn from an answer that its client limited to `limit` tokens."""
        length = rounded_up(max(1, tokens))
        alike = self.alike.setdefault(length, Alike())
        if length >= rounded_up(limit):
            alike.cut += self.next_weight
        else:
            alike.ended += self.next_weight
        alike.tokens += self.next_weight * max(1, tokens)
        self.answers = min(LEARNED, self.answers + 1)
        self.next_weight /= LENGTHS_KEPT
        if self.next_weight > WEIGHT_MAX:
            self._rescale()

    def expected(self, limit: int) -> tuple[int, int]:
        """Return the expected tokens of an answer limited to `limit`, and what of it is sure; at least 1 each.

        Answers longer than any that was seen are expected to go on to the limit, which is not sure.
        """
        left = sum([alike.weight for alike in self.alike.values()])
        share, at, tokens = 1.0, 0.0, 0.0
        for length in sorted(self.alike):
            alike = self.alike[length]
            mean, weight = alike.length, alike.weight
            tokens += share * (min(mean, limit) - at)
            share, at, left = share * (1 - alike.ended / left), mean, left - weight
            if at >= limit or share < NEGLIGIBLE:
                return _whole(tokens, tokens)
        return _whole(tokens + share * (limit - at), tokens)

    def remaining(self, tokens: int, limit: int) -> float:
        """Return how many more tokens an answer is expected to have that has `tokens`, limited to `limit`.

        It goes on like those answers that were longer. If all were seen to end before, it is expected to double.
        """
        left = sum(alike.weight for alike in self.alike.values())
        share, at, more, had = 1.0, 0.0, 0.0, 1.0
        for length in sorted(self.alike):
            alike = self.alike[length]
            had = share if at <= tokens else had
            more += share * max(0.0, min(alike.length, limit) - max(at, tokens))
            share, at, left = share * (1 - alike.ended / left), alike.length, left - alike.weight
        had = share if at <= tokens else had
        if had < NEGLIGIBLE:
            return min(max(0, limit - tokens), tokens)
        return (more + share * max(0.0, limit - max(at, tokens))) / had

    def _rescale(self) -> None:
        """Divide all weights, before they grow too large, and forget what weighs nothing any more."""
        for length, alike in list(self.alike.items()):
            alike.ended, alike.cut, alike.tokens = (
                each / self.next_weight for each in (alike.ended, alike.cut, alike.tokens)
            )
            if alike.weight < NEGLIGIBLE:
                del self.alike[length]
        self.next_weight = 1.0


@dataclass(slots=True)
class Answers:
    """How many answers of adapters have ended, and their tokens; recent ones weigh more."""

    count: float = 0.0
    tokens: float = 0.0


@dataclass(slots=True)
class Overrun:
    """Tokens of a backend's ended runs, and how many had been expected; recent runs weigh more.

    Runs count whose lengths were no guess. `seen` counts them up to OVERRUN_SEEN.
    """

    expected: float = 0.0
    came: float = 0.0
    seen: int = 0

    def ended(self, expected: int, came: int) -> bool:
        """Count a run; return True if answers have become much longer than expected."""
        self.expected = OVERRUN_KEPT * self.expected + expected
        self.came = OVERRUN_KEPT * self.came + came
        self.seen = min(OVERRUN_SEEN, self.seen + 1)
        return self.seen >= OVERRUN_SEEN and self.came > OVERRUN * self.expected


def _whole(expected: float, sure: float) -> tuple[int, int]:
    return max(1, round(expected)), max(1, round(sure))
