"""What differs between servers of the OpenAI family: a dialect is one file, and `Dialect` says what is usual.

A server names adapters in one of two ways. Most register an adapter by a call, and requests name it as their model
(`registered.py`). TensorRT-LLM's has no such call: each request carries the adapter (`carried.py`).

A dialect is a value: `kind: package.module:DIALECT` in a configuration takes one from another package.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any, ClassVar

from sidecar.backends.api import Weights
from sidecar.backends.checks.finding import Finding, ok
from sidecar.backends.faults import Wrote, nobody_wrote
from sidecar.backends.http_client import Reply
from sidecar.backends.kind import ModelKind
from sidecar.backends.openai.events import message_of
from sidecar.backends.openai.server import OpenAiServer, Served, epoch_header
from sidecar.config.backends import Backend as Entry
from sidecar.core.enums import Fault
from sidecar.core.facts import EngineFacts

SIZES_FIX = "base_model: {name: …, config: the folder of the model}"


@dataclass(frozen=True)
class Measures:
    """What a server says of its engine's work; None for what it does not say.

    Steps and generated tokens so far, KV tokens in total and in use, adapter slots, the process's start time, and the
    requests that run or wait in the engine.
    """

    steps: int | None = None
    generated: int | None = None
    kv_tokens: int | None = None
    kv_used: int | None = None
    slots: int | None = None
    started_at: float | None = None
    inside: int | None = None
    has_lora: bool = False
    """They have a family for adapters, so it was started with LoRA."""


@dataclass(frozen=True)
class Found:
    """What a server says of itself when it is reached; None for what it does not say."""

    served: Served
    version: str = ""
    """Its kind and version, for people."""
    measures: Measures = field(default_factory=Measures)
    slots: int | None = None
    host_pages: int | None = None
    rank_max: int | None = None
    seats: int | None = None
    ranks: int = 1
    """Its tensor-parallel ranks."""
    takes_none: str = ""
    """Why it takes no adapters; "" if it does."""
    paths: tuple[str, ...] | None = None
    """The paths of the API that it has."""
    body_bytes_max: int | None = None
    """It may hang up under a larger body."""
    modules: frozenset[str] | None = None
    """TensorRT-LLM's names of the modules that take adapters; None if all do."""
    unloads: str | None = None
    """What an unload takes away (`EngineFacts.unloads`)."""


