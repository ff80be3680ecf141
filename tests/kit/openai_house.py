"""A gateway with its http listener and the OpenAI API, in front of backends whose answers a test scripts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from sidecar.adapters.staging import Staging
from sidecar.backends.api import HttpForm, HttpRejection, Reply, Ticket, Weights
from sidecar.config import parse
from sidecar.config.plugins import policies_of
from sidecar.core.effects import Dispatch
from sidecar.core.enums import Fault
from sidecar.core.events import FirstToken, RunEnded, RunFailed
from sidecar.fronts.http.app import HttpFront
from sidecar.fronts.intake import Intake
from sidecar.fronts.openai.front import OpenAiFront
from sidecar.fronts.openai.load_calls import LoadCalls
from sidecar.shell.catalogue import Wanted
from sidecar.shell.gateway import Gateway
from sidecar.shell.metrics import Metrics
from sidecar.state.registry import SqliteRegistry
from tests.kit.peft_files import write_adapter
from tests.kit.scripted_backend import ScriptedBackend

JSON = {"content-type": "application/json"}
DONE = b"data: [DONE]\n\n"


class ScriptedVllm(ScriptedBackend):
    """A scripted backend of kind vllm. `forms` are the requests received; a test ends each of them."""

    def __init__(self, backend_id: str = "v0", seats: int = 4, kind: str = "vllm") -> None:
        super().__init__(backend_id, seats=seats)
        self.facts = replace(self.facts, kind=kind, reads_files=kind == "vllm")
        self.forms: list[HttpForm] = []
        self.cancelled: list[int] = []
        self._tickets: dict[int, Ticket] = {}

    def run(self, effect: Dispatch, ticket: Ticket, weights: Weights | None = None) -> None:
        form = ticket.payload.head_for("vllm")
        assert isinstance(form, HttpForm)
        self.forms.append(form)
        self._tickets[effect.request] = ticket
        super().run(effect, ticket, weights)

    def cancel(self, request: int, attempt: int) -> None:
        self.cancelled.append(request)
        super().cancel(request, attempt)

    def deliver(self, raw: bytes, final: bool = False) -> None:
        """Deliver a reply to the oldest running request."""
        request, effect = next(iter(self.running.items()))
        self._tickets[request].deliver(Reply(raw, None, final))
        if final:
            del self.running[request]
            self._post(RunEnded(request, effect.attempt, 1))
            self._tell()
        else:
            self._post(FirstToken(request, effect.attempt))

    def fail(self, fault: Fault, text: str, rejection: HttpRejection | None = None, tokens: int = 0) -> None:
        """End the oldest running request with an engine's error."""
        request, effect = next(iter(self.running.items()))
        del self.running[request]
        self._tickets[request].rejected_with = rejection
        self._post(RunFailed(request, effect.attempt, fault, text, tokens))
        self._tell()


@dataclass
class House:
    """The running parts, and a client."""

    gateway: Gateway
    front: HttpFront
    client: httpx.AsyncClient
    folder: Path

    @property
    def url(self) -> str:
        return f"http://{self.front.address}"

    async def register(self, name: str, seed: int = 0, **wanted: Any) -> None:
        path = write_adapter(self.folder / f"{name}-{seed}", seed=seed)
        await self.gateway.catalogue.register(name, str(path), Wanted(**wanted))


@asynccontextmanager
async def house(folder: Path, backends: Sequence[ScriptedBackend], **record: Any) -> AsyncIterator[House]:
    """Serve scripted backends; `record` is configuration."""
    config = parse(record, "the test")
    core = config.core()
    gateway = Gateway(
        core,
        policies_of(core),
        SqliteRegistry(None),
        [folder],
        client_stall_s=config.client_stall_s,
        stagings=[Staging(folder / "staged")],
    )
    await gateway.start([(backend, backend.facts) for backend in backends])
    loads = LoadCalls(gateway, config) if config.openai.load_calls else None
    openai = OpenAiFront(gateway, config, {}, Intake(), loads)
    front = HttpFront(gateway, Metrics(gateway), "127.0.0.1:0", "127.0.0.1:1", openai)
    await front.start()
    client = httpx.AsyncClient(base_url=f"http://{front.address}", trust_env=False, timeout=60, headers=JSON)
    try:
        yield House(gateway, front, client, folder)
    finally:
        await client.aclose()
        await front.stop()
        await gateway.stop()
        await gateway.catalogue.registry.close()


def event(text: str, model: str = "base") -> bytes:
    """Return an event as an engine writes it."""
    return f'data: {{"id":"cmpl-1","model":"{model}","choices":[{{"index":0,"text":"{text}"}}]}}\n\n'.encode()
