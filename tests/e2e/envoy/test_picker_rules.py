"""What gateways may expect of an endpoint picker, by a real Envoy.

The rules are those of the Gateway API Inference Extension, at 84436a9. `EPP` is its
docs/proposals/004-endpoint-picker-protocol, and names in CamelCase are tests in its conformance/tests: there a picker
obeys a header of the test, and here the subset hint says where a request may go, and the sidecar picks.
"""

from __future__ import annotations

import asyncio
import base64
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.protobuf.struct_pb2 import Value
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sidecar.fronts.extproc.bootstrap import TYPE
from sidecar.fronts.extproc.heads import SUBSET_HINT, SUBSET_KEY
from tests.e2e.envoy.quick_house import GATEWAYS, Gateway, QuickHouse, quick_house
from tests.e2e.envoy.variants import istio, manager_of, override_host, processor_of
from tests.kit.emulated import EngineProcess, core_request
from tests.kit.quick_client import Answer
from tests.kit.quick_engine import ENGINE, Order, answer_of
from tests.kit.serving import until_async

REQUESTS, AT_ONCE = 100, 10
HINT = "test-subset"
POOL = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
RANKS = ("127.0.0.1", "127.0.0.1", "127.0.0.2", "127.0.0.2")
SHORT = Order(3, 1)
LONG = Order(60, gap_ms=50.0)
LATE = Gateway(response_mode="FULL_DUPLEX_STREAMED", changed=lambda engines: istio(engines[1:]))
"""A gateway that has not heard of the first engine."""


def with_hint(record: dict[str, Any]) -> None:
    """Have Envoy pass a header on as the subset hint, as a gateway does with its own choice."""
    rule = {
        "header": HINT,
        "on_header_present": {
            "metadata_namespace": SUBSET_HINT,
            "key": SUBSET_KEY,
            "type": "PROTOBUF_VALUE",
            "encode": "BASE64",
        },
        "remove": True,
    }
    config = {"@type": f"{TYPE}filters.http.header_to_metadata.v3.Config", "request_rules": [rule]}
    manager_of(record)["http_filters"].insert(0, {"name": "hint", "typed_config": config})


def hint(addresses: Sequence[str]) -> dict[str, str]:
    """Return the header that becomes the hint."""
    value = Value()
    value.list_value.SetInParent()  # an empty list is one, too
    value.list_value.extend(addresses)
    return {HINT.replace("-", "_"): base64.b64encode(value.SerializeToString()).decode()}


async def ask(house: QuickHouse, model: str = "a00", order: Order = SHORT, **headers: str) -> Answer:
    async with house.client() as client:
        return await client.stream(model, order.prompt, order.events, **headers)


async def ask_many(house: QuickHouse, count: int, **headers: str) -> list[Answer]:
    """Ask so many times for the adapters in turn, ten at once."""
    numbers = iter(range(count))

    async def client() -> list[Answer]:
        return [await ask(house, house.names[number % len(house.names)], **headers) for number in numbers]

    return [answer for answers in await asyncio.gather(*(client() for _ in range(AT_ONCE))) for answer in answers]


def served_by(answers: Sequence[Answer]) -> Counter[str]:
    """Return how often each engine answered. Fails if an answer is not whole."""
    assert [answer.status for answer in answers] == [200] * len(answers), answers[0].body
    assert {answer.body for answer in answers} == {answer_of(SHORT)}
    return Counter(answer.headers[ENGINE] for answer in answers)


@pytest.mark.parametrize("gateway", GATEWAYS)
async def test_a_request_goes_to_the_endpoint_that_was_picked(tmp_path: Path, gateway: str) -> None:
    """GatewayFollowingEPPRouting, and EPP "Destination Endpoint": header and metadata name one endpoint, the one meant.

    Istio's cluster reads the metadata, the others the header.
    """
    async with quick_house(tmp_path, gateway, POOL, adapters=6) as house:
        answers = await ask_many(house, REQUESTS)
        assert sum(served_by(answers).values()) == REQUESTS
        picked = {f"vllm-{number}": address for number, address in enumerate(house.addresses)}
        assert all(answer.headers[ENGINE] == picked[answer.headers["x-lora-backend"]] for answer in answers)
        assert len({answer.headers["x-lora-backend"] for answer in answers}) > 1


@pytest.mark.parametrize("allowed", [[2], [0, 1], [0, 1, 2]])
async def test_a_request_stays_within_the_subset(tmp_path: Path, allowed: list[int]) -> None:
    """GatewayFollowingEPPRouting's three cases; EPP "Endpoint Subset": the picker must select from the list."""
    async with quick_house(tmp_path, hosts=POOL, adapters=6, changed=with_hint) as house:
        within = [house.addresses[number] for number in allowed]
        assert set(served_by(await ask_many(house, REQUESTS, **hint(within)))) <= set(within)


