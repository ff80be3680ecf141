"""The http listener over a real gateway and socket, and a journal that a real request goes through."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from sidecar.access.access import OURSELVES
from sidecar.backends.api import Payload, Signs, Ticket, Weights
from sidecar.config import parse
from sidecar.config.plugins import policies_of
from sidecar.core.config import CoreConfig
from sidecar.core.effects import Dispatch, Load, Settle
from sidecar.core.events import BackendLost, BackendUp, Event, FirstToken, LoadDone, RunEnded
from sidecar.core.facts import EngineFacts
from sidecar.errors import Misused, Reason
from sidecar.fronts.http.app import HttpFront
from sidecar.fronts.http.connection import HEAD_BYTES_MAX, SPARE_CONNECTIONS, HttpLimits
from sidecar.journal import replay
from sidecar.journal.segments import segment_paths
from sidecar.journal.writer import Journal
from sidecar.shell.catalogue import Wanted
from sidecar.shell.gateway import Gateway
from sidecar.shell.metrics import Metrics
from sidecar.shell.requests import RequestFacts
from sidecar.state.registry import SqliteRegistry
from tests.kit.peft_files import write_adapter

CONNECTIONS = 16
PATIENCE_S = 60.0
"""How long a test waits for something that must happen; far longer than it takes."""


class Engine:
    """A backend that answers everything at once with three tokens."""

    address = "nowhere:1"
    streams = True

    def __init__(self, backend: str = "b0", up: bool = True) -> None:
        self.id = backend
        self._up = up
        self.post: Callable[[Event], None] = lambda event: None

    async def start(self, post: Callable[[Event], None]) -> None:
        self.post = post
        if self._up:
            post(BackendUp(self.id, EngineFacts()))

    async def stop(self) -> None:
        pass

    def run(self, effect: Dispatch, ticket: Ticket, weights: Weights | None = None) -> None:
        self.post(FirstToken(effect.request, effect.attempt))
        self.post(RunEnded(effect.request, effect.attempt, 3))

    def cancel(self, request: int, attempt: int) -> None:
        pass

    def load(self, effect: Load, weights: Weights) -> None:
        weights.release()
        self.post(LoadDone(effect.load))

    async def forget(self, region: str) -> None:
        pass

    def register_regions(self) -> None:
        pass

    def probe(self, within_s: float) -> None:
        pass

    def signs(self) -> Signs:
        return Signs()

    def detail(self) -> str:
        return "connection refused"


class House:
    """A gateway with a listener, and a client for it."""

    def __init__(self, gateway: Gateway, engines: list[Engine], front: HttpFront) -> None:
        self.gateway = gateway
        self.engines = engines
        self.front = front
        self.client = httpx.AsyncClient(base_url=f"http://{front.address}", trust_env=False)

    async def generate(self, adapter: str = "", prompt: bytes = b"") -> Settle:
        ticket = self.gateway.submit(
            RequestFacts(adapter, input_tokens=len(prompt), output_tokens_max=3),
            Payload("m", prompt, False, True),
            "",
            OURSELVES,
        )
        settled = await ticket.next()
        self.gateway.close(ticket)
        assert isinstance(settled, Settle)
        return settled


@pytest_asyncio.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    """Serve two backends, one up and one down."""
    config = CoreConfig()
    gateway = Gateway(config, policies_of(config), SqliteRegistry(None), [tmp_path])
    metrics = Metrics(gateway)
    gateway.observe(metrics)
    engines = [Engine("b0"), Engine("b1", up=False)]
    await gateway.start([(engine, EngineFacts()) for engine in engines])
    # An hour of silence: so that it is never silence that ends a connection here.
    limits = HttpLimits(connections=CONNECTIONS, silence_s=3600.0)
    front = HttpFront(gateway, metrics, "127.0.0.1:0", "0.0.0.0:9000", limits=limits)
    await front.start()
    house = House(gateway, engines, front)
    yield house
    await house.client.aclose()
    await front.stop()
    await gateway.stop()
    await gateway.catalogue.registry.close()


async def talk(house: House, sent: bytes) -> bytes:
    """Send bytes on a connection of their own and return all that comes back."""
    host, _, port = house.front.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(sent)
    await writer.drain()
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


async def test_metrics_of_served_requests(house: House, tmp_path: Path) -> None:
    """A scrape after real requests counts them, with the phases of the adapter that was fetched, packed and loaded."""
    write_adapter(tmp_path / "sql")
    await house.gateway.catalogue.register("sql", str(tmp_path / "sql"), Wanted())
    assert (await house.generate("sql")).reason is None
    assert (await house.generate()).reason is None
    answer = await house.client.get("/metrics")
    lines = answer.text.splitlines()
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert 'lora_sidecar_requests_total{outcome="ok"} 2.0' in lines
    assert 'lora_sidecar_adapter_requests_total{adapter="sql",outcome="ok"} 1.0' in lines
    for phase in ("fetch", "pack", "load"):
        assert f'lora_sidecar_load_seconds_count{{phase="{phase}"}} 1.0' in lines


async def test_openmetrics_by_accept(house: House) -> None:
    """A scraper that asks for OpenMetrics gets it."""
    answer = await house.client.get("/metrics", headers={"accept": "application/openmetrics-text;version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


async def test_live_and_ready(house: House) -> None:
    """With one backend up the process is live and ready."""
    for path in ("/livez", "/readyz", "/readyz?verbose=1"):
        answer = await house.client.get(path)
        assert (answer.status_code, answer.text) == (200, "ok\n"), path


async def test_not_ready_says_why(house: House) -> None:
    """Without a backend that takes requests /readyz names each with its reason, and the process stays live."""
    house.gateway.driver.step(BackendLost("b0", "gone"))
    house.gateway.set_drain("b1", True)
    answer = await house.client.get("/readyz")
    assert answer.status_code == 503
    assert answer.text == "no backend takes requests: b0 is down (connection refused); b1 is drained\n"
    assert (await house.client.get("/livez")).status_code == 200


async def test_not_ready_while_shutting_down(house: House) -> None:
    """A sidecar that drains is not ready, so that nothing new is routed to it."""
    await house.gateway.drain()
    answer = await house.client.get("/readyz")
    assert (answer.status_code, answer.text) == (503, "the sidecar is shutting down\n")


async def test_other_paths_and_methods(house: House) -> None:
    """Unknown paths are 404 and name what there is; a POST is 405; HEAD has the headers alone. Errors are JSON."""
    answer = await house.client.get("/")
    assert answer.status_code == answer.json()["error"]["code"] == 404
    assert "/metrics, /metrics/model-server, /livez, /readyz" in answer.json()["error"]["message"]
    assert answer.headers["x-request-id"]
    answer = await house.client.post("/metrics", content=b"x" * 1000)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")
    assert answer.json()["error"]["code"] == 405
    for path in ("/", "/health", "/livez", "/v1/models", "/anything"):  # a browser's question before it sends
        headers = {"origin": "https://page.example", "access-control-request-method": "POST"}
        answer = await house.client.options(path, headers=headers)
        assert answer.status_code == answer.json()["error"]["code"] in (404, 405)
        assert not any(name.startswith("access-control") for name in answer.headers)
    answer = await house.client.head("/livez")
    assert (answer.status_code, answer.content, answer.headers["content-length"]) == (200, b"", "3")


async def test_what_vllms_clients_ask_before_they_begin(house: House) -> None:
    """vLLM answers /health and /ping with 200 and nothing, /version with an object; all without a key."""
    for method, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping"), ("HEAD", "/health")):
        answer = await house.client.request(method, path)
        assert (answer.status_code, answer.content) == (200, b""), path
    answer = await house.client.get("/version")
    assert (answer.headers["content-type"], list(answer.json())) == ("application/json", ["version"])
    assert answer.json()["version"] == version("lora-sidecar")
    assert (await house.client.post("/health")).headers["allow"] == "GET, HEAD"
    house.gateway.driver.step(BackendLost("b0", "gone"))
    for path in ("/health", "/ping"):
        answer = await house.client.get(path)
        assert answer.status_code == answer.json()["error"]["code"] == 503
        assert "b0" not in answer.text  # what backends there are is not for everybody
        assert answer.headers["retry-after"] == "1"


async def test_an_application_that_breaks(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 in the form of all errors, without what went wrong."""

    def breaks(path: str, method: str) -> None:
        raise ValueError("secret")

    monkeypatch.setattr(house.front, "_answer", breaks)
    answer = await house.client.get("/nothing")
    assert answer.status_code == answer.json()["error"]["code"] == 500
    assert "secret" not in answer.text


