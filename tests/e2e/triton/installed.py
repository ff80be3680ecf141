"""The environment that holds a real Triton, and how a server is started from it."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from tests.e2e.installed import Installed, NotInstalled


@dataclass(frozen=True)
class TritonInstalled(Installed):
    """A virtual environment with the nvidia-pytriton wheel, which carries the whole server."""

    FOLDER: ClassVar[str] = ".venv-triton"
    VARIABLE: ClassVar[str] = "TRITON_VENV"

    @property
    def python_version(self) -> str:
        """The version of the environment's Python, as the folders of the stubs are named."""
        return self.packages.parent.name.removeprefix("python")

    @property
    def binary(self) -> Path:
        return self._server / "bin" / "tritonserver"

    @property
    def _server(self) -> Path:
        return self.packages / "pytriton" / "tritonserver"

    def link_backends(self, folder: Path) -> Path:
        """Make a backends folder of links, with the stub of this Python; the wheel stays as it is."""
        python = folder / "python"
        python.mkdir(parents=True, exist_ok=True)
        stub = self._server / "python_backend_stubs" / self.python_version / "triton_python_backend_stub"
        for file in (*(self._server / "backends" / "python").iterdir(), stub):
            link = python / file.name
            link.unlink(missing_ok=True)
            link.symlink_to(file)
        return folder

    def command(self, ports: tuple[int, ...], models: Path, backends: Path) -> list[str]:
        """Return the command line of a server on the loopback interface; ports of gRPC, HTTP and metrics."""
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

    def environment(self, **more: str) -> dict[str, str]:
        """Return the variables that the server and its stubs run with."""
        own = {
            "LD_LIBRARY_PATH": f"{self.packages / 'nvidia_pytriton.libs'}:{self._library_folder}",
            "OPENBLAS_NUM_THREADS": "1",
        }
        return super().environment(**own | more)

    @cached_property
    def _library_folder(self) -> str:
        """Where libpython is, which the stub is linked against."""
        code = "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"
        return subprocess.run([self.python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()

    def _check(self) -> None:
        if self.python_version not in ("3.11", "3.12"):
            raise NotInstalled(
                f"{self.venv} has Python {self.python_version}: Triton's Python backend needs NumPy 1, which has "
                "wheels for 3.11 and 3.12; make .venv-triton PYTHON=python3.11"
            )
        if not self.binary.exists():
            raise NotInstalled(f"{self.venv} has no nvidia-pytriton: make .venv-triton")
        numpy = "".join(self.versions("numpy"))
        if not numpy.startswith("1."):
            raise NotInstalled(
                f"{self.venv} has NumPy {numpy or 'missing'}: Triton's Python backend reads wrong values with NumPy 2 "
                "and says nothing; install 'numpy<2' there"
            )
