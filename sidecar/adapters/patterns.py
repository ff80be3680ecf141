"""PEFT's rank_pattern and alpha_pattern: the first key that matches the end of a module's name decides.

A key is a regular expression, matched as `(^|.*\\.)key$` on the module's name in the base model. Keys come
from strangers and Python's matcher can take exponential time while it holds the interpreter lock, so a key
whose worst case is not small is refused: no repeated groups, no back references or look-around, few
repetitions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from sidecar.adapters.names import shown

ENTRIES_MAX = 4096
KEY_LENGTH_MAX = 256
_COST_MAX = 64**3
_TOTAL_COST_MAX = 4 * _COST_MAX


class Pattern:
    """A compiled pattern map, in the file's order; raises ValueError for a key that is unsafe to match."""

    def __init__(self, entries: Mapping[str, float]) -> None:
        if len(entries) > ENTRIES_MAX:
            raise ValueError(f"it has {len(entries)} entries, more than the {ENTRIES_MAX} allowed")
        self.entries = tuple(entries.items())
        self._compiled = tuple((_compile(key), value) for key, value in self.entries)
        if sum(map(_cost, entries)) > _TOTAL_COST_MAX:
            raise ValueError("its regular expressions take too long together; name the modules instead")

    def value_for(self, path: str) -> float | None:
        """Return the value of the first key that matches the module's name, or None."""
        return next((value for key, value in self._compiled if key.match(path)), None)


def _compile(key: str) -> re.Pattern[str]:
    if len(key) > KEY_LENGTH_MAX:
        raise ValueError(f"the key {shown(key)} is too long")
    if _cost(key) > _COST_MAX:
        raise ValueError(f"the key {shown(key)} is a regular expression that can take too long; name the module")
    try:
        return re.compile(rf"(?:^|.*\.)(?:{key})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"the key {shown(key)} is not a regular expression ({error})") from error


def _cost(key: str) -> int:
    """Bound how many ways the matcher can try `key`: alternatives multiply, and so do repetitions."""
    bare = re.sub(r"\[\^?\]?[^\]]*\]", "c", re.sub(r"\\[^1-9]", "c", key))
    # Sets within sets mean something else in a later Python, which warns of them.
    if re.search(r"\\|\)[*+?{]|\(\?(?!:)", bare) or re.search(r"\[[^\]]*(?:\[|--|&&|~~|\|\|)", key):
        return _COST_MAX + 1
    bare = bare.replace("(?:", "(")
    cost: int = 64 ** min(4, len(re.findall(r"[*+?{]", bare)))
    for group in bare.split("("):
        cost *= group.count("|") + 1
    return cost
