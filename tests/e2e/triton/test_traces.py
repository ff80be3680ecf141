"""A trace through two replicas and a real Triton: the client's span is our parent, and the engine's lie under ours."""

from __future__ import annotations

from pathlib import Path
from secrets import token_hex

import pytest

from sidecar.proto import gateway_pb2
from tests.e2e.triton.repository import Repository
from tests.e2e.triton.server import TritonServer
from tests.kit.emulated import add_lora, channel_to, core_request, random_adapter, stream_answers
from tests.kit.otlp import Collector, Received, collector, tree
from tests.kit.redis_servers import running
from tests.kit.replica_pool import CALM_S, owned, replicas
from tests.kit.serving import PATIENCE_S, Serving, until, write_adapters

ENGINE = {"compute": "none", "shape": "tiny", "lora_host_pages": 1, "lora_device_pages": 1, "claim_errors": 1}
"""Room for one adapter; the first load fails by the engine's own fault."""
TRIES = 3
TRITON_SENDS_S = 5.0
"""Interval at which Triton sends spans."""
ROOT = "text_completion a00"
"""The span of a request at each of the two replicas."""


async def traced(received: Collector, asked: Serving, patience_s: float = PATIENCE_S) -> list[Received]:
    """Ask for an adapter in a trace of the client's, and return the spans that came, its engine's too."""
    trace, span = token_hex(16), token_hex(8)
    request = gateway_pb2.GenerateRequest(
        adapter="a00", tokens=gateway_pb2.TokenIds(ids=[1, 2, 3]), max_tokens=4, request_id=trace
    )
    context = (("traceparent", f"00-{trace}-{span}-01"), ("tracestate", "vendor=1"))
    async for _ in asked.gateway.Generate(request, metadata=context):
        pass

    def names() -> list[str]:
        return [each.name for each in received.of(trace)]

    def whole() -> bool:
        """Each attempt has been computed, and no parent is still to come: spans arrive in batches, in any order."""
        came, found = names(), received.of(trace)
        is_a_tree = {each.parent for each in found} <= {each.id for each in found} | {span}
        return is_a_tree and came.count("compute") == came.count("lora.attempt") > 0 and came.count(ROOT) == 2

    try:
        await until(whole, patience_s)
    except TimeoutError as error:
        raise TimeoutError(f"all that came of the trace: {sorted(names())}") from error
    found = received.of(trace)
    (root,) = [each for each in found if each.name == ROOT and each.parent == span]
    assert all(each.span.trace_state in ("vendor=1", "") for each in found)
    assert root.about["lora.outcome"] == "ok"
    return found


async def traced_after_eviction(received: Collector, asked: Serving, server: TritonServer) -> list[Received]:
    """Take the adapter's page, and ask as `traced`.

    Triton begins a trace of its own for about one in thirty requests on a stream, whatever trace the stream's headers
    name. So it may take several tries until both attempts are in the trace.
    """
    for _ in range(TRIES):
        async with channel_to(server.grpc_address) as stub:  # an adapter that no sidecar knows of
            await stream_answers(stub, add_lora(core_request(streaming=True), 7, random_adapter(7)))
        try:
            return await traced(received, asked, patience_s=4 * TRITON_SENDS_S)
        except TimeoutError as error:
            told = str(error)
    pytest.fail(told)


def named(spans: list[Received], name: str) -> list[Received]:
    return sorted([span for span in spans if span.name == name], key=lambda span: span.span.start_time_unix_nano)


async def test_a_cold_healed_and_forwarded_request(tmp_path: Path) -> None:
    """A replica that owns nothing is asked. First nothing is loaded, and the first load fails; then the engine has
    forgotten the adapter, so that the first attempt is in vain.
    """
    write_adapters(tmp_path / "adapters", 1)
    async with collector() as received:
        server = TritonServer(tmp_path / "triton", Repository(engine=ENGINE), traces=f"{received.http_url}/v1/traces")
        otlp = {"endpoint": received.grpc_url, "metrics": False, "share": 0.0}
        async with (
            running(tmp_path / "redis") as redis,
            server,
            replicas(2, redis.url, [server], tmp_path / "adapters", lease_s=CALM_S, otlp=otlp) as pool,
        ):
            asked = next(served for served in pool if not owned(served))
            cold = await traced(received, asked)
            healed = await traced_after_eviction(received, asked, server)
    assert tree(cold)["lora.forward"] == ["text_completion a00"]
    owners = [span for span in cold if span.parent == named(cold, "lora.forward")[0].id]
    children = [span.name for span in cold if span.parent == owners[0].id]
    assert children.count("lora.load") == 2
    assert {"lora.resolve", "lora.wait", "lora.fetch", "lora.pack", "lora.load", "lora.attempt"} == set(children)
    failed, loaded = named(cold, "lora.load")
    assert (failed.span.status.code, loaded.span.status.code) == (2, 0)
    assert "fetching" in named(cold, "lora.wait")[-1].events
    attempts = named(healed, "lora.attempt")
    assert [span.span.status.code for span in attempts] == [2, 0]
    assert "engine_miss" in attempts[0].span.status.message
    assert attempts[1].about["lora.attempt"] == 2
    for attempt, spans in ((named(cold, "lora.attempt")[0], cold), *((each, healed) for each in attempts)):
        (engines,) = [span for span in spans if span.parent == attempt.id and span.service != attempt.service]
        assert engines.name == "InferRequest"
        assert [span.name for span in spans if span.parent == engines.id] == ["tensorrt_llm"]
    assert len({span.instance for span in cold if span.service == "lora-sidecar"}) == 2
