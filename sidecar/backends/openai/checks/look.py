"""A look at a server of the OpenAI family: its connection, and what earlier checks have learned."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from sidecar.backends.checks.finding import Target
from sidecar.backends.checks.port import CONNECT_S
from sidecar.backends.credentials import open_http_client
from sidecar.backends.http_client import Reply
from sidecar.backends.openai.dialect import Dialect, Found
from sidecar.backends.openai.server import OpenAiServer, Served
from sidecar.core.facts import EngineFacts

CHECK_NAME = "lora-sidecar-check"
"""Prefix of the names that checks load."""
TEXT_MAX = 240
KEPT_S = 1.0
"""Servers close connections after five idle seconds, even if a request is just on its way."""


@dataclass(frozen=True)
class Answered:
    """The answer to a POST. `text` is the error's own, "" for a success."""

    status: int
    text: str
    took_s: float
    is_ok: bool = False
    has_error: bool = True
    """True if an error has the form of the API's; a missing route answers in another form."""

    @property
    def line(self) -> str:
        """The error as one line."""
        line = " ".join(self.text.split()) or f"status {self.status}"
        return line if len(line) <= TEXT_MAX else f"{line[:TEXT_MAX]}…"


@dataclass
class Look:
    """A look at a target."""

    target: Target
    dialect: Dialect
    server: OpenAiServer
    facts: EngineFacts
    """The declared facts."""
    name: str = field(default_factory=lambda: f"{CHECK_NAME}-{secrets.token_hex(6)}")
    """The name of this look's adapter, which no other look uses."""
    version: Any = ""
    """What the server was recognised as; its `str` is for people."""
    base: str = ""
    """The server's name for its base model."""
    adapters: dict[str, str] = field(default_factory=dict)
    """The registered names, each with the path that the engine was given."""
    without_files: tuple[str, ...] = ()
    """Registered names whose files are gone."""
    is_asking: bool = False
    """True while a request by our adapter's name is unanswered."""
    has_statistics: bool = False
    """True if the server publishes its steps."""
    found: Found = field(default_factory=lambda: Found(Served("")))
    """What the server says of itself."""

    @property
    def title(self) -> str:
        return self.dialect.model.title

    @property
    def is_rust(self) -> bool:
        """True if vLLM's Rust front end answers."""
        return bool(getattr(self.version, "is_rust", False))

    @property
    def entry(self) -> Any:
        """Its section of the configuration."""
        return self.target.own

    async def answered(self, calling: Any, is_done: Callable[[Reply], bool] = lambda reply: reply.is_ok) -> Answered:
        """Return what a call for a `Reply` is answered, and how long that took. Raises WireError if it is not."""
        began = monotonic()
        reply: Reply = await calling
        took_s = monotonic() - began
        if is_done(reply):
            return Answered(reply.status, "", took_s, is_ok=True)
        return Answered(reply.status, self.dialect.refusal(reply), took_s, has_error=_has_error(reply.body))

    async def load(self, name: str, path: str, timeout_s: float) -> Answered:
        return await self.answered(self.dialect.load(self.server, name, path, timeout_s), self.dialect.is_loaded)

    async def answer(self, model: str, timeout_s: float) -> Answered:
        """Make the engine answer one token. Raises WireError if it does not answer."""
        return await self.answered(self.server.try_out(self.dialect.one_token(model), timeout_s))


def log_fix(look: Look) -> str:
    return f"read the end of {look.title}'s log for what ended the engine, and start it again"


def refusal_fix(look: Look) -> str:
    return f"read in {look.title}'s log why it refused the adapter; the engine itself lives"


def looks(dialect: Dialect) -> Callable[[Target], AbstractAsyncContextManager[Look]]:
    """Return what opens a look for the length of a block. It raises Misused for missing files."""

    @asynccontextmanager
    async def opened(target: Target) -> AsyncIterator[Look]:
        async with open_http_client(target.address, target.tls, target.api_key_file, KEPT_S, CONNECT_S) as client:
            yield Look(target, dialect, OpenAiServer(target.id, client), target.facts)

    return opened


def _has_error(body: bytes) -> bool:
    try:
        record = json.loads(body)
    except ValueError:
        return False
    return isinstance(record, dict) and isinstance(record.get("error"), dict)
