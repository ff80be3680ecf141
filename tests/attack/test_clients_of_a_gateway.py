"""What hostile clients of a gateway bring about in its picker, and what they learn. The test is the gateway."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from sidecar.core.effects import Settle
from sidecar.errors import Reason
from tests.kit.picker_house import (
    Raw,
    body_of,
    entry_of,
    head_of,
    picker_house,
    request_body,
    response_body,
    response_head,
)
from tests.kit.quick_engine import event
from tests.kit.serving import until
from tests.kit.tokens import TokenMaker

EVENT = event("x")
SECRET = "gpu-secret-1 10.0.0.5:8000"
TRIES, AT_ONCE = 300, 50


async def let_go(raw: Raw) -> None:
    """Give a routed call the head and the first chunk of an answer, and read its replies to their end."""
    await raw.send(response_head(), response_body(EVENT))
    while await raw.next() is not None:
        pass


async def test_a_client_that_leaves_at_the_first_chunk_keeps_no_seat(tmp_path: Path) -> None:
    """Some of so many leave just as a reply is being sent."""
    async with picker_house(tmp_path, seats=TRIES) as house:

        async def one() -> None:
            raw = await house.routed("a00")
            await raw.send(response_head())
            await raw.next()
            await raw.send(response_body(EVENT))
            raw.call.cancel()
            await house.tell(entry_of(raw.exchange()))

        for _ in range(TRIES // AT_ONCE):
            await asyncio.gather(*(one() for _ in range(AT_ONCE)))
        await house.quiet(10)


async def test_a_client_that_leaves_while_its_body_is_sent_is_no_failure(tmp_path: Path) -> None:
    """Its request ends as cancelled, and not as rejected by an engine that has never seen it."""
    async with picker_house(tmp_path, seats=TRIES) as house:

        async def one() -> None:
            raw = house.begin()
            await raw.send(head_of(), body_of("a00", prompt="x" * 1_000_000))
            await raw.next()
            raw.call.cancel()

        for _ in range(3):
            await asyncio.gather(*(one() for _ in range(10)))
            await until(lambda: not house.served.state.requests)
        ended = {effect.reason for effect in house.served.recorder.of(Settle)}
        assert Reason.BACKEND_REJECTED not in ended


async def test_clients_that_leave_while_they_wait_leave_nothing(tmp_path: Path) -> None:
    """Before, within and after their bodies, and in the queue."""
    async with picker_house(tmp_path, seats=1) as house:
        first = await house.routed("a00")

        async def one(number: int) -> None:
            raw = house.begin()
            messages = [head_of(), *[request_body(b" " * 1000, False)] * 12, body_of("a00")]
            await raw.send(*messages[: 1 + number % len(messages)])
            await asyncio.sleep(0.001 * (number % 40))
            raw.call.cancel()

        await asyncio.gather(*(one(number) for number in range(200)))
        first.call.cancel()
        await house.quiet()


@pytest.mark.parametrize(
    "name", ["x-acme-token", "api-key", "x-forwarded-client-cert", "x-data-parallel-rank", "content-encoding"]
)
async def test_an_engine_gets_no_header_of_a_clients_but_what_it_needs(tmp_path: Path, name: str) -> None:
    """In path it gets none. A client's may be a credential that an external check reads, or mean something to vLLM."""
    async with picker_house(tmp_path) as house:
        raw = await house.routed("a00", [(name, "1")])
        mutation = raw.got[0].request_headers.response.header_mutation
        assert name in mutation.remove_headers
        raw.call.cancel()


@pytest.mark.parametrize("name", ["authorization", "proxy-authorization", "cookie", "x-api-key", "x-lora-tenant"])
async def test_an_engine_gets_no_credential_of_a_clients(tmp_path: Path, name: str) -> None:
    async with picker_house(tmp_path) as house:
        raw = await house.routed("a00", [(name, "secret")])
        assert name in raw.got[0].request_headers.response.header_mutation.remove_headers
        raw.call.cancel()


async def test_a_client_does_not_choose_its_engine(tmp_path: Path) -> None:
    """Its own destination is overwritten, whatever it is and however often it is given."""
    async with picker_house(tmp_path, engines=2) as house:
        addresses = {engine.address for engine in house.engines}
        for value in ("127.0.0.1:1", "", "127.0.0.1:1,127.0.0.1:2"):
            theirs = [("x-gateway-destination-endpoint", value)] * 2
            raw = house.begin()
            await raw.send(head_of([*theirs, ("x-gateway-destination-endpoint-subset", value)]), body_of("a00"))
            assert await raw.until_routed() in addresses
            raw.call.cancel()
        await house.quiet()


