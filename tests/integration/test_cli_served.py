"""The command line against a real listener, over scripted engines."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from sidecar.access.access import OURSELVES
from sidecar.cli import awaiting
from sidecar.cli.generating import TIMEOUT_S, sentence
from sidecar.core.facts import Suspicion
from sidecar.proto import gateway_pb2
from sidecar.shell.requests import RequestFacts
from tests.kit.cli_runs import Ended, runner
from tests.kit.cli_served import Served, serve_here
from tests.kit.peft_files import write_adapter
from tests.kit.scripted_backend import PAYLOAD
from tests.kit.serving import until
from tests.kit.terminal import Terminal

TOKEN = "s3cret"


@pytest.fixture
def sidecar(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Return a function that runs one command here and now."""
    return runner(capfd)


@pytest.fixture
async def served(tmp_path: Path, sidecar: Callable[..., Ended]) -> AsyncIterator[Served]:
    async for each in serve_here(tmp_path, sidecar):
        yield each


# Against a sidecar.


async def test_an_adapters_life(served: Served, tmp_path: Path) -> None:
    """Register, list, show, pin, prefetch, evict, unregister: tables for people."""
    source = str(write_adapter(tmp_path / "sql"))
    ended = await served.cli("adapters", "register", "sql", source, "--allow", "acme")
    assert ended.out.startswith("sql@v1 registered: rank 8, attn_q, attn_v, ")
    assert "was registered already" in (await served.cli("adapters", "register", "sql", source, "--allow", "acme")).out
    listed = await served.cli("adapters", "list")
    assert re.search(r"^sql +v1 +8 +attn_q,attn_v +- +- +for acme", listed.out, re.M)
    assert "stays in the host store" in (await served.cli("adapters", "pin", "sql")).out
    assert "may be evicted again" in (await served.cli("adapters", "unpin", "sql")).out
    assert re.search(
        r"^PLACE +RESULT *\ntrt-0 ", (await served.cli("adapters", "prefetch", "sql", "--backend", "trt-0")).out
    )
    await served.gateway.backends["trt-0"].loaded.wait()  # type: ignore[attr-defined]
    shown = await served.cli("adapters", "show", "sql")
    assert re.search(r"^memory +float16 +held +8.2 kB +0 +\d+", shown.out, re.M)
    assert re.search(r"^trt-0 +gpu +\d+ m?s +load", shown.out, re.M)
    assert "no unload" in (await served.cli("adapters", "evict", "sql")).out
    forgotten, _, places = (await served.cli("adapters", "unregister", "sql")).out.partition("\n")
    assert forgotten == "sql is forgotten"
    assert re.search(r"^trt-0 +resident; its engine has no unload", places, re.M)
    assert "no adapter is registered" in (await served.cli("adapters", "list")).out