@pytest.mark.parametrize("allowed", [[2, 3], [0, 1, 3], [0, 1, 2, 3]])
async def test_ports_of_one_address_are_endpoints_of_their_own(tmp_path: Path, allowed: list[int]) -> None:
    """GatewayFollowingEPPRoutingWithDataParallelism: all ranks of one pod; a fixed rank; all."""
    async with quick_house(tmp_path, hosts=RANKS, adapters=8, changed=with_hint) as house:
        within = [house.addresses[number] for number in allowed]
        assert set(served_by(await ask_many(house, REQUESTS, **hint(within)))) <= set(within)


@pytest.mark.parametrize("within", [[], ["127.0.0.9:1"]], ids=["empty", "unknown"])
async def test_a_subset_without_an_eligible_endpoint_is_503(tmp_path: Path, within: list[str]) -> None:
    """EPP "Endpoint Subset": none in the list is eligible, or the list is empty."""
    async with quick_house(tmp_path, changed=with_hint) as house:
        assert (await ask(house, **hint(within))).status == 503
        assert (await ask(house)).status == 200


async def test_without_a_ready_endpoint_it_is_503(tmp_path: Path) -> None:
    """EPP "Destination Endpoint", constraints: 503 if there are no ready endpoints."""
    async with quick_house(tmp_path) as house:
        assert (await ask(house)).status == 200
        await house.engines[0].__aexit__()
        await until_async(lambda: _has_no_engine(house))
        assert (await ask(house)).status == 503


async def test_a_request_too_many_is_429(tmp_path: Path) -> None:
    """EPP "Destination Endpoint", constraints: 429 if the request should be dropped."""
    async with quick_house(tmp_path, seats=1, queue={"queued_max": 2}) as house:
        answers = await asyncio.gather(*(ask(house, order=Order(10, gap_ms=50.0)) for _ in range(16)))
        assert {answer.status for answer in answers} == {200, 429}
        assert all("retry-after" in answer.headers for answer in answers if answer.status == 429)


@pytest.mark.parametrize(
    "told",
    [
        "upstream.address",
        "metadata",
    ],
)
async def test_an_answer_from_elsewhere_is_counted(tmp_path: Path, told: str) -> None:
    """GatewayDestinationEndpointServed, EPP "Destination Endpoint Served": the data plane tells who has served, as
    metadata of `envoy.lb`; Envoy has an attribute, too. The gateway lacks one of the engines, as when its list is late,
    and goes to the other one.
    """

    def change(record: dict[str, Any]) -> None:
        if told != "metadata":
            processor_of(record)["response_attributes"] = [told]

    async with quick_house(tmp_path, LATE, POOL[:2], changed=change) as house:
        for _ in range(8):
            assert (await ask(house, "tiny-llama")).status == 200
        samples = await house.sidecar.metrics()
        assert sum(value for (name, _), value in samples.items() if name == "picker_elsewhere_total") > 0


async def test_an_answer_from_elsewhere_names_who_has_served(tmp_path: Path) -> None:
    """The same: what is known of an engine is not told of another one."""
    async with quick_house(tmp_path, LATE, POOL[:2]) as house:
        answers = [await ask(house, "tiny-llama") for _ in range(8)]
        assert {answer.headers[ENGINE] for answer in answers} == {house.addresses[1]}
        assert {answer.headers["x-lora-backend"] for answer in answers} == {"vllm-1"}


@pytest.mark.parametrize("gateway", ["lane", "istio"])
async def test_a_client_does_not_choose_the_endpoint(tmp_path: Path, gateway: str) -> None:
    """EPP "Destination Endpoint": the picker sets the header; one that the client brings is not believed."""
    async with quick_house(tmp_path, gateway, POOL) as house:
        chosen = (await ask(house)).headers[ENGINE]
        for other in [*house.addresses, "127.0.0.9:1", "nonsense"]:
            answer = await ask(house, x_gateway_destination_endpoint=other)
            assert served_by([answer]) == {chosen: 1}


async def test_without_a_picker_a_gateway_that_fails_closed_answers_503(tmp_path: Path) -> None:
    """EppUnAvailableFailOpen's other half, `failureMode: FailClose`: what is held and what is new is 503, and an answer
    whose call was closed comes to its end.
    """
    async with quick_house(tmp_path, seats=1) as house:
        answering = asyncio.create_task(ask(house, order=LONG))
        await until_async(lambda: _is_answering(house))
        held = [asyncio.create_task(ask(house)) for _ in range(4)]
        await until_async(lambda: _are_open(house, 1))
        house.sidecar.send_signal(signal.SIGKILL)
        assert {(await each).status for each in held} == {503}
        assert (await ask(house)).status == 503
        whole = await answering
        assert (whole.status, whole.body) == (200, answer_of(LONG))