class Dialect:
    """The usual server. A subclass sets the attributes without a value, and overrides what its own does otherwise."""

    model: ClassVar[ModelKind]
    section: ClassVar[type[Entry]]
    start: ClassVar[str]
    """The command that starts such a server, for people."""
    port = 8000
    """Where it listens by default."""
    load_path = "/v1/load_lora_adapter"
    unload_path = "/v1/unload_lora_adapter"
    health_path = "/health"
    models_path = "/v1/models"
    """Where the server asks for a key and lists its models; "" if it has no such list."""
    trusts_health = True
    """False if the server may report itself healthy while its engine is gone: then only an answered token counts."""
    carries = False
    """True if requests carry their adapter instead of naming one that is registered; `section` is then a subclass of
    `TrtllmEntry`.
    """
    is_particular = False
    """True if an unload, and a load beyond what the engine keeps, wait for others' requests, and a request for a name
    that was unloaded brings it back. Then idle adapters are unloaded to make room, and no such name is sent.
    """
    sent_root = ""
    """What the server lists as the path of an adapter that was sent to it."""
    id_member = ""
    """The member of a request by whose value `abort` ends it; "" if only a closed connection does."""
    has_admin_key = False
    """True if the calls that load adapters may want another key than the rest."""
    lora_member = ""
    """The member of a request that carries the adapter."""
    keeps_s = 2.0
    """Our idle connections are given up after this time; the server closes them after 5 seconds."""
    notices_closed_s: float | None = None
    """How long the server takes to notice that a client has left; None if it does so at once."""
    counts_steps = True
    """False if the server publishes no count of its engine's steps."""
    reading_empties = False
    """True if reading the measures empties them: what is not told again is as before."""
    host_is_slots = False
    """True if the engine keeps as many adapters in memory as it has slots, unless it is told otherwise."""
    options: ClassVar[Mapping[str, str]] = {
        "device_pages": "max_loras",
        "host_pages": "max_cpu_loras",
        "rank_max": "max_lora_rank",
        "seats": "max_num_seqs",
    }
    """The server's options for facts of the configuration's `engine` section."""
    hidden: ClassVar[re.Pattern[bytes] | None] = None
    """What of an engine's error no client may see, such as the names of others' adapters."""
    ranks: tuple[int, ...] = ()
    """The values that the server takes as its largest rank; none if it takes any."""
    no_files: ClassVar[re.Pattern[str] | None] = None
    """The text of a load whose folder has no adapter; None if it is not known."""
    refuses_nameless = False
    """True if a load without a name is known to be refused, and so shows that there are loads."""
    metrics_fix = ""
    """How the server is made to publish its measures."""
    enable = ""
    """The options that let it take adapters."""
    sizes_unknown = ""
    """What follows if the base model's files are not named; "" if nothing does."""
    warning = ""
    """What the log and `config check` say of each such server."""
    proof_remedy = ""
    """What to do if the engine does not compute with adapters."""

    # Reaching.

    async def recognise(self, server: OpenAiServer) -> Any:
        """Return the server's version; its `str` is for people, and the dialect's own methods get it again.

        Raises Misused if another server answers.
        """
        return self.model.title

    def judged_version(self, version: Any, is_used: bool) -> Finding:
        """Judge what was recognised; `is_used` if the configuration wants an untrusted version all the same."""
        return ok(str(version))

    async def identify(self, server: OpenAiServer, entry: Any) -> Found:
        """Find out who answers, and what it serves. Raises Misused if it cannot be used."""
        version = str(await self.recognise(server))
        return Found(await self.served(server), version, paths=await server.paths(), unloads="name")

    async def served(self, server: OpenAiServer) -> Served:
        """Return the base model and the registered adapters. Raises Misused if they cannot be told."""
        return await server.models()

    async def examine(
        self,
        server: OpenAiServer,
        found: Found,
        entry: Any,
        declared: EngineFacts,
        must_answer: bool,
        patience_s: float,
    ) -> Found:
        """Add what else the server says, its measures at least. Raises Misused.

        If it `must_answer`, the engine answers a token before: it was lost, and may not be well yet.
        """
        if must_answer:
            await server.ask(self.one_token(found.served.base), patience_s)
        return replace(found, measures=await self.measures(server))

    async def measures(self, server: OpenAiServer) -> Measures:
        """Return what the server says of its work; nothing if it says nothing, which does not make the engine lost."""
        return Measures()

    def one_token(self, base: str) -> dict[str, Any]:
        """Return the request for one token by which the engine is tried."""
        return {"model": base, "prompt": "a", "max_tokens": 1}

    # Generating.

    def model_name(self, base: str, name: str) -> str:
        """Return how a request names the adapter that is registered as `name`."""
        return name

    def fault_of(self, status: int, text: str, wrote: Wrote = nobody_wrote) -> Fault:
        """Return the fault of a generating request's error.

        An unknown 5xx is REJECTED, which says nothing of the engine's health: it is looked at.
        """
        if status == HTTPStatus.NOT_FOUND:
            return Fault.MISS
        return Fault.LOST if status == HTTPStatus.SERVICE_UNAVAILABLE else Fault.REJECTED

    async def abort(self, server: OpenAiServer, run_id: str) -> None:
        """Have the engine end a request. Raises WireError."""

    # Registering.

    async def load(self, server: OpenAiServer, name: str, path: str, timeout_s: float, epoch: int = 0) -> Reply:
        body = {"lora_name": name, "lora_path": path}
        return await server.client.post(self.load_path, body, timeout_s, epoch_header(epoch))

    async def send(
        self,
        server: OpenAiServer,
        name: str,
        weights: Weights,
        found: Found,
        declared: EngineFacts,
        timeout_s: float,
    ) -> Reply:
        """Register an adapter by sending its weights, for an engine whose facts do not have `reads_files`."""
        raise NotImplementedError

    async def unload(self, server: OpenAiServer, name: str, timeout_s: float) -> Reply:
        return await server.client.post(self.unload_path, {"lora_name": name}, timeout_s)

    def refusal(self, reply: Reply) -> str:
        """Return why a load was refused, in the server's words."""
        return message_of(reply.body)

    def is_loaded(self, reply: Reply) -> bool:
        """Return True if a load's answer says that the adapter is there."""
        return reply.is_ok or (reply.status == HTTPStatus.BAD_REQUEST and "already" in message_of(reply.body))

    async def forget(self, server: OpenAiServer, name: str, path: str, timeout_s: float) -> bool:
        """Make the server forget an adapter that it has from `path`; return False if it keeps the name."""
        reply = await self.unload(server, name, timeout_s)
        return reply.is_ok or reply.status == HTTPStatus.NOT_FOUND  # not found: it is gone already

    def tries_fit(self, entry: Any) -> bool:
        """Return True if it has to be found out by trial whether an adapter fits (`fitting.py`)."""
        return False

    def flag(self, key: str) -> str:
        """Return the server's flag for a fact of the configuration's `engine` section."""
        return f"--{self.options[key].replace('_', '-')}"

    def at_engine(self, key: str, value: Any) -> str:
        """Return the command that starts the server with such a fact."""
        return f"{self.start.replace(' …', '')} {self.flag(key)} {value}"

    def setting(self, key: str, value: Any) -> str:
        """Return how such a fact is set, at the engine and here."""
        return f"{self.at_engine(key, value)}, and config.yaml: engine: {{{key}: {value}}}"

    # The configuration.

    def declare(self, entry: Any, declared: EngineFacts) -> EngineFacts:
        """Return the declared facts with those that follow from the rest of the entry."""
        return declared

    def notes(self, entry: Any, declared: EngineFacts) -> Iterator[str]:
        """Yield what `config check` says of an entry: what it needs and lacks."""
        return iter(())
