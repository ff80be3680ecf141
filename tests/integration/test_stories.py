"""From the id that a client sent to the reason of its wait, in one command: live, after its end, and from a capture."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from sidecar.proto import gateway_pb2
from sidecar.telling.asking import asked_for
from sidecar.telling.record import CameBack
from tests.integration.test_incident import command
from tests.kit.emulated import EngineProcess, running_engine
from tests.kit.faults import attempt
from tests.kit.forked import python
from tests.kit.kserve_clients import OpenStream, aio_client, core_inputs
from tests.kit.redis_servers import running
from tests.kit.replica_pool import CALM_S, owned, replica, replicas, settled
from tests.kit.serving import Serving, serving, until, write_adapters
from tests.kit.terminal import Terminal
from tests.kit.vllm_emulated import VllmProcess

LONG = 100_000
ASKED = "order-17/retry 2"
"""An id as clients make them."""


async def generate(served: Serving) -> None:
    tokens = gateway_pb2.TokenIds(ids=[1, 2, 3])
    request = gateway_pb2.GenerateRequest(adapter="a00", tokens=tokens, max_tokens=2, request_id=ASKED)
    async for _ in served.gateway.Generate(request):
        pass


async def unary(served: Serving) -> None:
    async with aio_client(served.sidecar.data_address) as client:
        await client.infer(
            "tensorrt_llm", core_inputs(2, streaming=False), request_id=ASKED, parameters={"lora_name": "a00"}
        )


async def stream(served: Serving) -> None:
    async with aio_client(served.sidecar.data_address) as client:
        call = OpenStream(client)
        call.send("a00", ASKED, 2)
        await call.take_final(ASKED)


async def completion(served: Serving) -> None:
    body = {"model": "a00", "prompt": "hi", "max_tokens": 2}
    await _post(served, "completions", body)


async def chat(served: Serving) -> None:
    body = {"model": "a00", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "stream": True}
    await _post(served, "chat/completions", body)


async def _post(served: Serving, path: str, body: dict[str, Any]) -> None:
    async with httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}/v1", timeout=60) as client:
        answer = await client.post(f"/{path}", json=body, headers={"x-request-id": ASKED})
        assert answer.status_code == 200, answer.text


FRONTS = {"generate": generate, "unary": unary, "stream": stream, "completion": completion, "chat": chat}


@dataclass
class Busy:
    served: Serving
    taken: asyncio.Task[Any]
    """The request that has the only seat."""


@asynccontextmanager
async def busy(tmp_path: Path, front: str = "generate") -> AsyncIterator[Busy]:
    """Serve an engine with one seat, which is taken for as long as the test likes."""
    write_adapters(tmp_path / "adapters", 1)
    sizes = ("--compute", "none", "--seats", "1", "--max-seq-tokens", "1000000", "--kv-blocks", "1000000")
    made = VllmProcess if front == "chat" else EngineProcess
    more = ("--no-decoupled",) if front == "unary" else ()
    backend = {"adapters_dir": str(tmp_path / "shared"), "engine": {"seats": 1}} if front == "chat" else {}
    data = str(tmp_path / "data")
    async with (
        made(*sizes, *more, time_scale=1.0) as engine,
        serving([engine], tmp_path / "adapters", data_directory=data, backend=backend) as served,
    ):
        taken = asyncio.create_task(attempt(served, "a00", LONG))
        await until(lambda: any(request.running for request in served.state.requests.values()))
        yield Busy(served, taken)
        taken.cancel()


@pytest.mark.parametrize("front", list(FRONTS))
async def test_from_an_id_to_the_reason(tmp_path: Path, front: str) -> None:
    out = tmp_path / "incident.tgz"
    async with busy(tmp_path, front) as at:
        served, admin = at.served, ("--admin", at.served.sidecar.admin_address)
        asked = asyncio.create_task(FRONTS[front](served))
        await until(lambda: any(r.client_id == ASKED and not r.running for r in served.state.requests.values()))
        live = await command("requests", "show", ASKED, *admin)
        at.taken.cancel()
        async with asyncio.timeout(60):
            await asked
        await until(lambda: not served.state.requests)
        after = await command("requests", "show", ASKED, *admin)
        assert served.sidecar._journal is not None
        await asyncio.to_thread(served.sidecar._journal.flush)
        await command("debug", "capture", "--data-directory", str(tmp_path / "data"), "-o", str(out))
    replayed = await command("replay", str(out), "--explain", ASKED)
    assert (live["outcome"], after["outcome"], replayed["outcome"]) == ("", "ok", "ok")
    waits = [[at for at in told["timeline"] if at["what"] == "waited"] for told in (live, after, replayed)]
    assert [told[0]["why"] for told in waits] == ["seats full"] * 3
    assert {told[0]["text"] for told in waits} == {"1 of 1 seats are taken: a00 1"}
    assert after["waited_ns"] == replayed["waited_ns"] > live["waited_ns"] > 0
    kinds = [
        [at["what"] for at in told["timeline"] if at["what"] not in ("routed", "opened")] for told in (after, replayed)
    ]
    assert kinds[0] == kinds[1]


async def test_the_story_on_a_narrow_terminal(tmp_path: Path) -> None:
    """It begins with whose request it is, and says while it waits that it has not ended."""
    async with busy(tmp_path) as at:
        asked = asyncio.create_task(generate(at.served))
        await until(lambda: len(at.served.state.requests) == 2)
        with Terminal("requests", "show", ASKED, "--admin", at.served.sidecar.admin_address) as screen:
            await screen.matches("note: it has not ended")
            await screen.matches(re.escape("seats full: 1 of 1 seats are taken: a00 1"))
        asked.cancel()


@pytest.mark.parametrize(("asked", "reserved"), [(10**30, 999_999), (7, 7)])
async def test_the_story_and_the_list_tell_the_same_length(tmp_path: Path, asked: int, reserved: int) -> None:
    """What is reserved for the answer: of what no engine can generate, the rest of the sequence beside the prompt."""
    async with busy(tmp_path, "chat") as at:
        served, admin = at.served, ("--admin", at.served.sidecar.admin_address)
        body = {"model": "a00", "prompt": [5], "max_tokens": asked}
        posted = asyncio.create_task(_post(served, "completions", body))
        await until(lambda: len(served.state.requests) == 2)
        listed = (await command("requests", "list", *admin))["requests"]
        shown = await command("requests", "show", ASKED, *admin)
        (length,) = (each["output_tokens_max"] for each in listed if each["request_id"] == ASKED)
        assert shown["output_tokens_max"] == length == reserved
        posted.cancel()
        await asyncio.gather(posted, return_exceptions=True)


async def test_an_id_that_nobody_sent(tmp_path: Path) -> None:
    """The error says where else to look; scripts get the reason."""
    async with busy(tmp_path) as at:
        process = await python(
            "-m", "sidecar", "requests", "show", "nobody", "--json", "--admin", at.served.sidecar.admin_address,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        _, error = await process.communicate()
        assert process.returncode == 1
        told = json.loads(error)["error"]
        assert told["reason"] == "UNKNOWN_REQUEST"
        assert "A journal tells of older ones: sidecar replay --explain ID DATA_DIRECTORY" in told["message"]


async def test_a_request_that_another_replica_answers(tmp_path: Path) -> None:
    """The replica that was asked says who has it; that one tells the story, and knows from where it came."""
    write_adapters(tmp_path / "adapters", 1)
    async with (
        running(tmp_path / "redis") as redis,
        running_engine(compute="none", shape="tiny") as engine,
        replicas(2, redis.url, [engine], tmp_path / "adapters", lease_s=CALM_S) as pool,
    ):
        asked = next(served for served in pool if not owned(served))
        owner = next(served for served in pool if owned(served))
        await generate(asked)
        there, here = [
            await command("requests", "show", ASKED, "--admin", served.sidecar.admin_address)
            for served in (owner, asked)
        ]
    name = owner.sidecar.replica.member.id  # type: ignore[union-attr]
    assert f"passed on to replica {name}, which owns b0" in [at["text"] for at in here["timeline"]]
    assert here["notes"] == [f"replica {name} has the rest of the story: ask it"]
    assert [(told["outcome"], told["client_id"]) for told in (here, there)] == [("ok", ASKED)] * 2
    assert {"fetch", "load", "sent", "first_token"} <= {at["what"] for at in there["timeline"]}
    (record,) = owner.sidecar.gateway.chronicle.find(asked_for(ASKED))
    assert record.peer.startswith("127.0.0.1:")


async def test_a_request_that_came_back(tmp_path: Path) -> None:
    """Its owner left while it waited there: each moment stands where it was, and this replica has the whole end."""
    write_adapters(tmp_path / "adapters", 1)
    sizes = {"compute": "none", "shape": "tiny", "seats": 1, "time_scale": 1.0}
    async with (
        running(tmp_path / "redis") as redis,
        running_engine(**sizes) as engine,
        AsyncExitStack() as one,
        AsyncExitStack() as two,
    ):
        made = [replica(number, redis.url, [engine], tmp_path / "adapters", lease_s=CALM_S) for number in range(2)]
        pool = [await ends.enter_async_context(each) for ends, each in zip((one, two), made, strict=True)]
        await until(lambda: settled(pool))
        asked = next(served for served in pool if not owned(served))
        owner = next(served for served in pool if owned(served))
        begun = asyncio.create_task(attempt(owner, "a00", LONG))
        await until(lambda: any(request.running for request in owner.state.requests.values()))
        waits = asyncio.create_task(generate(asked))
        await until(lambda: len(owner.state.requests) == 2)
        begun.cancel()
        await (one, two)[pool.index(owner)].aclose()
        await waits
        told = await command("requests", "show", ASKED, "--admin", asked.sidecar.admin_address)
    moments = [at["what"] for at in told["timeline"] if at["what"] != "waited"]
    assert told["notes"] == []
    assert next(at["text"] for at in told["timeline"] if at["what"] == "arrived") == "arrived"
    assert moments.index("passed_on") < moments.index("given_back") < moments.index("came_back") < moments.index("sent")
    reasons = {at["why"] for at in told["timeline"] if at["what"] == "waited"}
    assert "no owner yet" in reasons
    assert "not looked at" not in reasons
    (record,) = asked.sidecar.gateway.chronicle.find(asked_for(ASKED))
    back_ns = next(entry.at_ns for entry in record.happened if isinstance(entry.what, CameBack))
    assert record.dispatch.queue_ns == record.settle.queue_ns >= back_ns - record.arrived_ns