async def test_all_adapters_are_listed_however_many_pages_they_take(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidecar.fronts.admin.adapters.PAGE_MAX", 2)
    source = str(write_adapter(tmp_path / "sql"))
    for name in "abcde":
        await served.cli("adapters", "register", name, source, *(["--allow", "acme"] if name < "c" else []))
    listed = json.loads((await served.cli("adapters", "list", "--json")).out)
    assert [adapter["name"] for adapter in listed] == list("abcde")
    listed = json.loads((await served.cli("adapters", "list", "--tenant", "beta", "--json")).out)
    assert [adapter["name"] for adapter in listed] == list("cde")
    for name in "cde":
        await served.cli("adapters", "unregister", name)
    assert (await served.cli("adapters", "list", "--tenant", "beta")).out == 'tenant "beta" may use no adapter\n'


async def test_80_columns_are_enough(tmp_path: Path, sidecar: Callable[..., Ended]) -> None:
    """In a terminal of 80 columns no name, header or word is cut, in tables and sentences, long as names may be."""
    gpus = "triton-gpu-pool-a100-eu-west-0.llm", "triton-gpu-pool-a100-eu-west-1.llm"
    adapter, tenant, ours = "acme-corporation/customer-support-german", "acme-corporation", "6e0c8c5e-4a0d-4c53-a1ff"
    shown = {
        ("adapters", "list"): (adapter, gpus[0], "VERSION", "MODULES", "attn_q,attn_v"),
        ("adapters", "show", adapter): (adapter, *gpus, "REFRESHED", "CANNOT SERVE IT"),
        ("adapters", "show", adapter + "x"): (f'"{adapter}x";', "[UNKNOWN_ADAPTER]"),
        ("backends", "list"): (*gpus, "RESIDENT", "scripted"),
        ("backends", "show", gpus[0]): ("slow", "RUNNING", "backends[].engine.cost"),
        ("backends", "check"): (*gpus, "STATE", "backends[].engine.cost"),
        ("queue",): (gpus[0], tenant, "WAITING", "seats"),
        ("queue", "--requests"): (gpus[0], tenant, ours, "EXPIRES", "WAITED"),
        ("requests", "list"): (gpus[0], tenant, ours, "running", "STATE"),
        ("replicas", "list"): ("replicas.address", "configuration"),
        ("adapters", "prefetch", adapter): ("host store", "RESULT"),
    }
    async for served in serve_here(tmp_path, sidecar, ids=gpus):
        await served.register(adapter, tmp_path)
        await served.register("slow", tmp_path, seed=2)
        for _ in range(3):
            served.gateway.submit(RequestFacts("slow", tenant=tenant), PAYLOAD, ours, OURSELVES)
        backend: Any = served.gateway.backends[gpus[0]]
        await backend.running_are(2)
        for words, wholes in shown.items():
            with Terminal(*words, "--admin", served.address, lines=60) as terminal:
                await terminal.ended()
                cut = [whole for whole in wholes if not any(whole in line for line in terminal.lines)]
                assert not cut, "\n".join(terminal.lines)


async def test_json_everywhere(served: Served, tmp_path: Path) -> None:
    """Every command of the admin side prints one JSON value when asked."""
    source = str(write_adapter(tmp_path / "sql"))
    assert (await served.cli("adapters", "register", "sql", source, "--json")).json()["unchanged"] is False
    assert (await served.cli("adapters", "list", "--json")).json()[0]["name"] == "sql"
    shown = (await served.cli("adapters", "show", "sql", "--json")).json()
    assert (shown["rank"], shown["pinned"], shown["modules"]) == (8, False, ["attn_q", "attn_v"])
    assert [place["tier"] for place in shown["backends"]] == ["absent", "absent"]
    for verb in ("pin", "unpin"):
        assert (await served.cli("adapters", verb, "sql", "--json")).json()["name"] == "sql"
    for verb in ("prefetch", "evict"):
        assert (await served.cli("adapters", verb, "sql", "--json")).json()["places"]
    assert [each["id"] for each in (await served.cli("backends", "list", "--json")).json()] == ["trt-0", "trt-1"]
    for verb, state in (("drain", "drained"), ("undrain", "up"), ("show", "up")):
        assert (await served.cli("backends", verb, "trt-0", "--json")).json()["state"] == state
    assert (await served.cli("queue", "--json")).json()["verdict"] == ("trt-1 is down; nobody waits, nothing runs")
    assert (await served.cli("adapters", "unregister", "sql", "--json")).json() == {"places": []}


async def test_a_release_of_what_is_not_quarantined(served: Served, tmp_path: Path) -> None:
    """It says that there is nothing to release, and ends with 1; a quarantined adapter is served again."""
    await served.register("sql", tmp_path)
    ended = await served.cli("adapters", "release", "sql")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("error: sql is not quarantined, and no backend refuses it: there is nothing to ")
    state = served.gateway.state
    state.versions[state.names["sql"].digest].quarantined = Suspicion(("b0", "b1"), "both died")
    refused = await served.cli("generate", "sql", "hi")
    assert (refused.code, '"sidecar adapters release sql"' in refused.err) == (1, True)
    ended = await served.cli("adapters", "release", "sql")
    assert (ended.code, ended.out) == (0, "sql is served again\n")


async def test_a_release_of_what_was_rolled_back(served: Served, tmp_path: Path) -> None:
    """The quarantine of a version that is not current any more ends, too."""
    await served.register("sql", tmp_path)
    await served.register("sql", tmp_path, seed=2)
    state = served.gateway.state
    bad = state.versions[state.names["sql"].digest]
    bad.quarantined = Suspicion(("b0", "b1"), "both died")
    assert (await served.cli("adapters", "rollback", "sql")).out == "sql stands for v1\n"
    ended = await served.cli("adapters", "release", "sql")
    assert (ended.code, bad.quarantined) == (0, None)


async def test_a_canary_is_listed(served: Served, tmp_path: Path) -> None:
    """Which version it is and its share."""
    await served.register("sql", tmp_path)
    write_adapter(tmp_path / "sql", seed=2)
    staged = await served.cli("adapters", "register", "sql", str(tmp_path / "sql"), "--stage")
    assert staged.code == 0, staged.err
    await served.cli("adapters", "promote", "sql@v2", "--weight", "5")
    assert re.search(r"^sql +v1 .* v2 gets 5 %", (await served.cli("adapters", "list")).out, re.M)
    await served.cli("adapters", "promote", "sql@v2")
    assert "gets" not in (await served.cli("adapters", "list")).out


async def test_a_drain_is_waited_for(served: Served, tmp_path: Path) -> None:
    """`--wait` tells on stderr how much still runs, and returns once nothing does; the backend is then drained."""
    await served.register("slow", tmp_path)
    backend: Any = served.gateway.backends["trt-0"]
    tickets = [served.gateway.submit(RequestFacts("slow"), PAYLOAD, "mine", OURSELVES) for _ in range(2)]
    await backend.running_are(2)
    waiting = asyncio.create_task(served.cli("backends", "drain", "trt-0", "--wait"))
    await until(lambda: served.gateway.state.backends["trt-0"].draining)
    for ticket in tickets:
        assert not waiting.done()
        served.gateway.cancel(ticket)
    ended = await waiting
    assert (ended.code, ended.out) == (0, "trt-0 is drained: nothing runs there\n")
    assert ended.err.startswith("trt-0 is draining, ")
    assert re.search(r"^trt-0 +drained +0/2 ", (await served.cli("backends", "list")).out, re.M)


async def test_a_drain_that_refuses_what_waits_says_so(served: Served, tmp_path: Path) -> None:
    """Nothing else takes what waits there: how many were refused is told, and how to avoid that."""
    await served.register("slow", tmp_path)
    backend: Any = served.gateway.backends["trt-0"]
    for _ in range(5):
        served.gateway.submit(RequestFacts("slow"), PAYLOAD, "mine", OURSELVES)
    await backend.running_are(2)
    assert (await served.cli("backends", "drain", "trt-1")).out == "trt-1 is down, drained: nothing runs there\n"
    ended = await served.cli("backends", "drain", "trt-0")
    refused, state = ended.out.splitlines()
    assert refused.startswith(
        "3 waiting requests were refused, for nothing else can serve such; to avoid that, undrain "
    )
    assert (ended.code, state) == (0, "trt-0 is draining, 2 still running")
    await served.cli("backends", "undrain", "trt-0")
    served.gateway.submit(RequestFacts("slow"), PAYLOAD, "mine", OURSELVES)
    await until(lambda: served.gateway.state.queued == 1)
    assert (await served.cli("backends", "drain", "trt-0", "--json")).json()["refused"] == 1
    assert (await served.cli("backends", "drain", "trt-0", "--json")).json()["refused"] == 0
    assert (await served.cli("backends", "show", "trt-0", "--json")).json()["refused"] is None


async def test_an_address_without_a_port(sidecar: Callable[..., Ended]) -> None:
    """The error says what is missing, and closes no bracket that it has not opened."""
    ended = await asyncio.to_thread(sidecar, "queue", "--admin", "no-such-host.invalid")
    assert ended.code == 4
    assert "]" not in ended.err
    assert ended.err.endswith("the address has no port; give it as HOST:PORT with --admin\n")


async def test_a_drain_of_an_engine_that_is_down_is_shown_and_lifted(served: Served) -> None:
    """An engine that comes back would get nothing: its drain is told beside its state, until it is lifted."""
    assert (await served.cli("backends", "drain", "trt-1")).out == "trt-1 is down, drained: nothing runs there\n"
    for verb in ("list", "check"):
        assert re.search(r"^trt-1 +down, drained  ", (await served.cli("backends", verb)).out, re.M)
    assert re.search(r"^state +down, drained *$", (await served.cli("backends", "show", "trt-1")).out, re.M)
    assert (await served.cli("backends", "undrain", "trt-1")).out == "trt-1 is no longer drained; it is down\n"
    assert re.search(r"^trt-1 +down  ", (await served.cli("backends", "list")).out, re.M)


async def test_a_drain_that_somebody_ends(served: Served, tmp_path: Path) -> None:
    """Who waits for it is told."""
    await served.register("slow", tmp_path)
    backend: Any = served.gateway.backends["trt-0"]
    served.gateway.submit(RequestFacts("slow"), PAYLOAD, "mine", OURSELVES)
    await backend.running_are(1)
    waiting = asyncio.create_task(served.cli("backends", "drain", "trt-0", "--wait"))
    await until(lambda: served.gateway.state.backends["trt-0"].draining)
    served.gateway.set_drain("trt-0", False)
    ended = await waiting
    assert ended.code == 1
    assert "trt-0 is up, so it does not become empty: somebody ended the drain" in ended.err


async def test_the_sidecars_errors(served: Served, tmp_path: Path) -> None:
    """A refusal ends with 1, in the sidecar's words and with its reason; --json has the details."""
    await served.register("sql", tmp_path)
    ended = await served.cli("adapters", "show", "sqk")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err == 'error: unknown adapter "sqk"; did you mean sql? [UNKNOWN_ADAPTER]\n'
    error = (await served.cli("adapters", "register", "x", "/etc", "--json")).error()
    assert (error["reason"], error["code"], error["adapter"]) == ("ORIGIN_NOT_ALLOWED", "PERMISSION_DENIED", "x")
    assert (await served.cli("backends", "show", "nope", "--json")).error()["reason"] == "UNKNOWN_BACKEND"


async def test_backends_and_queue_for_people(served: Served, tmp_path: Path) -> None:
    """With two seats taken `queue` begins with the verdict and `backends show` says what is pinned by what."""
    await served.register("slow", tmp_path)
    tickets = [served.gateway.submit(RequestFacts("slow", tenant="acme"), PAYLOAD, "mine", OURSELVES) for _ in range(3)]
    await served.gateway.backends["trt-0"].running_are(2)  # type: ignore[attr-defined]
    lines = (await served.cli("queue")).out.splitlines()
    assert re.match(
        r"trt-1 is down; 1 waiting for .* \(bound [\d.]+ min, expires 10 min\) because all seats are taken on trt-0",
        lines[0],
    )
    assert re.search(r"^slow +acme +trt-0 +1 +2 +.* +\d+ +seats full *$", lines[-1])
    lines = (await served.cli("queue", "--requests")).out.splitlines()
    assert any(re.search(r"\d+ \w+ +10 min +slow +acme +default +trt-0 +seats full +\d+ +mine *$", at) for at in lines)
    assert sum(bool(re.search(r"^mine +running +.* slow@v1 +acme +default +trt-0", line)) for line in lines) == 2
    assert re.search(r"^trt-1 +down +0/2 ", (await served.cli("backends", "list")).out, re.M)
    shown = (await served.cli("backends", "show", "trt-0")).out
    assert "2 of 2 taken, 1 queued" in shown
    assert re.search(r"^pace +a guess until its runs have said more", shown, re.M)
    assert "; no new request is sent there: it is down\n" in (await served.cli("backends", "show", "trt-1")).out
    checked = await served.cli("backends", "check")
    assert (checked.code, "trt-1: not up" in checked.err) == (1, True)
    assert re.search(r"^trt-0 +up +a guess", checked.out, re.M)
    assert re.search(r"^slow +\w+ +[\d.]+ m?s +1 +2 +1 +running", shown, re.M)
    for ticket in tickets:
        served.gateway.close(ticket)


async def test_generate(served: Served, tmp_path: Path) -> None:
    """The text goes to stdout, where it came from to stderr, and --json has both."""
    await served.register("sql", tmp_path)
    ended = await served.cli("generate", "sql", "hello", "--stats")
    assert (ended.code, ended.out) == (0, "I am sql — ja\n")
    assert re.fullmatch(
        r"sql@v1 from trt-0: adapter fetched and loaded \(load .* ms\), queued .* ms, 2 tokens, 0 heals\n", ended.err
    )
    answer = (await served.cli("generate", "sql", "hello", "--request-id", "mine", "--json")).json()
    assert answer["origin"]["request_id"] == "mine"
    assert answer["text"] == "I am sql — ja"
    assert (answer["origin"]["cache"], answer["origin"]["backend"]) == ("resident", "trt-0")


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an answer waits for is said at once."""
    monkeypatch.setattr(awaiting, "SAID_AFTER_S", 0.01)


@pytest.mark.usefixtures("soon")
async def test_generate_says_what_it_waits_for(served: Served, tmp_path: Path) -> None:
    """For a seat, then for the engine; after the timeout the request is cancelled, and the error has the reason."""
    await served.register("slow", tmp_path)
    backend: Any = served.gateway.backends["trt-0"]
    tickets = [served.gateway.submit(RequestFacts("slow"), PAYLOAD, "mine", OURSELVES) for _ in range(2)]
    await backend.running_are(2)
    words = ("generate", "slow", "hi", "--admin", served.address, "--timeout")
    ended = await served.cli(*words, "1s")
    assert (ended.code, ended.out) == (1, "")
    *said, error = ended.err.splitlines()
    assert "waiting for slow: all seats are taken on trt-0" in said
    assert (
        error == "error: slow: no answer began within 1.0 s: all seats are taken on trt-0; --timeout TIME waits longer"
    )
    await until(lambda: len(served.gateway.state.requests) == len(tickets))
    served.gateway.cancel(tickets[0])
    ended = await served.cli(*words, "1s", "--json")
    assert "it runs on trt-0, which has sent nothing of it yet" in ended.error()["message"]


@pytest.mark.usefixtures("soon")
async def test_generate_where_nobody_tells_why(served: Served, tmp_path: Path) -> None:
    """Without an admin listener it says so, and how to name it."""
    await served.register("slow", tmp_path)
    ended = await served.cli("generate", "slow", "hi", "--admin", "127.0.0.1:1", "--timeout", "0.3s")
    said, error = ended.err.splitlines()
    assert said == (
        "waiting for slow: the admin listener at 127.0.0.1:1 does not say why (UNREACHABLE); --admin names it"
    )
    assert error.startswith("error: slow: no answer began within 300 ms: ")


def test_generate_waits_a_minute(sidecar: Callable[..., Ended]) -> None:
    """By default, and its help says so."""
    assert TIMEOUT_S == 60
    assert re.search(r"Default: 1m", " ".join(sidecar("generate", "--help").out.split()))
    assert sidecar("generate", "sql", "hi", "--timeout", "soon").code == 2


def test_whom_verify_asks_by_default_is_said_once(sidecar: Callable[..., Ended]) -> None:
    """By --all; --backend refers to it."""
    words = " ".join(sidecar("adapters", "verify", "--help").out.replace("│", "").split())
    assert "all backends that are up and can serve it; the default" in words
    assert "Default: as --all" in words
    assert "Default: all." not in words


async def test_generate_when_it_cannot(served: Served, tmp_path: Path) -> None:
    """An unknown adapter, a passed deadline and a missing prompt have their own endings."""
    await served.register("slow", tmp_path)
    unknown = (await served.cli("generate", "slaw", "hi", "--request-id", "mine", "--json")).error()
    assert (unknown["reason"], unknown["request_id"]) == ("UNKNOWN_ADAPTER", "mine")
    late = await served.cli("generate", "slow", "hi", "--deadline-ms", "100", "--json")
    assert late.code == 1
    # Whether it was still being packed for, or running already, is a matter of how busy the machine is.
    assert late.error()["reason"] in ("EXPIRED", "DEADLINE_EXCEEDED")
    assert (await served.cli("generate", "slow")).code == 2
    assert (await served.cli("generate", "", "hi")).err == (
        'error: name an adapter, "base" for none, or versions with --compare\n'
    )
    assert (await served.cli("generate", "slow", "--tokens", "1,x")).code == 2


async def test_a_token_file(tmp_path: Path, sidecar: Callable[..., Ended]) -> None:
    """With --token-file the command is let in; without, the reason is UNAUTHENTICATED; a missing file is misuse."""
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    async for served in serve_here(tmp_path, sidecar, file):
        assert (await served.cli("adapters", "list", "--token-file", str(file))).code == 0
        assert (await served.cli("adapters", "list", "--json")).error()["reason"] == "UNAUTHENTICATED"
        assert (await served.cli("adapters", "list", "--token-file", str(tmp_path / "no"))).code == 2
        for text in ("", "no key\n", "ключ\n"):
            file.write_text(text)
            ended = await served.cli("adapters", "list", "--token-file", str(file))
            assert (ended.code, f"{file} has no key or token on its first line" in ended.err) == (2, True)


async def test_the_wrong_listener(served: Served) -> None:
    """A server that has not got the service is named as such."""
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    ended = await asyncio.to_thread(served.command, "adapters", "list", "--admin", f"127.0.0.1:{port}")
    await server.stop(None)
    assert ended.code == 4
    assert ended.err == (
        f"error: 127.0.0.1:{port} is not the admin listener of a sidecar, which is usually 127.0.0.1:9001; "
        "name it with --admin\n"
    )


async def test_a_listener_for_http(sidecar: Callable[..., Ended]) -> None:
    """Which speaks no gRPC."""
    answer = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
    async with await asyncio.start_server(lambda _, to: (to.write(answer), to.close()), "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        ended = await asyncio.to_thread(sidecar, "generate", "sql", "hi", "--server", f"{host}:{port}")
    assert (ended.code, f"{host}:{port} is not the data listener of a sidecar, which is " in ended.err) == (4, True)


def test_a_sentence_for_each_cache() -> None:
    """Where the adapter was is said in words; a load only when there was one."""
    origin = gateway_pb2.Origin(version="sql@v1", backend="b", cache="resident", queue_ms=3, output_tokens=24, heals=1)
    assert sentence(origin) == "sql@v1 from b: adapter resident, queued 3 ms, 24 tokens, 1 heal"
    origin = gateway_pb2.Origin(cache="base", output_tokens=1)
    assert sentence(origin) == "base: no adapter needed, queued 0 ms, 1 token, 0 heals"
