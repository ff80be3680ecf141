"""Whether an adapter can change an answer at all, by its weights alone."""

from __future__ import annotations

from pathlib import Path

from sidecar.adapters.peft import read_adapter
from sidecar.adapters.values import check_values


def changes_something(folder: Path, adapter: str) -> bool:
    """Whether scale · B·A can be other than zero in some module.

    Reads every byte, so it belongs in a thread. Raises Invalid.
    """
    with read_adapter(folder, name=adapter) as source:
        largest = check_values(source)
        pairs = [pair for target in source.targets for pair in target.pairs]
        return any(pair.scale and largest[pair.a.name] and largest[pair.b.name] for pair in pairs)
