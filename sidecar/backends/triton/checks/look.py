"""A look at a Triton: its channel, and what earlier checks have learned."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio
from tritonclient.grpc import service_pb2_grpc

from sidecar.backends.checks.finding import Target
from sidecar.backends.credentials import open_channel
from sidecar.backends.triton.checks.tiny import TinyAdapter
from sidecar.backends.triton.gauges import Gauges
from sidecar.core.facts import EngineFacts


@dataclass
class Look:
    """A look at a target: its channel, and what earlier checks have learned."""

    target: Target
    channel: grpc.aio.Channel
    stub: Any
    facts: EngineFacts
    """The declared facts, filled with those found."""
    server: str = ""
    """The server's name and version."""
    config: Any = None
    """The model's ModelConfig."""
    gauges: Gauges | None = None
    sees_our_memory: bool = False
    loaded: TinyAdapter | None = None
    """The adapter that was loaded by gRPC."""

    @property
    def is_llm_api(self) -> bool:
        """True if the model reads adapters from files instead of taking packed weights."""
        return self.facts.reads_files


@asynccontextmanager
async def open_look(target: Target) -> AsyncIterator[Look]:
    """Open a look at a target for the length of a block. Raises Misused for missing TLS files."""
    channel = open_channel(target.address, target.tls)
    try:
        yield Look(target, channel, service_pb2_grpc.GRPCInferenceServiceStub(channel), target.facts)
    finally:
        await channel.close(None)
