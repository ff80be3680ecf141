"""Requests of OpenAI clients through a real Envoy, in each mode of a gateway."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from sidecar.core.effects import Heal, Load, Settle
from sidecar.core.events import RunEnded
from sidecar.errors import Reason
from tests.e2e.envoy.house import LANES, SIZES, Clients, House, house, http_filters, set_metadata
from tests.e2e.envoy.server import EnvoyInstalled
from tests.e2e.envoy.variants import astray
from tests.kit.ports import free_port
from tests.kit.serving import until, write_adapters
from tests.kit.vllm_emulated import VllmProcess

SEEN_WHOLE = {"duplex-duplex", "buffered"}
"""The lanes in which all of a stream's bytes pass the sidecar."""

lanes = pytest.mark.parametrize("lane", LANES)


async def quiet(running: House) -> None:
    """Wait until no request is left, and with it no seat and no pin."""
    state = running.served.state
    await until(lambda: not state.requests)
    assert all(not backend.running for backend in state.backends.values())
    assert all(not slot.running for backend in state.backends.values() for slot in backend.slots.values())


@lanes
async def test_adapters_answer_by_their_names(tmp_path: Path, lane: str) -> None:
    """Streams and whole answers have the tokens that the named adapter gives; so are headers and usage."""
    names = write_adapters(tmp_path / "adapters", 3)
    async with house(tmp_path, names, lane) as running:
        for name in (*names, "base"):
            own = "" if name == "base" else name
            answer = await running.stream(name, 12)
            assert answer.status == 200, answer.raw
            assert answer.is_complete
            assert answer.token_ids == running.tokens_of(own, 12)
            assert answer.headers["x-lora-backend"] == "vllm-0"
            assert answer.headers["x-request-id"]
            whole = await running.whole(name, 7)
            assert whole.status_code == 200, whole.text
            assert whole.json()["choices"][0]["token_ids"] == running.tokens_of(own, 7)
            assert whole.json()["usage"]["completion_tokens"] == 7
        await quiet(running)


@pytest.mark.parametrize("lane", ["duplex-streamed", "duplex-duplex"])
async def test_what_a_strange_engine_lacks_is_not_taken_from_the_one_that_was_picked(tmp_path: Path, lane: str) -> None:
    """A gateway sends the request elsewhere, which is told: it is sent again from here, and nothing is loaded again."""
    names = write_adapters(tmp_path / "adapters", 1)
    stranger = VllmProcess(*SIZES)
    await stranger.start()
    try:
        async with house(
            tmp_path, names, lane, changed=lambda record: astray(record, stranger.http_address)
        ) as running:
            answer = await running.stream(names[0], 12)
            assert answer.token_ids == running.tokens_of(names[0], 12)
            assert answer.headers["x-lora-backend"] == "vllm-0"
            assert [heal.reason for heal in running.served.recorder.of(Heal)] == ["backend_lost"]
            assert running.served.recorder.count(Load) == 1
            await quiet(running)
    finally:
        await stranger.kill()


@lanes
async def test_errors_come_before_an_engine_is_asked(tmp_path: Path, lane: str) -> None:
    """An unknown adapter, a malformed body and an unknown path get the errors of the http listener."""
    write_adapters(tmp_path / "adapters", 1)
    async with house(tmp_path, [], lane) as running:
        unknown = await running.stream("none", 4)
        assert unknown.status == 404
        assert b"model_not_found" in unknown.raw
        broken = await running.http.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
        assert broken.status_code == 400
        assert (await running.http.get("/v1/nothing")).status_code == 404
        listed = await running.http.get("/v1/models")
        assert {"a00", "tiny-llama"} == {each["id"] for each in listed.json()["data"]}
        await quiet(running)


@lanes
async def test_an_engines_own_refusal_reaches_the_client(tmp_path: Path, lane: str) -> None:
    """A prompt that is too long for the engine is its 400."""
    names = write_adapters(tmp_path / "adapters", 1)
    async with house(tmp_path, names, lane) as running:
        refused = await running.whole(names[0], 4, temperature=-5)
        assert refused.status_code == 400, refused.text
        assert "temperature" in refused.text
        await quiet(running)


