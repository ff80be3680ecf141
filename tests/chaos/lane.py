"""The same load through an Envoy in front of all replicas: KServe streams of one request, whose bytes Envoy carries."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2_grpc

from sidecar.errors import Family, Reason
from tests.chaos.load import (
    BROKEN,
    CUT,
    FAILED,
    FULL,
    REFUSED,
    TOKENS,
    UNREACHABLE,
    WRONG,
    Load,
    Try,
    judge,
    judge_error,
)
from tests.kit.emulated import core_request, tokens_of

ORIGIN = "lora-backend"
TOO_LATE = "could not be taken back; send the request again"
"""Said where a call was answered by another engine than the one that Envoy had sent it to; it counts as unreached."""
ENDED_S = 2.0
"""After so long it is known here that a process has ended whose connections are broken."""


@dataclass
class LaneLoad(Load):
    """Clients of Envoy's."""

    _channel: grpc.aio.Channel = field(init=False)

    async def __aenter__(self) -> LaneLoad:
        assert self.pool.envoy is not None
        self._channel = grpc.aio.insecure_channel(self.pool.envoy.address)
        await super().__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await super().__aexit__()
        await self._channel.close()

    async def _try(self, tried: Try) -> None:
        tried.replica = "envoy"
        request = core_request(tokens=TOKENS, streaming=tried.streams, lora_name=tried.adapter)
        got: list[int] = []
        lives = self._lives()

        async def one() -> AsyncIterator[Any]:
            yield request

        call = service_pb2_grpc.GRPCInferenceServiceStub(self._channel).ModelStreamInfer(one(), timeout=self.silent_s)
        try:
            async for message in call:
                if message.error_message:
                    _judge_message(tried, message.error_message, bool(got))
                    break
                got += tokens_of([message])
                if ORIGIN.replace("-", "_") in (parameters := message.infer_response.parameters):
                    tried.backend = parameters[ORIGIN.replace("-", "_")].string_param
            else:
                tried.ending = FULL if len(got) == TOKENS else CUT
                tried.why = f"it ended after {len(got)} tokens"
        except grpc.aio.AioRpcError as error:
            judge_error(tried, error, bool(got))
            if tried.ending == CUT and not got:
                await asyncio.sleep(ENDED_S)
                if lives != self._lives() or TOO_LATE in tried.why:
                    tried.ending = UNREACHABLE
        if not tried.backend and tried.ending == FULL:
            tried.backend = dict(await call.initial_metadata()).get(ORIGIN, "")
        judge(tried, got)

    def _lives(self) -> list[Any]:
        """Return what differs once a replica has ended: Envoy's requests to it end with a 503 of Envoy's own."""
        return [replica.process if replica.runs and replica.is_ready else object() for replica in self.pool.replicas]


def _judge_message(tried: Try, text: str, begun: bool) -> None:
    tried.why = text
    reason = Reason(text[1 : text.index("]")])
    if reason.row.family is Family.REFUSED:
        tried.ending = WRONG if begun else REFUSED
    else:
        tried.ending = BROKEN if begun else FAILED
