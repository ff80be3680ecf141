"""From a checked PEFT folder to what the core and the registry keep of it: identity and shape, no weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sidecar.adapters.peft import read_adapter
from sidecar.adapters.values import check_values
from sidecar.core.facts import Adapter, Row


@dataclass(frozen=True)
class Registration:
    """What a registration found in a folder."""

    adapter: Adapter
    size_bytes: int


def read_registration(name: str, directory: Path) -> Registration:
    """Read and check a folder. Raises Invalid with what is wrong with it. Reads every byte: run it in a thread."""
    with read_adapter(directory, name=name) as source:
        check_values(source)
        rows = tuple(
            Row(target.module, target.module_id, target.layer, target.rank, target.in_dim, target.out_dim)
            for target in source.targets
        )
        dtype = source.targets[0].dtype
        return Registration(Adapter(source.digest, source.base_model, rows, dtype), source.size_bytes)
