"""What a check found, and what it needs to look."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from sidecar.adapters.base_model import BaseModel
from sidecar.adapters.staging import AdaptersDir
from sidecar.backends.triton.dialects import TRITON_LLMAPI
from sidecar.backends.triton.gauges import Gauges
from sidecar.core.facts import Adapter, EngineFacts

if TYPE_CHECKING:
    import grpc.aio

    from sidecar.backends.triton.checks.tiny import TinyAdapter


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


@dataclass
class Look:
    """One look at a target: its channel, and what the checks so far have learned."""

    target: Target
    channel: grpc.aio.Channel
    stub: Any
    facts: EngineFacts
    """What is declared, filled with what was found."""
    server: str = ""
    """Name and version of the server."""
    config: Any = None
    """The model's ModelConfig."""
    gauges: Gauges | None = None
    sees_our_memory: bool = False
    loaded: TinyAdapter | None = None
    """The adapter that was loaded over gRPC."""

    @property
    def is_llm_api(self) -> bool:
        """Whether the model reads adapters from files instead of taking packed weights."""
        return self.facts.kind == TRITON_LLMAPI


Check = Callable[[Look], Awaitable[Finding]]
"""Looks at one thing. May raise grpc.RpcError."""
