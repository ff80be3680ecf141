"""A client that takes nothing: it slows nobody, and its call is reset in the end, so that nothing is kept for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from sidecar.core.effects import Settle
from sidecar.proto import gateway_pb2
from tests.kit.emulated import core_request, running_engine
from tests.kit.kserve_clients import DUMMY
from tests.kit.serving import serving, until, write_adapters

END: Any = grpc.aio.EOF
SMALL_WINDOW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096))
TOKENS = 15_000


@pytest.mark.parametrize("front", ["KServe", "Generate"])
async def test_a_client_that_never_reads_is_reset_in_the_end(tmp_path: Path, front: str) -> None:
    """Others are answered meanwhile; then its seat, its ticket and its stream are gone, and a drain is not held up."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY, max_seq_tokens=TOKENS + 100) as engine,
        serving([engine], tmp_path, client_stall_s=0.5) as served,
        grpc.aio.insecure_channel(served.sidecar.data_address, options=SMALL_WINDOW) as channel,
    ):
        if front == "KServe":
            call: Any = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")()
            for request_id in ("1", "2"):
                request = core_request(tokens=TOKENS, streaming=True, lora_name="a00", request_id=request_id)
                await call.write(request.SerializeToString())
        else:
            ids = gateway_pb2.TokenIds(ids=[1, 2, 3])
            request = gateway_pb2.GenerateRequest(adapter="a00", tokens=ids, max_tokens=TOKENS)
            call = channel.unary_stream("/lorasidecar.v1.Gateway/Generate")(request.SerializeToString())
        await call.read()
        assert (await served.ask("a00", 3)).tokens == served.expected("a00", 3)
        await until(lambda: not served.sidecar.gateway.tickets and engine.engine.counters.active == 0)
        reasons = {settle.reason.value for settle in served.recorder.of(Settle) if settle.reason is not None}
        assert "CLIENT_STALLED" in reasons
        assert await code_of(call) is grpc.StatusCode.CANCELLED
        await served.sidecar.drain()


async def code_of(call: Any) -> grpc.StatusCode:
    """Read what is left of a call, and return the status that it ends with."""
    try:
        while await call.read() is not END:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return await call.code()
