"""A look at a vLLM server: its connection, and what earlier checks have learned."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from time import monotonic
from typing import Any

from sidecar.backends.checks.finding import Target
from sidecar.backends.checks.port import CONNECT_S
from sidecar.backends.credentials import open_http_client
from sidecar.backends.http_client import HttpClient
from sidecar.backends.kind import with_kind
from sidecar.backends.openai.run import message_of
from sidecar.backends.vllm.api import Version, VllmApi
from sidecar.backends.vllm.kind import MODEL
from sidecar.core.facts import EngineFacts

CHECK_NAME = "lora-sidecar-check"
"""Prefix of the names that checks load."""
TEXT_MAX = 240
KEPT_S = 1.0
"""vLLM closes connections after five idle seconds, even if a request is just on its way."""


@dataclass(frozen=True)
class Reply:
    """The answer to a POST. `text` is the error's own, "" for a success."""

    status: int
    text: str
    took_s: float
    is_vllms: bool = True
    """True if an error has the form of vLLM's; a missing route answers in another form."""

    @property
    def is_ok(self) -> bool:
        return self.status == HTTPStatus.OK

    @property
    def line(self) -> str:
        """The error as one line."""
        line = " ".join(self.text.split()) or f"status {self.status}"
        return line if len(line) <= TEXT_MAX else f"{line[:TEXT_MAX]}…"


@dataclass
class VllmLook:
    """A look at a target."""

    target: Target
    client: HttpClient
    api: VllmApi
    facts: EngineFacts
    """The declared facts."""
    name: str = field(default_factory=lambda: f"{CHECK_NAME}-{secrets.token_hex(6)}")
    """The name of this look's adapter, which no other look uses."""
    version: Version = field(default_factory=lambda: Version(""))
    base: str = ""
    """The server's name for its base model."""
    adapters: dict[str, str] = field(default_factory=dict)
    """The registered names, each with the path that the engine was given."""
    without_files: tuple[str, ...] = ()
    """Registered names whose files are gone."""
    is_asking: bool = False
    """True while a request by our adapter's name is unanswered."""

    async def post(self, path: str, body: dict[str, Any], timeout_s: float) -> Reply:
        """Post JSON. Raises WireError if it is not answered."""
        began = monotonic()
        reply = await self.client.post(path, body, timeout_s)
        took_s = monotonic() - began
        if reply.is_ok:
            return Reply(reply.status, "", took_s)
        return Reply(reply.status, message_of(reply.body), took_s, _has_error(reply.body))

    async def answer(self, model: str, timeout_s: float) -> Reply:
        """Make the engine answer one token. Raises WireError if it does not answer."""
        return await self.post("/v1/completions", {"model": model, "prompt": "a", "max_tokens": 1}, timeout_s)


@asynccontextmanager
async def open_look(target: Target) -> AsyncIterator[VllmLook]:
    """Open a look at a target for the length of a block. Raises Misused for missing files."""
    async with open_http_client(target.address, target.tls, target.api_key_file, KEPT_S, CONNECT_S) as client:
        facts = with_kind(target.facts, MODEL)
        yield VllmLook(target, client, VllmApi(target.id, client), facts)


def _has_error(body: bytes) -> bool:
    try:
        record = json.loads(body)
    except ValueError:
        return False
    return isinstance(record, dict) and isinstance(record.get("error"), dict)
