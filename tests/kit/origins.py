"""Helpers for downloads: a folder to fetch, small limits, and a world in which waiting takes no time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sidecar.adapters.origins.allowing import AllowList
from sidecar.adapters.origins.fetching import fetch
from sidecar.adapters.origins.limits import Limits, Surroundings
from sidecar.adapters.origins.origin import parse_origin

LOCALHOST = ("127.0.0.1",)
LIMITS = Limits(attempts_max=3, timeout_s=10.0)


@dataclass
class World:
    """Records waits, which end at once; every name resolves to this machine, unless `addresses` says otherwise."""

    addresses: dict[str, Sequence[str]] = field(default_factory=dict)
    waits_s: list[float] = field(default_factory=list)
    resolved: list[str] = field(default_factory=list)
    now_s: float = 0.0

    def surroundings(self) -> Surroundings:
        return Surroundings(lambda: self.now_s, self._wait, lambda: 1.0, self._resolve)

    def _wait(self, seconds: float) -> None:
        self.waits_s.append(seconds)
        self.now_s += seconds

    def _resolve(self, host: str, port: int) -> list[str]:
        self.resolved.append(host)
        return list(self.addresses.get(host, LOCALHOST))


@dataclass
class Brought:
    """The result of a download."""

    directory: Path
    world: World
    progress: list[int]
    totals: list[int | None]
    size_bytes: int = 0

    def note(self, done_bytes: int, total_bytes: int | None) -> None:
        self.progress.append(done_bytes)
        self.totals.append(total_bytes)

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(self.directory.iterdir())}


def bring(url: str, directory: Path, allow: Sequence[str], world: World | None = None, **limits: Any) -> Brought:
    """Download an origin into a new directory."""
    brought = Brought(directory, world or World(), [], [])
    directory.mkdir(parents=True, exist_ok=True)
    brought.size_bytes = fetch(
        parse_origin(url),
        directory,
        Limits(**{"attempts_max": 3, "timeout_s": 10.0} | limits),
        brought.note,
        allow=AllowList.of(allow),
        surroundings=brought.world.surroundings(),
    )
    return brought


def folder_files(folder: Path) -> dict[str, bytes]:
    """Return a folder's files as `Brought.files` does."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write_shards(folder: Path) -> None:
    """Split a folder's weights file into two shards and an index, as transformers writes them."""
    import json

    import numpy as np

    from tests.kit.peft_files import read_tensors, write_safetensors

    tensors = read_tensors(folder)
    names = sorted(tensors)
    (folder / "adapter_model.safetensors").unlink()
    owners = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"adapter_model-0000{number}-of-00002.safetensors"
        write_safetensors(folder / file, {name: np.asarray(tensors[name]) for name in part})
        owners |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": owners}
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
