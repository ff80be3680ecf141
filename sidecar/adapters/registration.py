"""From a checked PEFT folder to what the core and the registry keep of it: identity and shape, no weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sidecar.adapters.base_model import BaseModel
from sidecar.adapters.peft import AdapterSource, read_adapter
from sidecar.adapters.values import check_values
from sidecar.core.facts import Adapter, Row


@dataclass(frozen=True)
class Registration:
    """What a registration found in a folder."""

    adapter: Adapter
    size_bytes: int


def read_registration(
    name: str, directory: Path, *, base_model: str | None = None, base: BaseModel | None = None
) -> Registration:
    """Read and check a folder. Raises Invalid with what is wrong with it. Reads every byte: run it in a thread.

    `base_model` replaces the name that the config gives; every tensor is checked against `base`.
    """
    with read_adapter(directory, name=name, base_model=base_model, base=base) as source:
        check_values(source)
        return Registration(adapter_of(source), source.size_bytes)


def adapter_of(source: AdapterSource) -> Adapter:
    """Return what a source is without its weights; its dtype is F32 where tensors differ."""
    rows = tuple(
        Row(target.module, target.module_id, target.layer, target.rank, target.in_dim, target.out_dim)
        for target in source.targets
    )
    dtypes = sorted({target.dtype for target in source.targets})
    return Adapter(source.digest, source.base_model, rows, dtypes[0] if len(dtypes) == 1 else "F32")