async def test_pages_of_named_origins_may_ask(house: House) -> None:
    """Their browsers are told so before they send, and with the answer; those of other origins are not.

    Nobody's pages read what is for operators.
    """
    front = HttpFront(house.gateway, Metrics(house.gateway), "127.0.0.1:0", "x:1", origins=["https://chat.example"])
    await front.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://{front.address}", trust_env=False) as client:
            asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
            for origin, allowed in (
                ("https://chat.example", "https://chat.example"),
                ("https://chat.example.evil", None),
            ):
                preflight = await client.options("/v1/completions", headers={"origin": origin} | asks)
                assert (preflight.status_code == 200) is (allowed is not None)
                assert preflight.headers.get("access-control-allow-origin") == allowed
                answer = await client.get("/version", headers={"origin": origin})
                assert answer.headers.get("access-control-allow-origin") == allowed
                for path in ("/metrics", "/metrics/model-server", "/livez", "/readyz"):
                    answer = await client.get(path, headers={"origin": origin})
                    assert answer.headers.get("access-control-allow-origin") is None
            assert preflight.headers.get("access-control-allow-credentials") is None
    finally:
        await front.stop()


@pytest.mark.parametrize(
    "origin", ["chat.example", "https://chat.example/page", "https://a,https://b", "https://*.chat.example", ""]
)
def test_what_is_no_origin(origin: str) -> None:
    with pytest.raises(Misused, match="is no origin"):
        parse({"listeners": {"http": {"cors_origins": [origin]}}}, "the test")


