"""The same engine behind two servers: a real Triton, and the emulator's own face. Both run in their own processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidecar.lab.engine.kserve.options import LLMAPI
from tests.e2e.triton.repository import Repository
from tests.e2e.triton.server import TritonServer
from tests.kit.emulated import EngineProcess, read_served

TRITON, EMULATOR = "triton", "emulator"


@dataclass(frozen=True)
class Lane:
    """A running server: how it is reached, and what its engine served."""

    name: str
    grpc_address: str
    served: Callable[[], list[dict[str, Any]]]


def server_of(name: str, folder: Path, engine: Mapping[str, Any]) -> TritonServer | EngineProcess:
    """Return a server of this kind, not yet started, whose engine has these options."""
    if name == TRITON:
        options = {option: value for option, value in engine.items() if option != "decoupled"}
        texts = engine.get("protocol") != LLMAPI
        return TritonServer(folder, Repository(engine=options, decoupled=engine.get("decoupled", True), texts=texts))
    others = {option: value for option, value in engine.items() if option != "time_scale"}
    arguments = [part for option, value in others.items() for part in _argument(option, value)]
    folder.mkdir(parents=True)
    return EngineProcess(
        *arguments, "--served-log", str(folder / "served.jsonl"), time_scale=engine.get("time_scale", 0.0)
    )


def lane_of(name: str, folder: Path, server: TritonServer | EngineProcess) -> Lane:
    """Return a started server's lane."""
    return Lane(name, server.grpc_address, lambda: read_served(folder / "served.jsonl"))


def _argument(option: str, value: Any) -> list[str]:
    flag = option.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", ",".join(value) if isinstance(value, tuple) else str(value)]
