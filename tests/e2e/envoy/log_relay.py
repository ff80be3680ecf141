"""A relay between Envoy's access log and the sidecar that delays, drops and doubles entries."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import grpc
import grpc.aio

from sidecar.fronts.extproc.front import LOGS
from sidecar.proto import envoy_pb2 as envoy

METHOD = f"/{LOGS}/StreamAccessLogs"


class LogRelay:
    """Passes entries on, one message each, after `delay_s`; drops and doubles the given shares of ends."""

    def __init__(self, picker: str, delay_s: float, dropped: float, doubled: float) -> None:
        self.address = ""
        self.counts = {"passed": 0, "dropped": 0, "doubled": 0}
        self._picker, self._delay_s, self._shares = picker, delay_s, (dropped, doubled)
        self._random = Random(1)
        self._out: asyncio.Queue[Any] = asyncio.Queue()

    async def take(self, messages: AsyncIterator[bytes], context: Any) -> bytes:
        async for raw in messages:
            message = envoy.AccessLogMessage.FromString(raw)
            for entry in message.http_logs.log_entry:
                one = envoy.AccessLogMessage()
                one.http_logs.log_entry.add().CopyFrom(entry)
                self._pass(one, entry.common_properties.access_log_type == envoy.DOWNSTREAM_END)
        return b""

    def _pass(self, message: Any, is_end: bool) -> None:
        drawn, (dropped, doubled) = self._random.random(), self._shares
        if is_end and drawn < dropped:
            self.counts["dropped"] += 1
            return
        times = 2 if is_end and drawn < dropped + doubled else 1
        self.counts["doubled" if times == 2 else "passed"] += 1
        for _ in range(times):
            asyncio.get_running_loop().call_later(self._delay_s, self._out.put_nowait, message.SerializeToString())

    async def send(self) -> None:
        """Send what is passed on, until it is cancelled."""
        async with grpc.aio.insecure_channel(self._picker) as channel:
            call: Any = channel.stream_unary(METHOD)(wait_for_ready=True)  # type: ignore[type-var]
            while True:
                await call.write(await self._out.get())


@asynccontextmanager
async def log_relay(
    picker: str, delay_s: float = 0.0, dropped: float = 0.0, doubled: float = 0.0
) -> AsyncIterator[LogRelay]:
    """Run a relay for the length of a block; its `address` is where Envoy's log goes."""
    relay = LogRelay(picker, delay_s, dropped, doubled)
    server = grpc.aio.server()
    handler = grpc.stream_unary_rpc_method_handler(relay.take)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(LOGS, {"StreamAccessLogs": handler}),))
    relay.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    sending = asyncio.create_task(relay.send())
    try:
        yield relay
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        await server.stop(0)