@lanes
async def test_a_miss_is_healed_before_the_client_sees_it(tmp_path: Path, lane: str) -> None:
    """An engine that has forgotten an adapter answers 404, is loaded anew, and the client gets its answer."""
    names = write_adapters(tmp_path / "adapters", 1)
    async with house(tmp_path, names, lane) as running:
        name = names[0]
        assert (await running.stream(name, 4)).is_complete
        for ask in (running.stream, running.whole):
            await quiet(running)
            await _forget(running, name)
            answer = await ask(name, 5)
            if ask == running.stream:
                assert answer.status == 200, answer.raw
                assert answer.token_ids == running.tokens_of(name, 5)
                assert answer.is_complete
            else:
                assert answer.status_code == 200, answer.text
                assert answer.json()["choices"][0]["token_ids"] == running.tokens_of(name, 5)
        await quiet(running)


async def _forget(running: House, name: str) -> None:
    async with httpx.AsyncClient(base_url=f"http://{running.engines[0].http_address}") as engine:
        reply = await engine.post("/v1/unload_lora_adapter", json={"lora_name": running.engines_name(name)})
        assert reply.status_code == 200, reply.text


async def test_the_call_is_closed_after_the_first_chunk_and_the_log_tells_the_rest(tmp_path: Path) -> None:
    """In the mode that is meant for it, no event but the first comes here, and the count of tokens is near."""
    names = write_adapters(tmp_path / "adapters", 1)
    async with house(tmp_path, names, time_scale=0.1) as running:
        answer = await running.stream(names[0], 300)
        assert answer.token_ids == running.tokens_of(names[0], 300)
        assert answer.is_complete
        await quiet(running)
        ended = next(event for event in running.served.recorder.events if isinstance(event, RunEnded))
        assert ended.seen.value == "estimated"
        assert abs(ended.output_tokens - 300) <= 15


@pytest.mark.parametrize("lane", ["duplex-streamed", "duplex-duplex"])
async def test_a_client_that_leaves_frees_its_seat(tmp_path: Path, lane: str) -> None:
    """While it is held at once; while it is answered when Envoy tells."""
    names = write_adapters(tmp_path / "adapters", 1)
    backend = {"engine": {"device_pages": 4, "host_pages": 8, "seats": 1}}
    async with house(tmp_path, names, lane, time_scale=1.0, backend=backend) as running:
        state = running.served.state
        first = asyncio.create_task(running.stream(names[0], 2000))
        await until(lambda: any(backend.running for backend in state.backends.values()))
        await until(lambda: any(request.first_token for request in state.requests.values()))
        held = asyncio.create_task(running.stream(names[0], 4))
        await until(lambda: len(state.requests) == 2)
        held.cancel()
        await until(lambda: len(state.requests) == 1)
        first.cancel()
        await quiet(running)
        settled = [effect for effect in running.served.recorder.effects if isinstance(effect, Settle)]
        assert {effect.reason for effect in settled} == {Reason.CANCELLED}
        assert (await running.stream(names[0], 3)).is_complete


