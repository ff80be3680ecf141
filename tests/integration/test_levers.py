"""An operator's levers: see the open requests, cancel some, pause and resume a name."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import Any

import grpc
import httpx
import pytest

from sidecar.access.principal import Resource, Sort
from sidecar.core.effects import Dispatch
from sidecar.errors import Reason, Refused
from sidecar.fronts.admin.verbs import VERBS, Sight
from sidecar.proto import admin_pb2 as pb
from sidecar.proto import admin_pb2_grpc, gateway_pb2, gateway_pb2_grpc
from sidecar.state.records import check_not_paused
from tests.kit.cli_runs import runner
from tests.kit.cli_served import Served, serve_here
from tests.kit.emulated import running_engine
from tests.kit.kserve_clients import OpenStream, aio_client
from tests.kit.redis_servers import running
from tests.kit.replica_pool import CALM_S, owned, replicas
from tests.kit.serving import serving, until, write_adapters


@dataclass
class Client:
    """Sends requests over one channel."""

    served: Served
    stub: Any

    async def ask(self, *ids: str, tenant: str = "acme", adapter: str = "slow") -> list[asyncio.Task[str]]:
        """Send requests for an adapter, which has two seats, and return them once the core has them."""
        calls = [asyncio.create_task(self._ending(request_id, tenant, adapter)) for request_id in ids]
        await until(lambda: set(ids) <= {each.client_id for each in self.served.gateway.state.requests.values()})
        return calls

    async def both_seats_taken(self) -> None:
        """Wait until two requests run; the weights of their adapter are read first."""
        await until(lambda: sum(each.running for each in self.served.gateway.state.requests.values()) == 2)

    async def _ending(self, request_id: str, tenant: str, adapter: str) -> str:
        request = gateway_pb2.GenerateRequest(adapter=adapter, text="hi", request_id=request_id, tenant=tenant)
        return await ending(self.stub.Generate(request))


async def ending(call: Any) -> str:
    """Return the code and the message with which a call ends."""
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return f"{error.code().name}: {error.details()}"
    return "OK"


BY_OPERATOR = "CANCELLED: an operator cancelled the request; ask your operator before you send it again"


@pytest.fixture
async def client(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> AsyncIterator[Client]:
    async for served in serve_here(tmp_path, runner(capfd)):
        await served.register("slow", tmp_path)
        async with grpc.aio.insecure_channel(served.address) as channel:
            yield Client(served, gateway_pb2_grpc.GatewayStub(channel))


async def test_a_request_is_cancelled_by_its_id(client: Client) -> None:
    """Whether it runs or waits, its client hears who ended it, and the others go on."""
    first, second, waiting = await client.ask("one", "two", "three")
    await client.both_seats_taken()
    listed = await client.served.cli("requests", "list")
    assert re.search(r"^ID +STATE +AGE +ADAPTER +TENANT +CLASS +BACKEND +MAX TOKENS +REQUEST$", listed.out, re.M)
    running = r"^\w+ +running +[\d.]+ m?s +slow@v1 +acme +default +trt-0 +\d+\+\d+ +\d+$"
    assert len(re.findall(running, listed.out, re.M)) == 2
    assert len(re.findall(r"^\w+ +waiting ", listed.out, re.M)) == 1
    as_json = (await client.served.cli("requests", "list", "--json")).json()
    states = {each["request_id"]: each["state"] for each in as_json["requests"]}
    assert (as_json["total"], sorted(states.values())) == (3, ["running", "running", "waiting"])
    calls = dict(zip(("one", "two", "three"), (first, second, waiting), strict=True))
    for state in ("waiting", "running"):
        request_id = next(each for each, its in states.items() if its == state)
        done = await client.served.cli("requests", "cancel", request_id)
        assert (done.code, done.out) == (0, "1 request cancelled\n")
        assert await calls.pop(request_id) == BY_OPERATOR
    (left,) = calls
    assert [each["request_id"] for each in await listed_now(client)] == [left]
    again = await client.served.cli("requests", "cancel", request_id)
    assert (again.code, again.err.startswith("error: no open request matches")) == (1, True)
    assert (await client.served.cli("requests", "cancel", left, "--json")).json() == {"cancelled": 1}
    assert await calls[left] == BY_OPERATOR
    assert (await client.served.cli("requests", "list")).out == "no request is open\n"
    told = await client.served.cli("requests", "list", "--tenant", "acme", "--backend", "trt-0")
    assert told.out == 'no request of tenant "acme", backend "trt-0" is open\n'


async def listed_now(client: Client, *options: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await client.served.cli("requests", "list", "--json", *options)).json()["requests"]
    return found


async def test_all_of_a_tenant_or_an_adapter_are_cancelled(client: Client, tmp_path: Path) -> None:
    """A request has to match all that is said; nothing said is misuse, and never means everything."""
    acme = await client.ask("a1", "a2")
    beta = await client.ask("b1", tenant="beta")
    assert {each["request_id"] for each in await listed_now(client, "--tenant", "acme")} == {"a1", "a2"}
    assert len(await listed_now(client, "--backend", "trt-0")) == 3
    assert await listed_now(client, "--adapter", "base") == []
    for verb in ("list", "cancel"):  # not "none is open": the name is misspelt
        misspelt = await client.served.cli("requests", verb, "--adapter", "sloww")
        assert misspelt.code == 1
        assert 'unknown adapter "sloww"; did you mean slow?' in misspelt.err
    assert (await client.served.cli("requests", "list", "--limit", "1")).out.endswith("and 2 more\n")
    assert (await client.served.cli("requests", "cancel")).code == 2
    async with grpc.aio.insecure_channel(client.served.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="say which requests"):
            await admin_pb2_grpc.QueuesStub(channel).Cancel(pb.CancelRequest())  # type: ignore[no-untyped-call]
    assert (await client.served.cli("requests", "cancel", "b1", "--tenant", "acme")).code == 1
    assert (await client.served.cli("requests", "cancel", "--tenant", "acme")).out == "2 requests cancelled\n"
    assert await asyncio.gather(*acme) == [BY_OPERATOR] * 2
    assert not beta[0].done()
    assert (await client.served.cli("requests", "cancel", "--adapter", "slow")).out == "1 request cancelled\n"
    assert await beta[0] == BY_OPERATOR


async def test_requests_of_the_base_model_are_found_by_its_name(client: Client) -> None:
    """As the list itself, the API and access policies call it; those of adapters are left alone."""
    adapters = await client.ask("a1", "a2")
    await client.both_seats_taken()  # before, one of the base would be answered at once
    base = await client.ask("b1", "b2", adapter="")
    assert {each["request_id"] for each in await listed_now(client, "--adapter", "base")} == {"b1", "b2"}
    done = await client.served.cli("requests", "cancel", "--adapter", "base", "--tenant", "acme")
    assert done.out == "2 requests cancelled\n"
    assert await asyncio.gather(*base) == [BY_OPERATOR] * 2
    assert not adapters[0].done()
    assert (await client.served.cli("requests", "cancel", "--adapter", "base")).code == 1


async def test_the_requests_of_one_row_are_cancelled(client: Client) -> None:
    """With names that have to match whole, empty ones too, and by the backend alone."""
    acme, none = await client.ask("a1", "a2"), await client.ask("n1", tenant="")
    async with grpc.aio.insecure_channel(client.served.address) as channel:
        stub = admin_pb2_grpc.QueuesStub(channel)  # type: ignore[no-untyped-call]
        for names, cancelled in (
            ({"adapter": "slow", "tenant": "", "backend": ""}, 0),
            ({"adapter": "slow", "tenant": "acme", "backend": "trt-1"}, 0),
            ({"adapter": "slow", "tenant": "", "backend": "trt-0"}, 1),
        ):
            answer = await stub.Cancel(pb.CancelRequest(adapter="slow", only=pb.RequestNames(**names)))
            assert answer.cancelled == cancelled
    assert await asyncio.gather(*none) == [BY_OPERATOR]
    assert (await client.served.cli("requests", "cancel", "--backend", "trt-1")).code == 1
    assert (await client.served.cli("requests", "cancel", "--backend", "trt-0")).out == "2 requests cancelled\n"
    assert await asyncio.gather(*acme) == [BY_OPERATOR] * 2


@pytest.mark.parametrize("at_owner", [True, False])
async def test_a_request_that_another_replica_answers(at_owner: bool, tmp_path: Path) -> None:
    """Both the replica that received it and the one that answers it list it, and each can cancel it."""
    write_adapters(tmp_path / "adapters", 1)
    async with (
        running(tmp_path / "redis") as redis,
        running_engine(compute="none", shape="tiny", time_scale=1.0) as one,
        replicas(2, redis.url, [one], tmp_path / "adapters", lease_s=CALM_S) as pool,
    ):
        (owner,) = [served for served in pool if owned(served)]
        (other,) = [served for served in pool if served is not owner]
        request = gateway_pb2.GenerateRequest(
            adapter="a00", tokens=gateway_pb2.TokenIds(ids=[1, 2]), max_tokens=500, request_id="mine"
        )
        asked = asyncio.create_task(ending(other.gateway.Generate(request)))
        await until(lambda: owner.recorder.count(Dispatch) == 1)
        states = [
            [
                (each.request_id, each.adapter, each.state)
                for each in (await served.queues.List(pb.ListRequestsRequest())).requests
            ]
            for served in (owner, other)
        ]
        assert states == [[("mine", "a00", "running")], [("mine", "a00", "passed on")]]
        answer = await (owner if at_owner else other).queues.Cancel(pb.CancelRequest(request_id="mine"))
        assert answer.cancelled == 1
        assert await asked == BY_OPERATOR
        await until(lambda: not owner.state.requests)


async def test_a_name_is_paused_and_resumed(client: Client) -> None:
    """What runs goes on; tables and JSON say that it is paused, and for how long."""
    served = client.served
    (running_one,) = await client.ask("one")
    assert (await served.cli("adapters", "pause", "slow")).out == "slow is paused until it is resumed\n"
    record = served.gateway.catalogue.known("slow")
    with pytest.raises(Refused) as refused:
        check_not_paused(record, time())
    assert refused.value.reason is Reason.PAUSED
    assert re.search(
        r"^slow +v1 .* paused until it is resumed; 1 in work *$", (await served.cli("adapters", "list")).out, re.M
    )
    assert (await served.cli("adapters", "show", "slow", "--json")).json()["paused_s"] == "Infinity"
    assert not running_one.done()
    endless = await served.cli("adapters", "pause", "slow", "--for", "0s")
    assert (endless.code, "--for wants more than 0" in endless.err) == (2, True)
    assert (await served.cli("adapters", "pause", "slow", "--for", "30m")).out == "slow is paused for 30 min\n"
    assert re.search(r"^paused +paused for 30 min *$", (await served.cli("adapters", "show", "slow")).out, re.M)
    assert 1700 < (await served.cli("adapters", "pause", "slow", "--for", "30m", "--json")).json()["paused_s"] <= 1800
    assert (await served.cli("adapters", "resume", "slow")).out == "slow@v1 takes requests\n"
    check_not_paused(served.gateway.catalogue.known("slow"), time())
    assert (await served.cli("adapters", "resume", "slow", "--json")).json()["paused_s"] == 0
    assert (await served.cli("requests", "cancel", "one")).code == 0
    assert await running_one == BY_OPERATOR


async def test_a_pause_that_makes_no_sense(client: Client) -> None:
    """An unknown name and a time that is none are refused, whoever sends them."""
    assert (await client.served.cli("adapters", "pause", "nobody", "--json")).error()["reason"] == "UNKNOWN_ADAPTER"
    wrong = await client.served.cli("adapters", "pause", "slow", "--for", "soon")
    assert (wrong.code, wrong.err) == (
        2,
        'error: --for wants a duration such as 30s, 10m, 1h30m or 90d, and "soon" is none\n',
    )
    wrong = await client.served.cli("adapters", "pause", "slow", "--for", "30")
    assert wrong.err.endswith(" or 90d, and 30 has no unit\n")
    async with grpc.aio.insecure_channel(client.served.address) as channel:
        adapters = admin_pb2_grpc.AdaptersStub(channel)  # type: ignore[no-untyped-call]
        for seconds in (-1.0, float("nan")):
            with pytest.raises(grpc.aio.AioRpcError, match="must be 0 or more seconds"):
                await adapters.Pause(pb.PauseRequest(name="slow", for_s=seconds))


# What the policy is asked about, and what the audit says.


async def test_what_the_audit_says_before_and_after(client: Client) -> None:
    """A pause, a drain and an eviction are seen in the facts; the resource is the name as the policies know it."""
    served, sight = client.served, Sight(client.served.gateway)
    pause, message = VERBS["/lorasidecar.v1.Adapters/Pause"], pb.PauseRequest(name="slow", for_s=60)
    before = pause.facts(message, sight)
    assert "paused_s" not in before
    assert await served.cli("adapters", "pause", "slow", "--for", "1m")
    assert pause.facts(message, sight) == before | {"paused_s": pytest.approx(60, abs=30)}
    assert pause.resource(message, sight).base_model
    drain, backend = VERBS["/lorasidecar.v1.Backends/Drain"], pb.BackendRequest(backend="trt-0")
    assert drain.facts(backend, sight) == {"state": "up"}
    assert await served.cli("backends", "drain", "trt-0")
    assert drain.facts(backend, sight) == {"state": "drained"}
    evict = VERBS["/lorasidecar.v1.Adapters/Evict"]
    assert set(evict.facts(pb.AdapterRequest(name="slow"), sight)) == {"store", "backends"}
    verify = VERBS["/lorasidecar.v1.Adapters/Verify"]
    assert verify.resource(pb.VerifyRequest(name="slow@v1"), sight).name == "slow"
    push = VERBS["/lorasidecar.v1.Adapters/Push"]
    assert push.resource(pb.PushRequest(start=pb.PushStart(name="slow")), sight).base_model
    for verb in (pause, push, evict, verify):
        unknown = pb.PushRequest(start=pb.PushStart(name="no")) if verb is push else pb.AdapterRequest(name="no")
        assert verb.resource(unknown, sight) == Resource(Sort.ADAPTER, "no")
        assert verb.facts(unknown, sight) == {}


# Every front tells it.


async def test_clients_of_every_front_hear_that_an_operator_did(tmp_path: Path) -> None:
    """A KServe stream, and the OpenAI API, whole and as a stream, in the middle of the answer."""
    write_adapters(tmp_path / "adapters", 1)
    slow = {"compute": "none", "shape": "tiny", "time_scale": 1.0}
    body = {"model": "a00", "prompt": "hi", "max_tokens": 500}
    async with (
        running_engine(**slow) as one,
        serving([one], tmp_path / "adapters") as served,
        aio_client(served.sidecar.data_address) as kserve,
        httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}", timeout=60) as openai,
    ):

        async def streamed() -> str:
            async with openai.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
                return f"{answer.status_code} {(await answer.aread()).decode()}"

        stream = OpenStream(kserve)
        stream.send("a00", "streamed by kserve", 500)
        reading = asyncio.create_task(stream.take_final("streamed by kserve"))
        calls = [asyncio.create_task(streamed()), asyncio.create_task(openai.post("/v1/completions", json=body))]
        await until(lambda: sum(each.first_token for each in served.state.requests.values()) == 3)
        assert (await served.queues.Cancel(pb.CancelRequest(adapter="a00"))).cancelled == 3
        said = "an operator cancelled the request; ask your operator before you send it again"
        assert said in (await reading).errors[-1]
        first, whole = await asyncio.gather(*calls)
        assert first.startswith("200 ")
        assert said in first
        assert (whole.status_code, whole.headers["x-should-retry"]) == (499, "false")
        assert whole.json()["error"]["message"] == said
        await until(lambda: not served.state.requests)
