"""The same ways in without a wire: handlers called in the process, as gRPC would call them. Most messages go so."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, NoReturn

import grpc

from sidecar.access.access import Caller
from sidecar.access.principal import Principal, Proof
from sidecar.errors import Refused
from sidecar.fronts import callers
from sidecar.fronts.generate.front import GatewayService
from sidecar.fronts.kserve.infer import KServe
from sidecar.fronts.message_fields import parsed
from sidecar.fronts.status import abort
from sidecar.proto import gateway_pb2
from sidecar.serve.app import Sidecar


class Aborted(Exception):
    """A call has ended with a status."""

    def __init__(self, code: grpc.StatusCode) -> None:
        super().__init__(code.name)
        self.code = code


class Call:
    """What a handler is given to answer by."""

    def __init__(self, metadata: tuple[tuple[str, str], ...]) -> None:
        self.written: list[Any] = []
        self._metadata = metadata

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._metadata

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def peer_identities(self) -> None:
        return None

    def time_remaining(self) -> None:
        return None

    def set_trailing_metadata(self, metadata: Any) -> None:
        pass

    async def write(self, message: Any) -> None:
        self.written.append(message)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        raise Aborted(code)


class Within:
    """The handlers of one sidecar, by their ways in; each raises Aborted."""

    def __init__(self, sidecar: Sidecar, metadata: tuple[tuple[str, str], ...]) -> None:
        gateway, config = sidecar.gateway, sidecar.config
        self._kserve = KServe(gateway, config)
        self._generate = GatewayService(gateway, config.hide_backend)
        self._metadata = metadata
        callers.CALLER.set(Caller(Principal(proof=Proof.CLAIMED), is_believed=True))

    async def unary(self, raw: bytes) -> bytes:
        return await self._kserve.infer(raw, Call(self._metadata))

    async def stream(self, raw: bytes) -> list[bytes]:
        async def one() -> AsyncIterator[bytes]:
            yield raw

        call = Call(self._metadata)
        await self._kserve.stream_infer(one(), call)
        return call.written

    async def generate(self, raw: bytes) -> list[Any]:
        call = Call(self._metadata)
        try:
            request = parsed(raw, gateway_pb2.GenerateRequest)
        except Refused as refused:
            await abort(call, refused)
        await self._generate.Generate(request, call)
        return call.written
