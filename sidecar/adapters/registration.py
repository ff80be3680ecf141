"""Read from a PEFT folder what the core and the registry keep of it: identity and shapes, no weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sidecar.adapters.base_model import BaseModel
from sidecar.adapters.folder import Folder
from sidecar.adapters.peft import AdapterSource, read_adapter
from sidecar.adapters.values import check_values
from sidecar.core.facts import Adapter, Row


@dataclass(frozen=True)
class Registration:
    """The adapter in a folder, and the size of its files."""

    adapter: Adapter
    size_bytes: int


def read_registration(
    name: str, directory: Path | Folder, *, base_model: str | None = None, base: BaseModel | None = None
) -> Registration:
    """Read and check a folder. Reads every byte: call it in a thread. Raises Invalid with the fault.

    `base_model` replaces the name in the config; every tensor is checked against `base`.
    """
    with read_adapter(directory, name=name, base_model=base_model, base=base) as source:
        check_values(source)
        return Registration(adapter_of(source), source.size_bytes)


def adapter_of(source: AdapterSource) -> Adapter:
    """Return the identity and shapes of a source; its dtype is F32 where the tensors' dtypes differ."""
    rows = tuple(
        Row(target.module, target.module_id, target.layer, target.rank, target.in_dim, target.out_dim)
        for target in source.targets
    )
    dtypes = sorted({target.dtype for target in source.targets})
    return Adapter(source.digest, source.base_model, rows, dtypes[0] if len(dtypes) == 1 else "F32")


def changes_something(folder: Path | Folder, adapter: str) -> bool:
    """Return True if scale · B·A can differ from zero in some module.

    Reads every byte: call it in a thread. Raises Invalid for a faulty adapter.
    """
    with read_adapter(folder, name=adapter) as source:
        largest = check_values(source)
        pairs = [pair for target in source.targets for pair in target.pairs]
        return any(pair.scale and largest[pair.a.name] and largest[pair.b.name] for pair in pairs)