MODEL = "/v2/models/tensorrt_llm"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v2"),
        ("GET", "/v2/"),
        ("HEAD", "/v2/health/live"),
        ("GET", "/v2/health/ready"),
        ("GET", MODEL),
        ("GET", f"{MODEL}/versions/1/ready"),
        ("GET", f"{MODEL}/config"),
        ("GET", f"{MODEL}/stats"),
        ("GET", "/v2/models/stats"),
        ("POST", f"{MODEL}/infer"),
        ("POST", f"{MODEL}/versions/1/generate_stream?x=1"),
        ("POST", "/v2/repository/index"),
        ("POST", "/v2/repository/models/a/load"),
        ("GET", "/v2/systemsharedmemory/region/r/status"),
        ("POST", "/v2/cudasharedmemory/unregister"),
        ("POST", "/v2/logging"),
        ("GET", f"{MODEL}/trace/setting"),
    ],
)
async def test_rest_is_not_served_and_says_where_grpc_is(house: House, method: str, path: str) -> None:
    """A JSON error as Triton's own, which its HTTP client shows."""
    answer = await house.client.request(method, path)
    assert (answer.status_code, answer.headers["content-type"]) == (501, "application/json")
    if method != "HEAD":
        assert answer.json()["error"] == (
            "the sidecar does not serve KServe's REST API: use gRPC, port 9000 of this host "
            "(inference.GRPCInferenceService)"
        )


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", f"{MODEL}/infer", "POST"),
        ("DELETE", "/v2/health/live", "GET, HEAD"),
        ("PUT", "/v2/logging", "GET, HEAD, POST"),
    ],
)
async def test_rest_with_a_wrong_method(house: House, method: str, path: str, allow: str) -> None:
    """405 with the methods that the path takes."""
    answer = await house.client.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allow)
    assert answer.json()["error"] == f"{method} is not for this path; it takes {allow}"


@pytest.mark.parametrize("path", ["/v2/nothing", f"{MODEL}/infer/more", "/v2/health"])
async def test_rest_paths_that_triton_has_not_either(house: House, path: str) -> None:
    """404 in JSON; a path that only begins with the same letters is none of REST's."""
    answer = await house.client.post(path)
    assert answer.status_code == 404
    assert "has no such path" in answer.json()["error"]
    assert "there are /metrics" in (await house.client.get("/v2x")).text


async def test_rest_with_a_large_body(house: House) -> None:
    """Prompts and tensors are longer than what is read here; the answer comes all the same, and not 413."""
    for body in (b"x" * (1 << 20), b"x" * (20 << 20)):
        answer = await house.client.post(f"{MODEL}/infer", content=body)
        assert answer.status_code == 501
    assert (await house.client.post("/livez", content=b"x" * (1 << 20))).status_code == 413


async def test_rest_answers_who_waits_before_sending_a_body(house: House) -> None:
    """As curl does: the answer comes instead of the word to go on."""
    head = f"POST {MODEL}/infer HTTP/1.1\r\nhost: x\r\ncontent-length: 5000000\r\nexpect: 100-continue\r\n\r\n"
    answer = await talk(house, head.encode())
    assert answer.startswith(b"HTTP/1.1 501")