@pytest.mark.parametrize("name", ["x-served-by", "location", "set-cookie"])
async def test_a_hidden_engines_headers_stay_inside(tmp_path: Path, name: str) -> None:
    async with picker_house(tmp_path, hide_backend=True) as house:
        raw = await house.routed("a00")
        head = response_head()
        head.response_headers.headers.headers.add(key=name, raw_value=SECRET.encode())
        await raw.send(head)
        reply = await raw.next()
        assert reply is not None
        assert name in reply.response_headers.response.header_mutation.remove_headers
        raw.call.cancel()


async def test_a_hidden_engines_last_words_stay_inside(tmp_path: Path) -> None:
    """A stream that begins with an error is the engine's failure."""
    async with picker_house(tmp_path, hide_backend=True) as house:
        raw = await house.routed("a00")
        said = b'data: {"error": {"message": "CUDA out of memory on %b"}}\n\n' % SECRET.encode()
        await raw.send(response_head(), response_body(said))
        while (reply := await raw.next()) is not None and reply.WhichOneof("response") != "response_body":
            pass
        assert reply is not None
        assert reply.response_body.response.body_mutation.WhichOneof("mutation") is not None
        raw.call.cancel()


async def test_a_length_of_thousands_of_digits_is_refused(tmp_path: Path) -> None:
    """HTTP/1.1 parsers refuse it; a gateway may not."""
    async with picker_house(tmp_path) as house:
        raw = house.begin()
        await raw.send(head_of([("content-length", "9" * 5000)]))
        reply = await raw.next()
        assert reply is not None
        assert reply.immediate_response.status.code in (400, 413)


async def test_odd_paths_and_methods_reach_no_engine(tmp_path: Path) -> None:
    """What is not exactly a completion is answered here; nothing of a path or a query goes on."""
    async with picker_house(tmp_path) as house:
        for path in ("", "*", "http://x/v1/completions", "//v1/completions", "/v1/load_lora_adapter", "/v1/models/%00"):
            raw = house.begin()
            await raw.send(head_of(path=path))
            assert await raw.until_routed() == ""
        for method in ("GET", "PUT", "CONNECT", "OPTIONS", ""):
            raw = house.begin()
            await raw.send(head_of(method=method))
            assert await raw.until_routed() == ""
        raw = house.begin()
        await raw.send(head_of(path="/v1/completions?key=secret"), body_of("a00"))
        assert await raw.until_routed()
        sets = raw.got[0].request_headers.response.header_mutation.set_headers
        assert b"/v1/completions" in {each.header.raw_value for each in sets if each.header.key == ":path"}
        raw.call.cancel()
        await house.quiet()


@pytest.mark.parametrize("prompt", ["hello", ["hello", "you"]], ids=["carried", "in path"])
async def test_a_gateway_s_clients_prove_who_they_are(tmp_path: Path, prompt: str | list[str]) -> None:
    """With the same credentials as in path; what is refused is routed nowhere, not even to the http listener."""
    maker = TokenMaker(tmp_path)
    identity = {"mode": "enforce", "issuers": [maker.entry]}
    good = ("authorization", maker.bearer("acme"))
    bad: list[list[tuple[str, str]]] = [
        [],
        [("authorization", "Bearer lsk_x_y")],
        [("x-forwarded-client-cert", "By=spiffe://here;Subject=CN=acme")],
        [good, good],
        [good, ("authorization", "Bearer a.b.c")],
        [good, ("x-lora-tenant", "other")],
    ]
    async with picker_house(tmp_path, identity=identity, listener={"in_path": "127.0.0.1:9"}) as house:
        for headers in bad:
            raw = house.begin()
            await raw.send(head_of(headers))  # a call that is over breaks under a later message
            assert await raw.until_routed() == ""
            assert raw.got[-1].immediate_response.status.code in (400, 401, 403)
        raw = house.begin()
        await raw.send(head_of([good]), body_of("a00", prompt=prompt))
        where = await raw.until_routed()
        removed = raw.got[0].request_headers.response.header_mutation.remove_headers
        if isinstance(prompt, str):
            assert where == house.engines[0].address
            assert "authorization" in removed
        else:
            assert where == "127.0.0.1:9"
            assert "authorization" not in removed
        raw.call.cancel()
        await house.quiet()