async def test_without_a_picker_a_gateway_that_fails_open_reaches_an_engine(tmp_path: Path) -> None:
    """EppUnAvailableFailOpen: any engine answers. An adapter is unknown there by its name, so it is never another's."""

    def opened(record: dict[str, Any]) -> None:
        processor_of(record)["failure_mode_allow"] = True
        del processor_of(record)["status_on_error"]
        clusters = record["static_resources"]["clusters"]
        engines = [cluster for cluster in clusters if cluster["name"] == "engines"]
        for cluster in engines:
            cluster.update(override_host() | {"type": "STATIC", "load_assignment": static})
            del cluster["lb_policy"], cluster["original_dst_lb_config"]

    static: dict[str, Any] = {"cluster_name": "engines", "endpoints": [{"lb_endpoints": []}]}

    def known(engines: Sequence[str]) -> Any:
        for address in engines:
            host, _, port = address.rpartition(":")
            place = {"socket_address": {"address": host, "port_value": int(port)}}
            static["endpoints"][0]["lb_endpoints"].append({"endpoint": {"address": place}})
        return opened

    gateway = Gateway("BUFFERED", "BUFFERED", (("override_mode", True),), known)
    async with quick_house(tmp_path, gateway, POOL) as house:
        assert (await ask(house)).status == 200
        house.sidecar.send_signal(signal.SIGKILL)
        await until_async(lambda: _has_status(house, 404))
        answers = [await ask(house, "base") for _ in range(12)]
        assert set(served_by(answers)) == set(house.addresses)


async def test_an_engine_of_cleartext_http2_is_reached_by_it(tmp_path: Path) -> None:
    """InferencePoolAppProtocol, `kubernetes.io/h2c`: a KServe call goes to a Triton over HTTP/2. That a pool without a
    protocol is HTTP/1.1 every other test here says.
    """
    async with EngineProcess("--compute", "none", "--no-decoupled") as triton:
        backends = [{"url": f"triton://{triton.grpc_address}", "id": "trt-0"}]
        async with (
            quick_house(tmp_path, backends=backends) as house,
            grpc.aio.insecure_channel(house.envoy.address) as channel,
        ):
            call: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            assert await call(core_request().SerializeToString(), timeout=30)


async def test_a_tritons_refusal_of_a_call_reaches_the_client(tmp_path: Path) -> None:
    """A decoupled model takes no unary call: that is Triton's own error, and no failure of the sidecar."""
    async with EngineProcess("--compute", "none") as triton:
        backends = [{"url": f"triton://{triton.grpc_address}", "id": "trt-0"}]
        async with (
            quick_house(tmp_path, backends=backends) as house,
            grpc.aio.insecure_channel(house.envoy.address) as channel,
        ):
            call: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(core_request().SerializeToString(), timeout=30)
            assert "the sidecar failed" not in (refused.value.details() or "")


async def test_health_is_told_by_the_names_that_gateways_ask_for(tmp_path: Path) -> None:
    """EPP "Health Check Services"; an unknown one is NOT_FOUND, as gRPC's health protocol has it."""
    async with (
        quick_house(tmp_path) as house,
        grpc.aio.insecure_channel(house.sidecar.endpoint_picker) as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("liveness", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor", ""):
            reply = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING, name
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await stub.Check(health_pb2.HealthCheckRequest(service="nothing"))
        assert unknown.value.code() == grpc.StatusCode.NOT_FOUND


async def test_a_gateway_whose_health_check_asks_the_picker_finds_it(tmp_path: Path) -> None:
    """The same by Envoy's own check, as llm-d's standalone proxy is set."""

    def checked(record: dict[str, Any]) -> None:
        check = {"service_name": "envoy.service.ext_proc.v3.ExternalProcessor"}
        record["static_resources"]["clusters"][-1]["health_checks"] = [
            {
                "timeout": "2s",
                "interval": "1s",
                "unhealthy_threshold": 1,
                "healthy_threshold": 1,
                "grpc_health_check": check,
            }
        ]

    async with quick_house(tmp_path, changed=checked) as house:
        await until_async(lambda: _is_checked(house))
        assert (await ask(house)).status == 200


@pytest.mark.parametrize("mode", ["STREAMED", "NONE"])
async def test_a_mode_that_routes_too_early_is_refused_by_the_setting(tmp_path: Path, mode: str) -> None:
    """EPP requires streaming both ways; a mode in which the body comes after the choice cannot be served."""
    async with quick_house(tmp_path, Gateway(mode, "STREAMED")) as house:
        refused = await ask(house)
        assert refused.status == 500
        assert b"request_body_mode" in refused.body


async def _has_status(house: QuickHouse, status: int) -> bool:
    async with asyncio.timeout(10):
        return (await ask(house)).status == status


async def _has_no_engine(house: QuickHouse) -> bool:
    samples = await house.sidecar.metrics()
    return not any(value for (name, _), value in samples.items() if name == "backend_up")


async def _is_answering(house: QuickHouse) -> bool:
    """True once an answer has begun and its call is closed."""
    stats = await house.envoy.stats("ext_proc")
    return await house.running() == 1 and _sum(stats, "streams_closed") == 1


async def _are_open(house: QuickHouse, closed: int) -> bool:
    return _sum(await house.envoy.stats("ext_proc"), "streams_started") == closed + 4


async def _is_checked(house: QuickHouse) -> bool:
    stats = await house.envoy.stats("cluster.sidecar")
    return _sum(stats, "health_check.success") > 0 and _sum(stats, "membership_healthy") == 1


def _sum(stats: dict[str, int], name: str) -> int:
    return sum(value for key, value in stats.items() if key.endswith(name))
