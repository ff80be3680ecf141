"""A sidecar that follows a cluster, with a folder of adapters, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from sidecar.kubernetes.pauses import Pauses
from tests.kit.emulated import running_engine
from tests.kit.kubernetes_cluster import Cluster, cluster
from tests.kit.peft_files import write_adapter
from tests.kit.serving import Serving, serving

DUMMY = {"compute": "none", "shape": "tiny"}
LORAS = "loraadapters"
BOTH = {"config_maps": True, "custom_resources": True}


@dataclass
class House:
    """A sidecar that follows a cluster, and its folder of adapters."""

    home: Cluster
    served: Serving
    folder: Path

    def write(self, name: str, seed: int) -> Path:
        return write_adapter(self.folder / name, seed=seed)

    async def status(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = (await self.home.get(LORAS, name)).get("status") or {}
        return found

    async def reaches(self, name: str, phase: str, **fields: Any) -> dict[str, Any]:
        """Wait until a LoraAdapter's status has this phase."""
        async with asyncio.timeout(60):
            while True:
                status = await self.status(name)
                if status.get("phase") == phase and all(status.get(key) == value for key, value in fields.items()):
                    return status
                await asyncio.sleep(0.02)

    async def refused(self, call: Any) -> str:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        return str(caught.value.details())

    async def answers(self, name: str) -> str:
        """Send a request by name; check that the tokens are the answering version's, and return its digest."""
        answer = await self.served.ask(name, 3)
        (origin,) = answer.origins
        assert answer.tokens == self.served.expected(name, 3)
        return str(origin.digest)


@asynccontextmanager
async def house(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapters: Any = BOTH, **record: Any
) -> AsyncIterator[House]:
    """Serve from a cluster; `record` is configuration."""
    folder = tmp_path / "loras"
    folder.mkdir()
    for part in ("reconciler.LOOK_S", "declared.LOOK_S", "reporting.COUNTS_EVERY_S"):
        monkeypatch.setattr(f"sidecar.kubernetes.{part}", 0.2)
    monkeypatch.setattr("sidecar.kubernetes.mirror.Pauses", partial(Pauses, 0.02, 0.2))
    async with cluster(kind) as home, running_engine(**DUMMY) as engine:
        monkeypatch.setenv("KUBECONFIG", str(await home.kubeconfig(tmp_path)))
        wanted = {"namespace": home.namespace, "adapters": adapters}
        async with serving([engine], roots=[folder], kubernetes=wanted, **record) as served:
            yield House(home, served, folder)


def condition(status: dict[str, Any], kind: str) -> dict[str, Any]:
    (found,) = [each for each in status["conditions"] if each["type"] == kind]
    return found


def message_of(status: dict[str, Any]) -> str:
    return str(status["message"])
