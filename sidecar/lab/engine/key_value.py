"""Keys and values of the running sequences, kept so that a decode step reads many sequences at once.

Sequences of similar length share a *shelf*: one array with a seat for each. A sequence that outgrows its
shelf moves to the next, twice as deep. So a batch of n sequences costs one read a shelf and layer instead of
n, and no sequence is padded to more than about twice its length.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sidecar.lab.engine.rounding import Float32
from sidecar.lab.engine.shape import ModelShape

_SHALLOWEST = 64
_FIRST_SEATS = 4


@dataclass(eq=False)
class Shelf:
    """Room for sequences of up to `depth` tokens: keys, values [layer, seat, kv head, token, head size]."""

    shape: ModelShape
    depth: int
    keys: Float32 = field(init=False)
    values: Float32 = field(init=False)
    free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.keys, self.values = self._empty(_FIRST_SEATS), self._empty(_FIRST_SEATS)
        self.free = list(reversed(range(_FIRST_SEATS)))

    def _empty(self, seats: int) -> Float32:
        shape = self.shape
        return np.zeros((shape.layers, seats, shape.kv_heads, self.depth, shape.head_size), np.float32)

    def take(self) -> int:
        """Return a free seat; the shelf doubles its seats when none is free."""
        if not self.free:
            seats = self.keys.shape[1]
            self.keys = np.concatenate([self.keys, self._empty(seats)], axis=1)
            self.values = np.concatenate([self.values, self._empty(seats)], axis=1)
            self.free = list(reversed(range(seats, 2 * seats)))
        return self.free.pop()


@dataclass
class CachedSequence:
    """Where a sequence's keys and values are, and how many tokens of it are there."""

    shelf: Shelf
    seat: int
    length: int = 0


class KeyValueCache:
    """All shelves of one model."""

    def __init__(self, shape: ModelShape) -> None:
        self._shape = shape
        self._shelves: dict[int, Shelf] = {}

    def open(self, tokens: int) -> CachedSequence:
        """Return an empty place with room for so many tokens."""
        depth = max(_SHALLOWEST, 1 << (tokens - 1).bit_length())
        shelf = self._shelves.setdefault(depth, Shelf(self._shape, depth))
        return CachedSequence(shelf, shelf.take())

    def extend(self, place: CachedSequence) -> None:
        """Make room for one more token, moving the place to a deeper shelf when its own is too shallow."""
        if place.length < place.shelf.depth:
            return
        wider = self.open(place.length + 1)
        for old, new in ((place.shelf.keys, wider.shelf.keys), (place.shelf.values, wider.shelf.values)):
            new[:, wider.seat, :, : place.length] = old[:, place.seat]
        self.close(place)
        place.shelf, place.seat = wider.shelf, wider.seat

    def close(self, place: CachedSequence) -> None:
        """Give the seat back."""
        place.shelf.free.append(place.seat)


@dataclass(frozen=True)
class Group:
    """Rows of a decode step whose sequences sit on one shelf."""

    shelf: Shelf
    rows: NDArray[np.intp]
    seats: NDArray[np.intp]
    positions: NDArray[np.intp]


def grouped(places: list[CachedSequence]) -> list[Group]:
    """Return the rows of a decode step by shelf; row i belongs to place i, its new token at its length."""
    rows: dict[int, list[int]] = {}
    for row, place in enumerate(places):
        rows.setdefault(place.shelf.depth, []).append(row)
    return [
        Group(
            shelf=places[members[0]].shelf,
            rows=np.array(members, np.intp),
            seats=np.array([places[row].seat for row in members], np.intp),
            positions=np.array([places[row].length for row in members], np.intp),
        )
        for members in rows.values()
    ]
