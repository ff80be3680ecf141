"""Keys and values of the running sequences, arranged so that a decode step reads many sequences at once.

Sequences of similar length share a *shelf*: one array with a seat for each. A sequence that outgrows its shelf moves to
the next, twice as deep. So a batch of n sequences costs one read per shelf and layer instead of n, and no sequence is
padded to more than about twice its length.
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
    """Storage for sequences of up to `depth` tokens: keys and values [layer, seat, kv head, token, head size]."""

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
        """Return a free seat; the shelf doubles its seats if none is free."""
        if not self.free:
            seats = self.keys.shape[1]
            self.keys = np.concatenate([self.keys, self._empty(seats)], axis=1)
            self.values = np.concatenate([self.values, self._empty(seats)], axis=1)
            self.free = list(reversed(range(seats, 2 * seats)))
        return self.free.pop()


@dataclass
class CachedSequence:
    """The shelf and seat of a sequence's keys and values, and how many tokens of it are there."""

    shelf: Shelf
    seat: int
    length: int = 0


class KeyValueCache:
    """All shelves of one model."""

    def __init__(self, shape: ModelShape) -> None:
        self._shape = shape
        self._shelves: dict[int, Shelf] = {}

    def open(self, tokens: int) -> CachedSequence:
        """Return an empty seat for a sequence of up to `tokens` tokens."""
        depth = max(_SHALLOWEST, 1 << (tokens - 1).bit_length())
        shelf = self._shelves.setdefault(depth, Shelf(self._shape, depth))
        return CachedSequence(shelf, shelf.take())

    def extend(self, sequence: CachedSequence) -> None:
        """Make space for one more token; move the sequence to a deeper shelf if its own is full."""
        if sequence.length < sequence.shelf.depth:
            return
        wider = self.open(sequence.length + 1)
        for old, new in ((sequence.shelf.keys, wider.shelf.keys), (sequence.shelf.values, wider.shelf.values)):
            new[:, wider.seat, :, : sequence.length] = old[:, sequence.seat]
        self.close(sequence)
        sequence.shelf, sequence.seat = wider.shelf, wider.seat

    def close(self, sequence: CachedSequence) -> None:
        """Give the seat back."""
        sequence.shelf.free.append(sequence.seat)


@dataclass(frozen=True)
class Group:
    """Rows of a decode step whose sequences are on one shelf."""

    shelf: Shelf
    rows: NDArray[np.intp]
    seats: NDArray[np.intp]
    positions: NDArray[np.intp]


def grouped(sequences: list[CachedSequence]) -> list[Group]:
    """Return the rows of a decode step by shelf; row i belongs to sequence i, its new token at its length."""
    rows: dict[int, list[int]] = {}
    for row, sequence in enumerate(sequences):
        rows.setdefault(sequence.shelf.depth, []).append(row)
    return [
        Group(
            shelf=sequences[members[0]].shelf,
            rows=np.array(members, np.intp),
            seats=np.array([sequences[row].seat for row in members], np.intp),
            positions=np.array([sequences[row].length for row in members], np.intp),
        )
        for members in rows.values()
    ]