@pytest.mark.parametrize(
    "options",
    [
        ["--admin-port", "9901"],
        ["--kserve"],
        ["--kserve", "--picker", "10.0.0.7:9004", "--picker", "[fd00::7]:9004"],
        ["--picker", "one.example:9004", "--picker", "10.0.0.7:9004"],
    ],
)
def test_the_printed_bootstrap_is_valid(tmp_path: Path, options: list[str]) -> None:
    """Envoy itself takes what `sidecar envoy config` prints."""
    file = tmp_path / "sidecar.yaml"
    file.write_text("listeners: {endpoint_picker: {address: '127.0.0.1:9004'}}\n")
    printed = subprocess.run(
        [sys.executable, "-m", "sidecar", "envoy", "config", str(file), *options],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (tmp_path / "envoy.yaml").write_text(printed.stdout)
    command = [str(EnvoyInstalled.find().binary), "--mode", "validate", "-c", str(tmp_path / "envoy.yaml")]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("lane", ["duplex-streamed", "duplex-duplex", "buffered-override"])
async def test_several_prompts_stay_in_path(tmp_path: Path, lane: str, caplog: pytest.LogCaptureFixture) -> None:
    """A list of prompts is several requests: they go to the http listener, or, where that is unknown, are answered
    here.
    """
    names = write_adapters(tmp_path / "adapters", 1)
    for host in (None, "127.0.0.1", "localhost", "unknown.invalid"):
        port = free_port()
        listener = {} if host is None else {"in_path": f"{host}:{port}"}
        async with house(tmp_path, names, lane, listener=listener, http=f"127.0.0.1:{port}") as running:
            asked = {"model": names[0], "prompt": ["hello", "you"], "max_tokens": 3, "return_token_ids": True}
            whole = await running.http.post("/v1/completions", json=asked)
            assert [each["token_ids"] for each in whole.json()["choices"]] == [running.tokens_of(names[0], 3)] * 2
            streamed = await running.stream(names[0], 3, prompt=["hello", "you"])
            assert streamed.is_complete
            assert sorted(streamed.token_ids) == sorted(running.tokens_of(names[0], 3) * 2)
            served_in_path = whole.headers.get("x-envoy-upstream-service-time") is not None
            assert served_in_path is (host in ("127.0.0.1", "localhost"))
            await quiet(running)
    assert caplog.text.count("cannot resolve listeners.endpoint_picker.in_path") == 1
    assert "Envoy does not reach" not in caplog.text


@pytest.mark.parametrize("lane", ["duplex-streamed", "buffered-override"])
async def test_a_way_in_path_that_leads_nowhere_is_logged(
    tmp_path: Path, lane: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The client gets Envoy's own 503; the sidecar says once which setting is wrong."""
    names = write_adapters(tmp_path / "adapters", 1)
    nowhere = f"127.0.0.1:{free_port()}"
    async with house(tmp_path, names, lane, listener={"in_path": nowhere}) as running:
        for _ in range(3):
            assert (await running.whole(names[0], 3, prompt=["hello", "you"])).status_code == 503
            assert (await running.whole(names[0], 3)).status_code == 200
    told = f"Envoy does not reach the http listener at {nowhere} (listeners.endpoint_picker.in_path): upstream_reset"
    assert caplog.text.count(told) == 1


async def test_what_counts_for_a_budget_is_seen(tmp_path: Path) -> None:
    """A tenant with a budget of tokens is answered in path unless estimates will do."""
    names = write_adapters(tmp_path / "adapters", 1)
    limits = {"limits": [{"tenant": "acme", "tokens_per_minute": 100_000}]}
    headers = {"x-lora-tenant": "acme"}
    for allowed, seen in ((False, "all"), (True, "estimated")):
        in_path = f"127.0.0.1:{free_port()}"
        listener = {"in_path": in_path, "estimates_allowed": allowed}
        async with house(tmp_path, names, listener=listener, http=in_path, time_scale=0.1, access=limits) as running:
            running.http.headers.update(headers)
            assert (await running.stream(names[0], 100)).is_complete
            await quiet(running)
            ended = next(event for event in running.served.recorder.events if isinstance(event, RunEnded))
            assert ended.seen.value == seen


async def test_a_gateways_subset_is_kept(tmp_path: Path) -> None:
    """A request goes to an engine that the gateway lets it go to; if none is left, it is refused as unavailable."""
    names = write_adapters(tmp_path / "adapters", 1)
    hint = "envoy.lb.subset_hint"

    def hinting(record: dict[str, Any]) -> None:
        filters = http_filters(record)
        # Sets the metadata that a gateway sets, from a header of the client's.
        filters.insert(0, set_metadata(hint, "x-gateway-destination-endpoint-subset", "x-test-subset"))

    async with house(tmp_path, names, engines=2, changed=hinting) as running:
        for number, engine in enumerate(running.engines):
            for _ in range(4):
                answer = await running.stream(names[0], 2, headers={"x-test-subset": engine.http_address})
                assert answer.headers["x-lora-backend"] == f"vllm-{number}"
        refused = await running.stream(names[0], 2, headers={"x-test-subset": "10.0.0.1:8000"})
        assert refused.status == 503
        await quiet(running)


async def test_a_deadline_goes_along(tmp_path: Path) -> None:
    """An answer that nobody reads here is ended by Envoy when the client's time is up, and its seat is free."""
    names = write_adapters(tmp_path / "adapters", 1)
    async with house(tmp_path, names, time_scale=1.0) as running:
        with pytest.raises(httpx.HTTPError):
            await running.stream(names[0], 4000, headers={"x-lora-deadline-ms": "2500"})
        await quiet(running)
        settled = next(effect for effect in running.served.recorder.effects if isinstance(effect, Settle))
        assert settled.reason is Reason.DEADLINE_EXCEEDED


async def test_clients_are_known_by_their_own_addresses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The request's line in the log has the client's address, and not Envoy's."""
    names = write_adapters(tmp_path / "adapters", 1)
    caplog.set_level("INFO", logger="sidecar.requests")
    async with house(tmp_path, names) as running:
        transport = httpx.AsyncHTTPTransport(local_address="127.0.0.3")
        base_url = f"http://{running.envoy.address}"
        async with httpx.AsyncClient(base_url=base_url, transport=transport, trust_env=False) as http:
            assert (await Clients(http).stream(names[0], 3)).is_complete
        await quiet(running)
    assert any("127.0.0.3:" in record.getMessage() for record in caplog.records)
