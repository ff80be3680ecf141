"""An environment that holds a real server: where it is, whether it is usable, and what its processes run with."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Self, TypeVar

import pytest

ROOT = Path(__file__).parents[2]
"""The repository."""


class NotInstalled(Exception):
    """There is no usable server; the text says why and what to do."""


class NotToBeHad(NotInstalled):
    """It cannot be installed here, as `make` has found when it made the environment."""


@dataclass(frozen=True)
class Installed(ABC):
    """A virtual environment of its own: `make FOLDER` makes it in the repository, VARIABLE names another one."""

    venv: Path
    FOLDER: ClassVar[str]
    VARIABLE: ClassVar[str]

    @classmethod
    def find(cls) -> Self:
        """Return the environment. Raises NotInstalled when it is missing or would give wrong results."""
        installed = cls(Path(os.environ.get(cls.VARIABLE) or ROOT / cls.FOLDER).absolute())
        installed._check()
        return installed

    @property
    def python(self) -> str:
        return str(self.venv / "bin" / "python")

    @cached_property
    def packages(self) -> Path:
        """The folder that its packages are in."""
        found = sorted(self.venv.glob("lib/python3.*/site-packages"))
        if not found:
            raise NotInstalled(f"no Python environment at {self.venv}: make {self.FOLDER}, or set {self.VARIABLE}")
        return found[-1]

    def versions(self, name: str) -> list[str]:
        """Return the installed versions of a distribution: one, or none."""
        found = self.packages.glob(f"{name}-*.dist-info")
        return [path.name.removesuffix(".dist-info").partition("-")[2] for path in found]

    def environment(self, **more: str) -> dict[str, str]:
        """Return the variables that a process of this environment runs with."""
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
        path = f"{self.venv / 'bin'}:{os.environ['PATH']}"
        return {"PATH": path, **kept, "PYTHONDONTWRITEBYTECODE": "1", **more}

    @abstractmethod
    def _check(self) -> None:
        """Raises NotInstalled."""


Kind = TypeVar("Kind", bound=Installed)


def needed(kind: type[Kind]) -> Kind:
    """Return the environment that tests need: without it they are skipped on a laptop and fail in CI.

    Where it cannot be had they are skipped everywhere, with that reason.
    """
    try:
        return kind.find()
    except NotInstalled as error:
        missing = error
    if os.environ.get("CI") and not isinstance(missing, NotToBeHad):
        pytest.fail(str(missing), pytrace=False)
    pytest.skip(str(missing))