async def test_one_connection_serves_many_requests(house: House) -> None:
    """A connection is kept, and requests that were sent before the first answer are all answered in order."""
    one = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"
    last = b"GET /nothing HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    answer = await talk(house, one * 3 + last)
    assert answer.count(b"HTTP/1.1 200") == 3
    assert answer.rindex(b"HTTP/1.1 404") > answer.rindex(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"what is this?\r\n\r\n", b"HTTP/1.1 400"),
        (b"GET /livez HTTP/1.1\r\n\r\n", b"HTTP/1.1 400"),
        (b"GET /" + b"x" * (2 * HEAD_BYTES_MAX), b"HTTP/1.1 431"),
        (b"POST /livez HTTP/1.1\r\nhost: x\r\ncontent-length: 70000\r\n\r\n" + b"x" * 70000, b"HTTP/1.1 413"),
    ],
)
async def test_broken_requests_are_refused_and_the_listener_serves_on(house: House, sent: bytes, status: bytes) -> None:
    """What is not HTTP, too long or without a host gets its status, and the next client is served."""
    head, _, body = (await talk(house, sent)).partition(b"\r\n\r\n")
    assert head.startswith(status)
    assert json.loads(body)["error"]["code"] == int(status.split()[1])
    assert (await house.client.get("/livez")).status_code == 200


async def test_connections_are_bounded(house: House) -> None:
    """A client that opens connections without end cannot have more than the limit: its oldest is closed for each."""
    host, _, port = house.front.address.rpartition(":")
    held = [await asyncio.open_connection(host, int(port)) for _ in range(CONNECTIONS + SPARE_CONNECTIONS)]
    for _, writer in held:
        writer.write(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
    for reader, _ in held:
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    newcomer = await asyncio.open_connection(host, int(port))
    assert (await held[0][0].read()).endswith(b"\r\n\r\nok\n")
    held[0][1].close()
    held = [*held[1:], newcomer]
    for reader, writer in held:
        writer.write(b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        await reader.read()
        writer.close()
        await writer.wait_closed()
    assert (await house.client.get("/livez")).status_code == 200


async def test_a_port_in_use_is_named(house: House) -> None:
    """A second listener on the same port is refused with the address and the key to change, and leaves nothing."""
    second = HttpFront(house.gateway, Metrics(house.gateway), house.front.address, "127.0.0.1:9000")
    with pytest.raises(Misused) as caught:
        await second.start()
    assert caught.value.reason is Reason.PORT_IN_USE
    assert house.front.address in caught.value.message
    assert "listeners.http.address" in caught.value.message
    await second.stop()


async def test_open_connections_do_not_delay_the_end(house: House) -> None:
    """A client that keeps its connection open and says nothing is cut off when the listener stops."""
    host, _, port = house.front.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    async with asyncio.timeout(PATIENCE_S):
        await house.front.stop()
    rest = await reader.read()
    assert rest.endswith(b"ok\n")
    writer.close()
    await writer.wait_closed()


async def test_the_journal_never_holds_a_prompt(house: House, tmp_path: Path) -> None:
    """A request whose prompt is a marker is journaled with its length, replays, and the marker is nowhere."""
    journal = Journal(house.gateway.core, tmp_path / "journal")
    house.gateway.observe(journal)
    journal.start()
    prompt = b"MARKER: my secret prompt"
    assert (await house.generate(prompt=prompt)).reason is None
    journal.stop()
    written = b"".join(path.read_bytes() for path in segment_paths(tmp_path / "journal"))
    assert b"MARKER" not in written
    assert f'"input_tokens":{len(prompt)}'.encode() in written
    steps = list(replay.replay(tmp_path))
    assert len(steps) >= 3
    assert all(step.same for step in steps)


async def test_the_journal_shows_in_the_metrics(house: House, tmp_path: Path) -> None:
    """Bytes written to the journal are counted where a journal is set."""
    journal = Journal(house.gateway.core, tmp_path / "journal")
    journal.start()
    journal.flush()
    house.front._metrics.journal = journal
    text = (await house.client.get("/metrics")).text
    size = sum(path.stat().st_size for path in segment_paths(tmp_path / "journal"))
    journal.stop()
    assert f"lora_sidecar_journal_bytes_total {float(size)}\n" in text
