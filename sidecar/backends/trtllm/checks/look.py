"""A look at a trtllm-serve: its connection, and what earlier checks have learned."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from sidecar.backends.checks.finding import Target
from sidecar.backends.checks.port import CONNECT_S
from sidecar.backends.credentials import open_http_client
from sidecar.backends.http_client import HttpClient
from sidecar.backends.trtllm.api import TrtllmApi
from sidecar.backends.trtllm.kind import TrtllmEntry
from sidecar.core.facts import EngineFacts

KEPT_S = 1.0
"""The server closes connections after five idle seconds, even if a request is just on its way."""


@dataclass
class TrtllmLook:
    """A look at a target."""

    target: Target
    client: HttpClient
    api: TrtllmApi
    facts: EngineFacts
    has_statistics: bool = False
    """The server publishes its steps."""
    seats: int | None = None
    """The seats that the server tells; None if it does not."""

    @property
    def entry(self) -> TrtllmEntry:
        entry: TrtllmEntry = self.target.own
        return entry


@asynccontextmanager
async def open_look(target: Target) -> AsyncIterator[TrtllmLook]:
    """Open a look at a target for the length of a block. Raises Misused for missing files."""
    async with open_http_client(target.address, target.tls, None, KEPT_S, CONNECT_S) as client:
        yield TrtllmLook(target, client, TrtllmApi(target.id, client), target.facts)
