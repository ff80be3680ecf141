"""One look at a vLLM server: its connection, and what the checks so far have learned."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import httpx

from sidecar.backends.checks.finding import Target
from sidecar.backends.checks.port import CONNECT_S
from sidecar.backends.credentials import open_http_client
from sidecar.backends.kind import with_kind
from sidecar.backends.vllm.api import VllmApi, message_of
from sidecar.backends.vllm.kind import MODEL
from sidecar.core.facts import EngineFacts

CHECK_NAME = "lora-sidecar-check"
"""What the names that a check loads begin with."""
TEXT_MAX = 240
KEPT_S = 1.0
"""vLLM closes what was idle for five seconds, even when a request is just on its way to it."""


@dataclass(frozen=True)
class Reply:
    """An answer of the server to something that was posted. `text` is the error's own, "" for a success."""

    status: int
    text: str
    took_s: float
    is_vllms: bool = True
    """Whether an error has the form that vLLM's own have; a route that is not there answers in another."""

    @property
    def is_ok(self) -> bool:
        return self.status == httpx.codes.OK

    @property
    def words(self) -> str:
        """Return the error as one line."""
        line = " ".join(self.text.split()) or f"status {self.status}"
        return line if len(line) <= TEXT_MAX else f"{line[:TEXT_MAX]}…"


@dataclass
class VllmLook:
    """One look at a target."""

    target: Target
    client: httpx.AsyncClient
    api: VllmApi
    facts: EngineFacts
    """What is declared of it."""
    name: str = field(default_factory=lambda: f"{CHECK_NAME}-{secrets.token_hex(6)}")
    """What the adapter of this look is called there: no other look uses it."""
    version: str = ""
    base: str = ""
    """What the server calls its base model."""
    adapters: dict[str, str] = field(default_factory=dict)
    """The names that are registered there, with the paths that the engine was told."""
    without_files: tuple[str, ...] = ()
    """Those of them whose files have gone."""
    is_asking: bool = False
    """Whether something was asked by the name of our adapter that is not answered."""

    async def post(self, path: str, body: dict[str, Any], timeout_s: float) -> Reply:
        """Post JSON. Raises httpx.HTTPError when it is not answered."""
        began = monotonic()
        reply = await self.client.post(path, json=body, timeout=timeout_s)
        took_s = monotonic() - began
        if reply.status_code == httpx.codes.OK:
            return Reply(reply.status_code, "", took_s)
        return Reply(reply.status_code, message_of(reply.content), took_s, _has_error(reply.content))

    async def answer(self, model: str, timeout_s: float) -> Reply:
        """Have one token answered. Raises httpx.HTTPError when nothing is."""
        return await self.post("/v1/completions", {"model": model, "prompt": "a", "max_tokens": 1}, timeout_s)


@asynccontextmanager
async def open_look(target: Target) -> AsyncIterator[VllmLook]:
    """Give a look at a target for the length of a block. Raises Misused for files that are not there."""
    client = open_http_client(target.address, target.tls, target.api_key_file, httpx.Timeout(CONNECT_S), KEPT_S)
    async with client:
        facts = with_kind(target.facts, MODEL)
        yield VllmLook(target, client, VllmApi(target.id, client), facts)


def _has_error(body: bytes) -> bool:
    try:
        record = json.loads(body)
    except ValueError:
        return False
    return isinstance(record, dict) and isinstance(record.get("error"), dict)
