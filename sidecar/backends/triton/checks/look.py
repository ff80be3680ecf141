"""One look at a Triton: its channel, and what the checks so far have learned."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc.aio
from tritonclient.grpc import service_pb2_grpc

from sidecar.backends.checks.finding import Target
from sidecar.backends.credentials import open_channel
from sidecar.backends.triton.gauges import Gauges
from sidecar.core.facts import EngineFacts

if TYPE_CHECKING:
    from sidecar.backends.triton.checks.tiny import TinyAdapter


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
        return self.facts.reads_files


@asynccontextmanager
async def open_look(target: Target) -> AsyncIterator[Look]:
    """Give a look at a target for the length of a block. Raises Misused for TLS files that are not there."""
    channel = open_channel(target.address, target.tls)
    try:
        yield Look(target, channel, service_pb2_grpc.GRPCInferenceServiceStub(channel), target.facts)
    finally:
        await channel.close(None)
