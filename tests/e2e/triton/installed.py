"""The environment that holds a real Triton: where it is, whether it is usable, and how a server is started from it.

`make .venv-triton` makes it; TRITON_VENV names another one.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.e2e.triton.processes import Ports

ROOT = Path(__file__).parents[3]
"""The repository: the models that Triton runs import `sidecar.emulator` from it."""


class NotInstalled(Exception):
    """There is no usable Triton; the text says why and what to do."""


@dataclass(frozen=True)
class Installed:
    """A virtual environment with the nvidia-pytriton wheel, which carries the whole server."""

    venv: Path

    @classmethod
    def find(cls) -> Installed:
        """Return the environment. Raises NotInstalled when it is missing or would give wrong results."""
        installed = cls(Path(os.environ.get("TRITON_VENV") or ROOT / ".venv-triton").absolute())
        installed._check()
        return installed

    @cached_property
    def _packages(self) -> Path:
        found = sorted(self.venv.glob("lib/python3.*/site-packages"))
        if not found:
            raise NotInstalled(f"no Python environment at {self.venv}: make .venv-triton, or set TRITON_VENV")
        return found[-1]

    @property
    def python(self) -> str:
        """The version of the environment's Python, as the folders of the stubs are named."""
        return self._packages.parent.name.removeprefix("python")

    @property
    def binary(self) -> Path:
        return self._server / "bin" / "tritonserver"

    @property
    def _server(self) -> Path:
        return self._packages / "pytriton" / "tritonserver"

    def link_backends(self, folder: Path) -> Path:
        """Make a backends folder of links, with the stub of this Python; the wheel stays as it is."""
        python = folder / "python"
        python.mkdir(parents=True, exist_ok=True)
        stub = self._server / "python_backend_stubs" / self.python / "triton_python_backend_stub"
        for file in (*(self._server / "backends" / "python").iterdir(), stub):
            link = python / file.name
            link.unlink(missing_ok=True)
            link.symlink_to(file)
        return folder

    def command(self, ports: Ports, models: Path, backends: Path) -> list[str]:
        """Return the command line of a server on the loopback interface."""
        grpc_port, http_port, metrics_port = ports
        return [
            str(self.binary),
            f"--model-repository={models}",
            f"--backend-directory={backends}",
            *(f"--{service}-address=127.0.0.1" for service in ("grpc", "http", "metrics")),
            f"--grpc-port={grpc_port}",
            f"--http-port={http_port}",
            f"--metrics-port={metrics_port}",
            "--metrics-interval-ms=100",
            "--exit-timeout-secs=5",
            "--disable-auto-complete-config",
        ]

    def environment(self) -> dict[str, str]:
        """Return the variables that the server and its stubs run with."""
        libraries = f"{self._packages / 'nvidia_pytriton.libs'}:{self._library_folder}"
        return {
            **{name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ},
            "PATH": f"{self.venv / 'bin'}:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": libraries,
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }

    @cached_property
    def _library_folder(self) -> str:
        """Where libpython is, which the stub is linked against."""
        code = "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"
        command = [self.venv / "bin" / "python", "-c", code]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def _check(self) -> None:
        if self.python not in ("3.11", "3.12"):
            raise NotInstalled(
                f"{self.venv} has Python {self.python}: Triton's Python backend needs NumPy 1, which has wheels for "
                "3.11 and 3.12; make .venv-triton PYTHON=python3.11"
            )
        if not self.binary.exists():
            raise NotInstalled(f"{self.venv} has no nvidia-pytriton: make .venv-triton")
        numpy = next((path.name.split("-")[1] for path in self._packages.glob("numpy-*.dist-info")), "")
        if not numpy.startswith("1."):
            raise NotInstalled(
                f"{self.venv} has NumPy {numpy or 'missing'}: Triton's Python backend reads wrong values with NumPy 2 "
                "and says nothing; install 'numpy<2' there"
            )
