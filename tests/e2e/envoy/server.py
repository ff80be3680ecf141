"""A real Envoy in front of a sidecar's endpoint picker."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from sidecar.fronts.extproc.bootstrap import bootstrap
from tests.e2e.envoy import guard
from tests.e2e.installed import Installed, NotInstalled
from tests.e2e.server import Server


class EnvoyInstalled(Installed):
    """The environment that holds Envoy's binary."""

    FOLDER, VARIABLE = ".venv-envoy", "ENVOY_VENV"

    @property
    def binary(self) -> Path:
        return self.venv / "bin" / "envoy"

    def _check(self) -> None:
        if not self.binary.exists():
            raise NotInstalled(f"no Envoy in {self.venv}: make {self.FOLDER}, or set {self.VARIABLE}")


class EnvoyServer(Server):
    """One Envoy, with the bootstrap that `sidecar envoy config` prints for one picker, or for the replicas' pickers.

    `changed` may change it.
    """

    NAME = "envoy"
    START_S = 30.0
    PORTS = 2
    NOISE = re.compile(r"\]\[(?:info|debug)\]")
    GUARD = guard

    def __init__(
        self,
        folder: Path,
        picker: str | Sequence[str],
        request_mode: str = "FULL_DUPLEX_STREAMED",
        response_mode: str = "STREAMED",
        changed: Callable[[dict[str, Any]], None] = lambda record: None,
        data: str | None = None,
        carries_calls: bool = False,
    ) -> None:
        super().__init__(folder, None)
        self.installed = EnvoyInstalled.find()
        self._pickers = [picker] if isinstance(picker, str) else picker
        self._modes, self._changed = (request_mode, response_mode), changed
        self._data, self._carries_calls = () if data is None else (data,), carries_calls

    @property
    def address(self) -> str:
        """Host and port for clients."""
        return self._address(0)

    @property
    def admin(self) -> str:
        return self._address(1)

    async def stats(self, part: str) -> dict[str, int]:
        """Return Envoy's counters whose names have this part."""
        async with httpx.AsyncClient(trust_env=False) as client:
            text = (await client.get(f"http://{self.admin}/stats", params={"filter": part})).text
        found = dict(line.rsplit(": ", 1) for line in text.splitlines() if ": " in line)
        return {name: int(value) for name, value in found.items() if value.isdigit()}

    @property
    def _mark(self) -> str:
        return "envoy"

    @property
    def _ready_url(self) -> str:
        return f"http://{self.admin}/ready"

    def _prepare(self) -> Path:
        assert self._ports is not None
        clients, admin = self._ports
        record = bootstrap(
            clients, self._pickers, *self._modes, admin_port=admin, host="127.0.0.1", data=self._data,
            carries_calls=self._carries_calls,
        )  # fmt: skip
        self._changed(record)
        (self.folder / "envoy.json").write_text(json.dumps(record))
        return self.folder

    def _command(self) -> list[str]:
        # Without its own hot-restart region two Envoys of a machine would be one.
        return [
            str(self.installed.binary),
            "-c",
            "envoy.json",
            "--concurrency",
            "1",
            "--disable-hot-restart",
            "-l",
            "warn",
        ]

    def _environment(self) -> dict[str, str]:
        return self.installed.environment()
