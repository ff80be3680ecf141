"""The result of a check, and the engine to check."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from sidecar.adapters.base_model import BaseModel
from sidecar.adapters.staging import AdaptersDir
from sidecar.core.facts import Adapter, EngineFacts

LOOK_S, RUN_S, LOAD_S = 15.0, 15.0, 30.0
"""Time limits of one small check, of a request of one token, and of a load."""
SPARE_S = 10.0
"""Time limit of a check on top of the requests that it waits for."""
BUSY_FIX = "check again when the engine is less busy"


class State(Enum):
    """How a check ended. An engine with a warning serves, with the drawback that the text names."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """A check's result. `fix` has the exact lines that would change it, one a line; "" if nothing is to be done."""

    state: State
    text: str
    fix: str = ""
    check: str = ""


def ok(text: str) -> Finding:
    return Finding(State.OK, text)


def warning(text: str, *fix: str) -> Finding:
    return Finding(State.WARNING, text, "\n".join(fix))


def failed(text: str, *fix: str) -> Finding:
    return Finding(State.FAILED, text, "\n".join(fix))


def skipped(text: str, *fix: str) -> Finding:
    return Finding(State.SKIPPED, text, "\n".join(fix))


@dataclass(frozen=True)
class Target:
    """The engine to check, and what is declared of it. `tls` are PEM files by name: ca, certificate, key."""

    id: str
    address: str
    model: str = "tensorrt_llm"
    facts: EngineFacts = field(default_factory=EngineFacts)
    metrics_url: str | None = None
    usual_metrics_url: str | None = None
    """Where metrics are tried if no URL is configured."""
    tls: dict[str, str] | None = None
    store_bytes: int | None = None
    """The host store's memory budget; None without a configuration."""
    transport: str = "auto"
    """How weights are to be sent: auto, grpc or shared_memory."""
    adapters_dir: AdaptersDir | None = None
    """Folder for PEFT files, for an engine that reads them itself."""
    base: BaseModel | None = None
    """The base model's own config, if its files are named."""
    served: tuple[Adapter, ...] = ()
    """The adapters that it is to serve, as far as they are known."""
    own: Any = None
    """What only its kind needs (`Checks.target`)."""
    api_key_file: str | None = None
    old_versions: bool = False
    """True to use an engine although its version is not to be trusted."""

    @property
    def host(self) -> str:
        """The host in the form that URLs have."""
        return self.address.rpartition(":")[0]


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds >= 0.001 else "under 1 ms"
