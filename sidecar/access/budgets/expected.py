"""Learn what requests take on average, because nobody knows before what one of them will take."""

from __future__ import annotations

import math

KEPT = 0.998
"""What remains of a request's weight with each later one: a mean follows the last few hundred requests."""
FIRST = 4
"""How many requests' weight the value that is assumed at first has."""
OUTPUT_TOKENS_FIRST = 64
"""What a request without a length is expected to generate before anything is known."""
TOKENS_PER_BYTE_FIRST = 0.25


class Mean:
    """A moving ratio of two sums: unlike a mean of ratios, it is right for the sum over requests of all sizes."""

    __slots__ = ("_first", "_of", "_sum")

    def __init__(self, first: float) -> None:
        self._first = first
        self._sum = self._of = 0.0

    @property
    def value(self) -> float:
        return self._sum / self._of if self._of else self._first

    def expect(self, of: float) -> int:
        """Return what is expected of a request whose known size is `of`."""
        return math.ceil(of * self.value)

    def learn(self, was: float, of: float, weight: float = 1.0) -> None:
        """Note what a request of size `of` has taken."""
        if not self._of:
            self._sum, self._of = FIRST * of * self._first, FIRST * of
        self._sum = KEPT * self._sum + was * weight
        self._of = KEPT * self._of + of * weight

    def heir(self) -> Mean:
        """Return a mean that begins with this one's value."""
        return Mean(self.value)


class Expected:
    """What requests are expected to take.

    `outputs` are tokens generated for a sequence without a length, `shares` the part of its length that one with a
    length uses, `texts` the tokens of a text for each of its bytes. At first a client that names a length is believed.

    `growth` is by how many tokens a second the answers under way outgrow what they have reserved: see `UnderWay`.
    """

    __slots__ = ("growth", "outputs", "shares", "texts")

    def __init__(
        self,
        outputs: Mean | None = None,
        shares: Mean | None = None,
        texts: Mean | None = None,
        growth: Mean | None = None,
    ) -> None:
        self.outputs = outputs or Mean(OUTPUT_TOKENS_FIRST)
        self.shares = shares or Mean(1.0)
        self.growth = growth or Mean(0.0)
        self.texts = texts or Mean(TOKENS_PER_BYTE_FIRST)

    def heir(self) -> Expected:
        """Return expectations that begin with these values and learn by themselves."""
        return Expected(self.outputs.heir(), self.shares.heir(), self.texts.heir(), self.growth.heir())


class UnderWay:
    """The answers under way of one budget, and what they will take beyond what they have reserved.

    Short answers end first. Those that are still under way are longer than the average that was reserved for them, and
    the more so the older they are. Without this, what short answers give back would be granted again, and the long ones
    would then overdraw the budget: by a tenth, if lengths differ as they do. So each is expected to outgrow its
    reservation with its age, at a rate that is right for their sum at a random moment.
    """

    __slots__ = ("_ages_from", "_count", "_reserved")

    def __init__(self) -> None:
        self._count = self._reserved = 0
        self._ages_from = 0.0

    def begin(self, tokens: int, now_s: float) -> None:
        self._count += 1
        self._reserved += tokens
        self._ages_from += now_s

    def end(self, tokens: int, began_s: float) -> None:
        self._count -= 1
        self._reserved -= tokens
        self._ages_from = self._ages_from - began_s if self._count else 0.0

    def excess(self, expected: Expected, now_s: float) -> int:
        """Return what they will take beyond their reservations; at most twice those, since engines may stand still."""
        ages_s = self._count * now_s - self._ages_from
        return max(0, min(2 * self._reserved, round(ages_s * expected.growth.value)))
