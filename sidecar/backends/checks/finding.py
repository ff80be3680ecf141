"""What a check found, and which engine it looks at."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from sidecar.adapters.base_model import BaseModel
from sidecar.adapters.staging import AdaptersDir
from sidecar.core.facts import Adapter, EngineFacts


class State(Enum):
    """How a check ended. A warning serves, with a drawback that the text names."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """What was found. `fix` holds the exact lines that would change it, one a line; "" where nothing is to be done."""

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
    """The engine to look at, and what is declared of it. `tls` are PEM files by name: ca, certificate, key."""

    id: str
    address: str
    model: str = "tensorrt_llm"
    facts: EngineFacts = field(default_factory=EngineFacts)
    metrics_url: str | None = None
    usual_metrics_url: str | None = None
    """Where metrics are looked for when no URL is configured."""
    tls: dict[str, str] | None = None
    store_bytes: int | None = None
    """The host store's budget in memory; None where there is no configuration."""
    transport: str = "auto"
    """How weights are to travel: auto, grpc or shared_memory."""
    adapters_dir: AdaptersDir | None = None
    """Where PEFT files are staged for an engine that reads them itself."""
    base: BaseModel | None = None
    """The base model's own config, where its files are named."""
    served: tuple[Adapter, ...] = ()
    """The adapters that it is to serve, where they are known."""
    api_key_file: str | None = None
    old_versions: bool = False
    """Whether an engine of a version that is not to be trusted is to be used all the same."""

    @property
    def host(self) -> str:
        """The host as it stands in a URL."""
        return self.address.rpartition(":")[0]
