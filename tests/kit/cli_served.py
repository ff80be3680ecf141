"""A sidecar's listeners over scripted engines, and a command line with their addresses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from sidecar.access.access import Caller
from sidecar.access.operators import Operators
from sidecar.access.principal import Presented, Purpose
from sidecar.backends.api import Reply, Ticket, Weights
from sidecar.backends.wire import ModelInferResponse
from sidecar.config.plugins import policies_of
from sidecar.core.config import CoreConfig
from sidecar.core.effects import Dispatch
from sidecar.core.events import FirstToken, RunEnded
from sidecar.core.facts import EngineFacts
from sidecar.fronts.admin.front import add_admin
from sidecar.fronts.calls import BoundedCalls
from sidecar.fronts.checked_messages import CheckedMessages
from sidecar.fronts.generate.front import GatewayService
from sidecar.fronts.intake import Intake
from sidecar.proto import gateway_pb2_grpc
from sidecar.shell.catalogue import Wanted
from sidecar.shell.gateway import Gateway
from sidecar.state.registry import SqliteRegistry
from tests.kit.cli_runs import Ended
from tests.kit.peft_files import BASE_MODEL, write_adapter
from tests.kit.scripted_backend import ScriptedBackend


class EchoingBackend(ScriptedBackend):
    """Answers each request with the adapter's name, in two pieces; holds those of an adapter called "slow"."""

    def run(self, effect: Dispatch, ticket: Ticket, weights: Weights | None = None) -> None:
        if effect.name == "slow":
            super().run(effect, ticket)
            return
        self._post(FirstToken(effect.request, effect.attempt))
        for piece, final in ((f"I am {effect.name} ", False), ("— ja", True)):
            ticket.deliver(Reply(b"", text_response(piece), final))
        self._post(RunEnded(effect.request, effect.attempt, 2))


def text_response(text: str) -> Any:
    """Return a response of the engine's text model."""
    message = ModelInferResponse()
    message.outputs.add(name="text_output", datatype="BYTES", shape=[1])
    data = text.encode()
    message.raw_output_contents.append(len(data).to_bytes(4, "little") + data)
    return message


@dataclass
class Served:
    """A sidecar's listeners over scripted engines; `cli` runs a command with their addresses."""

    gateway: Gateway
    address: str
    command: Callable[..., Ended]

    async def cli(self, *arguments: str) -> Ended:
        option = "--server" if arguments[0] == "generate" else "--admin"
        return await asyncio.to_thread(self.command, *arguments, option, self.address)

    async def register(self, name: str, folder: Path, **options: Any) -> None:
        await self.gateway.catalogue.register(
            name, str(write_adapter(folder / name.replace("/", "_"), **options)), Wanted()
        )


def guarded(gateway: Gateway, token_file: Path | None = None) -> tuple[Any, ...]:
    """Return the interceptors of a gateway's admin listener."""
    operators = Operators(gateway.access, token_file)

    async def identify(presented: Presented, purpose: Purpose) -> Caller:
        """Believe clients, whose API is on the same port, and ask operators for the token if there is one."""
        caller = await operators.identify(presented, purpose)
        return caller if token_file is not None else await gateway.access.identify(presented)

    return BoundedCalls(Intake(), 1000, identify), CheckedMessages()


async def serve_here(
    tmp_path: Path,
    command: Callable[..., Ended],
    token_file: Path | None = None,
    ids: tuple[str, str] = ("trt-0", "trt-1"),
) -> AsyncIterator[Served]:
    """Serve both APIs on one free port until the test ends."""
    config, registry = CoreConfig(), SqliteRegistry(None)
    gateway = Gateway(config, policies_of(config), registry, [tmp_path])
    backends = (EchoingBackend(ids[0]), EchoingBackend(ids[1], up=False))
    await gateway.start([(backend, EngineFacts(base_models=(BASE_MODEL,), seats=2)) for backend in backends])
    server = grpc.aio.server(interceptors=guarded(gateway, token_file))
    add_admin(server, gateway)
    gateway_pb2_grpc.add_GatewayServicer_to_server(GatewayService(gateway, False), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield Served(gateway, f"127.0.0.1:{port}", command)
    await server.stop(None)
    await gateway.stop()
    await registry.close()
