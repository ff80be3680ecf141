"""Learn what requests take on average, because nobody knows before what one of them will take."""

from __future__ import annotations

import math

KEPT = 0.995
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

    def learn(self, was: float, of: float) -> None:
        """Note what a request of size `of` has taken."""
        if not self._of:
            self._sum, self._of = FIRST * of * self._first, FIRST * of
        self._sum = KEPT * self._sum + was
        self._of = KEPT * self._of + of

    def heir(self) -> Mean:
        """Return a mean that begins with this one's value."""
        return Mean(self.value)


class Expected:
    """What requests are expected to take.

    `outputs` are tokens generated for a sequence without a length, `shares` the part of its length that one with a
    length uses, `texts` the tokens of a text for each of its bytes. At first a client that names a length is believed.
    """

    __slots__ = ("outputs", "shares", "texts")

    def __init__(self, outputs: Mean | None = None, shares: Mean | None = None, texts: Mean | None = None) -> None:
        self.outputs = outputs or Mean(OUTPUT_TOKENS_FIRST)
        self.shares = shares or Mean(1.0)
        self.texts = texts or Mean(TOKENS_PER_BYTE_FIRST)

    def heir(self) -> Expected:
        """Return expectations that begin with these values and learn by themselves."""
        return Expected(self.outputs.heir(), self.shares.heir(), self.texts.heir())
