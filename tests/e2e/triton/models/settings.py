"""What a model of the repository is told beside its config.pbtxt: a JSON file in its version's folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from sidecar.lab.engine.kserve.options import Options

FILE = "emulator.json"


@dataclass(frozen=True)
class Settings:
    """The engine's options, and how its model behaves.

    `options` are the fields of `face.Options` that differ from the defaults.
    """

    options: dict[str, Any] = field(default_factory=dict)

    def engine_options(self) -> Options:
        """Return the options of the engine. Raises ValueError where they contradict each other."""
        kinds = {one.name: str(one.type) for one in fields(Options)}
        return Options(**{name: _restored(kinds[name], value) for name, value in self.options.items()})

    def write(self, folder: Path) -> None:
        """Write the file into a version's folder."""
        (folder / FILE).write_text(json.dumps(asdict(self), default=str, indent=1) + "\n")

    @classmethod
    def read(cls, arguments: dict[str, str]) -> Settings:
        """Return the settings of the model that Triton initializes with these arguments."""
        folder = Path(arguments["model_repository"]) / arguments["model_version"]
        return cls(**json.loads((folder / FILE).read_text()))


def _restored(kind: str, value: Any) -> Any:
    if "Path" in kind and value is not None:
        return Path(value)
    return tuple(value) if kind.startswith("tuple") else value
