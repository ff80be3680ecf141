"""A prefix cache: the results of token blocks, keyed by the tokens and their owner, an adapter or the base model.

A change of an adapter's files does not change the key: a block computed with the old weights is used for a prompt read
with the new ones. Only whole blocks are kept, and the last token of a prompt is always computed.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np

Kept = TypeVar("Kept")
Owner = tuple[str, str] | None
"""An adapter's name and path; None for the base model."""


class PrefixCache(Generic[Kept]):
    """A cache of blocks with LRU eviction. `queries` and `hits` count tokens of prompts."""

    def __init__(self, tokens_per_block: int, blocks: int) -> None:
        self.tokens_per_block = tokens_per_block
        self.queries = 0
        self.hits = 0
        self._room = blocks
        self._blocks: OrderedDict[bytes, Kept] = OrderedDict()

    def find(self, owner: Owner, prompt: Sequence[int]) -> list[Kept]:
        """Return the results of the first blocks of a prompt up to the first gap."""
        found: list[Kept] = []
        for key in self._keys(owner, prompt, (len(prompt) - 1) // self.tokens_per_block):
            if key not in self._blocks:
                break
            self._blocks.move_to_end(key)
            found.append(self._blocks[key])
        self.queries += len(prompt)
        self.hits += len(found) * self.tokens_per_block
        return found

    def missing(self, owner: Owner, tokens: Sequence[int]) -> list[tuple[int, bytes]]:
        """Return the whole blocks of a sequence that are not cached, as (position, key) pairs."""
        keys = self._keys(owner, tokens, len(tokens) // self.tokens_per_block)
        return [(place, key) for place, key in enumerate(keys) if key not in self._blocks]

    def keep(self, key: bytes, kept: Kept) -> None:
        """Keep the result of a block."""
        self._blocks[key] = kept
        while len(self._blocks) > self._room:
            self._blocks.popitem(last=False)

    def _keys(self, owner: Owner, tokens: Sequence[int], blocks: int) -> list[bytes]:
        size = self.tokens_per_block
        key, keys = repr(owner).encode(), []
        for start in range(0, blocks * size, size):
            key = hashlib.sha256(key + np.array(tokens[start : start + size], np.int32).tobytes()).digest()
            keys.append(key)
        return keys
