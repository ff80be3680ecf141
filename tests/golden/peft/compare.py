"""Compares golden adapters made anew with those checked in: `python compare.py NEW OLD`; exit 1 if they differ.

Sums may be added up in another order on another machine, so deltas are compared to float32's precision; all else must
be equal, but for the versions of the libraries and the fields that newer ones add without setting them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

TOLERANCE = 2.0**-18


def main() -> int:
    new, old = Path(sys.argv[1]), Path(sys.argv[2])
    differences = _names(new, old)
    for folder in sorted(path for path in old.iterdir() if (new / path.name).is_dir()):
        differences += [f"{folder.name}: {what}" for what in compare(new / folder.name, folder)]
    print("\n".join(differences) or f"{len(list(old.iterdir()))} golden adapters are as PEFT makes them")
    return 1 if differences else 0


def _names(new: Path, old: Path) -> list[str]:
    made, kept = ({path.name for path in folder.iterdir()} for folder in (new, old))
    return [f"{name}: made anew but not checked in, or the other way round" for name in sorted(made ^ kept)]


def compare(new: Path, old: Path) -> list[str]:
    """Return what differs between two folders of one case."""
    differences = []
    for path in sorted(old.rglob("*")):
        twin = new / path.relative_to(old)
        if path.suffix == ".safetensors" and not _same_bytes(path, twin):
            differences.append(f"{path.name} holds other values")
        elif path.name == "adapter_config.json" and _set_fields(path) != _set_fields(twin):
            differences.append(f"{path.name} differs")
    return differences + _deltas(new / "delta.npz", old / "delta.npz")


def _same_bytes(path: Path, twin: Path) -> bool:
    return twin.exists() and path.read_bytes() == twin.read_bytes()


def _set_fields(path: Path) -> dict[str, Any]:
    fields = json.loads(path.read_text())
    return {
        name: value for name, value in fields.items() if name != "peft_version" and value not in (None, False, {}, [])
    }


def _deltas(new: Path, old: Path) -> list[str]:
    with np.load(new) as made, np.load(old) as kept:
        if sorted(made) != sorted(kept):
            return ["its deltas are of other modules"]
        return [
            f"the delta of {name} differs"
            for name in sorted(kept)
            if np.abs(made[name] - kept[name]).max() > TOLERANCE * np.abs(kept[name]).max()
        ]


if __name__ == "__main__":
    sys.exit(main())
