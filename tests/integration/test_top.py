"""`sidecar top` in a terminal, and the first line of `sidecar queue`: what is wrong is on the screen at once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, monotonic_ns
from typing import Any

import grpc
import pytest

from sidecar.config import parse
from sidecar.proto import admin_pb2 as pb
from sidecar.proto import admin_pb2_grpc
from sidecar.serve.app import Sidecar
from sidecar.telling.verdict import QUIET_NS
from tests.kit.cli_runs import runner
from tests.kit.emulated import EngineProcess
from tests.kit.faults import attempt
from tests.kit.serving import PATIENCE_S, Serving, place_of, serving, until, write_adapters
from tests.kit.terminal import DOWN, ENTER, ESCAPE, Terminal
from tests.kit.trtllm_emulated import TrtllmProcess
from tests.kit.trtllm_served import entry_of
from tests.kit.vllm_emulated import Client, VllmProcess

SIZES = ("--compute", "none", "--max-seq-tokens", "1000000", "--kv-blocks", "1000000")
ENGINE = (*SIZES, "--seats", "2")
LONG = 100_000
KNOWN_S = 1.5
"""Rates are told once tokens have been counted for so long."""
WITHIN_S = 5.0
"""The screen names the culprit so soon on an idle machine; the test prints how long it took, and does not assert it."""


@dataclass
class Pool:
    served: Serving
    engines: list[EngineProcess]
    asking: list[asyncio.Task[object]] = field(default_factory=list)

    def ask(self, name: str, count: int = 1, **fields: str) -> None:
        """Send requests that go on for as long as the test."""
        for _ in range(count):
            self.asking.append(asyncio.create_task(attempt(self.served, name, LONG, **fields)))

    async def runs(self, count: int) -> None:
        await until(lambda: sum(bool(r.first_token) for r in self.served.state.requests.values()) >= count)

    @property
    def admin(self) -> tuple[str, str]:
        return "--admin", self.served.sidecar.admin_address


@asynccontextmanager
async def pool(tmp_path: Path) -> AsyncIterator[Pool]:
    """Run two engines of two seats each, in processes of their own, and four adapters."""
    write_adapters(tmp_path, 4)
    async with (
        EngineProcess(*ENGINE, time_scale=1.0) as first,
        EngineProcess(*ENGINE, time_scale=1.0) as second,
        serving([first, second], tmp_path) as served,
    ):
        made = Pool(served, [first, second])
        try:
            yield made
        finally:
            for asking in made.asking:
                asking.cancel()
            for engine in made.engines:
                with suppress(ProcessLookupError):
                    engine.signal(signal.SIGCONT)
            await asyncio.gather(*made.asking, return_exceptions=True)


async def stuck(pool: Pool) -> str:
    pool.ask("a00")
    await pool.runs(1)
    (request,) = pool.served.state.requests.values()
    pool.engines[int(request.backend[-1])].signal(signal.SIGSTOP)
    return rf"{request.backend} is (quiet|stalled): nothing came for "


async def flood(pool: Pool) -> str:
    pool.ask("a00", 40, tenant="acme")
    return r"\d\d waiting, all of them for a00 of tenant acme, the oldest for "


async def cold(pool: Pool) -> str:
    loader = pool.served.sidecar._loader.pid
    assert loader is not None
    os.kill(loader, signal.SIGSTOP)
    pool.ask("a03")
    return "1 waiting for .* because weights of a03 are being (fetched|loaded)"


async def lost(pool: Pool) -> str:
    for engine in pool.engines:
        await engine.kill()
    return r"no backend is up, lost [\d.]+ m?s ago; "


async def drained(pool: Pool) -> str:
    pool.ask("a00")
    await pool.runs(1)
    (request,) = pool.served.state.requests.values()
    await pool.served.backends.Drain(pb.BackendRequest(backend=request.backend))
    return f"{request.backend} is draining; "


@pytest.mark.parametrize("cause", [stuck, flood, cold, lost, drained], ids=lambda cause: cause.__name__)
async def test_the_first_line_names_the_culprit(tmp_path: Path, cause: Callable[[Pool], Awaitable[str]]) -> None:
    async with pool(tmp_path) as made:
        with Terminal("top", *made.admin) as top:
            await top.shows("2/2 engines serve")
            wanted = await cause(made)
            begun_s = monotonic()
            await top.matches(wanted)
            print(f"{cause.__name__}: named after {monotonic() - begun_s:.1f} s (wanted within {WITHIN_S:g} s)")
        with Terminal("queue", *made.admin) as queue:
            await queue.matches(wanted)


@asynccontextmanager
async def answered_at_once(engine: VllmProcess | TrtllmProcess, tmp_path: Path) -> AsyncIterator[Serving]:
    """Serve an engine that runs three requests whose clients want the whole answer at once, for as long as it takes."""
    write_adapters(tmp_path / "adapters", 1)
    backend = entry_of(tmp_path) if isinstance(engine, TrtllmProcess) else {"adapters_dir": str(tmp_path / "shared")}
    async with (
        engine,
        serving([engine], tmp_path / "adapters", backend=backend) as served,
        Client(served.sidecar.http_address) as client,
    ):
        asking = [asyncio.create_task(client.complete("a00", tokens=LONG, ignore_eos=True)) for _ in range(3)]
        try:
            await until(lambda: sum(request.running for request in served.state.requests.values()) == 3)
            yield served
        finally:
            for each in asking:
                each.cancel()
            with suppress(ProcessLookupError):
                engine.signal(signal.SIGCONT)
            await asyncio.gather(*asking, return_exceptions=True)


def silent_by_tokens(served: Serving) -> bool:
    """Return True once an engine whose tokens nobody sees would be called quiet by them alone."""
    (backend,) = served.state.backends.values()
    return bool(monotonic_ns() - backend.silence.since_ns > QUIET_NS)


@pytest.mark.parametrize("kind", [VllmProcess, TrtllmProcess], ids=lambda kind: kind.__name__)
async def test_an_engine_that_answers_at_once_is_not_quiet(
    tmp_path: Path, kind: type[VllmProcess | TrtllmProcess]
) -> None:
    """No token comes before the answer. Its rate is the engine's own, by its counter, and unknown without one."""
    async with answered_at_once(kind(*SIZES, "--seats", "8", time_scale=1.0), tmp_path) as served:
        await until(lambda: silent_by_tokens(served))
        assert (await served.queues.Get(pb.QueueRequest())).verdict == "nobody waits, 3 running"
        pool: Any = admin_pb2_grpc.PoolStub(served.admin_channel)
        watched = pool.Watch(pb.WatchPoolRequest(page="backends", interval_s=0.2))
        counts = kind is VllmProcess
        first = view = await watched.read()
        async with asyncio.timeout(PATIENCE_S):
            while view.time < first.time + KNOWN_S or (counts and not view.tokens_per_s):
                view = await watched.read()
        (row,) = view.backend_rows
        assert row.HasField("tokens_per_s") is view.HasField("tokens_per_s") is counts
        assert (row.tokens_per_s > 0) is counts
        of_adapters = pool.Watch(pb.WatchPoolRequest(page="adapters", interval_s=0.2))
        (adapter,) = (await of_adapters.read()).adapter_rows
        assert (adapter.name, adapter.running, adapter.HasField("tokens_per_s")) == ("a00", 3, False)
        for call in (watched, of_adapters):
            call.cancel()


async def test_an_engine_that_answers_at_once_and_is_stuck_is_named(tmp_path: Path) -> None:
    """Its steps are counted, and stand still."""
    engine = VllmProcess(*SIZES, "--seats", "8", time_scale=1.0)
    async with answered_at_once(engine, tmp_path) as served:
        engine.signal(signal.SIGSTOP)
        with Terminal("top", "--admin", served.sidecar.admin_address) as top:
            await top.matches(r"vllm-0 is quiet: nothing came for [\d.]+ s with 3 running")


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (200, 60)])
async def test_every_page_fits_the_screen(tmp_path: Path, columns: int, lines: int) -> None:
    async with pool(tmp_path) as made:
        made.ask("a00", 6, tenant="acme")
        await made.runs(2)
        with Terminal("top", *made.admin, columns=columns, lines=lines) as top:
            await top.shows("ADAPTER TENANT BACKEND WAIT RUN OLDEST BOUND", "a00 acme trt-")
            top.press("2")
            await top.shows("ENGINE STATE SEATS WAIT TOK/S", "slots of trt-", "now", "A a00", "a00*")
            top.press("3")
            await top.shows("ADAPTER VERSION WAIT RUN OLDEST", "on 2 GPUs, memory", "? all keys q quit")
            top.press("4")
            await top.shows("TENANT WAIT RUN OLDEST BOUND", "acme")
            top.press("5")
            await top.shows("ID STATE AGE ADAPTER", "waiting", "running")
            assert all(len(line) <= columns for line in top.lines)
            assert len(top.lines) == lines
            top.press("q")
            assert await asyncio.to_thread(top.process.wait) == 0


async def test_levers_ask_first(tmp_path: Path) -> None:
    """A key asks; "n" leaves all as it is; "y" cancels, pauses and drains, and the screen says so."""
    async with pool(tmp_path) as made:
        made.ask("a00", request_id="mine", tenant="acme")
        await made.runs(1)
        state = made.served.state
        with Terminal("top", *made.admin, "--page", "requests") as top:
            await top.shows("mine running")
            top.press("d")
            await top.shows("engines are drained on page 2: press 2, then d")
            top.press("c")
            await top.shows("Cancel the request mine for a00?", "[y/N]")
            top.press("n")
            await top.hides("[y/N]")
            assert state.requests
            top.press(ENTER)
            await top.shows("(id mine): a00", "load 1 of its version into")
            top.press(ESCAPE)
            await top.shows("mine running")
            top.press("c")
            await top.shows("[y/N]")
            top.press("y")
            await top.shows("1 request cancelled")
            await until(lambda: not state.requests)
            top.press("3/a02" + ENTER)
            await top.shows("/a02", "a02 v1")
            top.press("p")
            await top.shows("Pause a02?")
            top.press("y")
            await top.shows("a02 is paused", "a02 v1 0 0 - - 0 paused")
            top.press("p")
            await top.shows("Resume a02")
            top.press("y")
            await top.shows("a02 takes requests")
            top.press("2" + DOWN)
            await top.shows("slots of trt-1")
            top.press("d")
            await top.shows("Drain trt-1?")
            top.press("y")
            await until(lambda: state.backends["trt-1"].draining)
            await top.shows("trt-1 is drained; ", "trt-1 drained")
            top.press(ENTER)
            await top.shows("address triton://", "open adapters")
            top.press(ESCAPE)
            await top.shows("slots of trt-1")


async def test_the_drain_of_an_engine_that_is_down_is_lifted(tmp_path: Path) -> None:
    """The key follows the drain, not the state: what comes back would get nothing."""
    async with pool(tmp_path) as made:
        backend = made.served.state.backends["trt-0"]
        await made.served.backends.Drain(pb.BackendRequest(backend="trt-0"))
        await made.engines[0].kill()
        with Terminal("top", *made.admin, "--page", "engines") as top:
            await top.shows("trt-0 down, drained", "slots of trt-0")
            top.press("d")
            await top.shows("Undrain trt-0", "[y/N]")
            top.press("y")
            await until(lambda: not backend.draining)
            await top.shows("trt-0 is no longer drained; it is down")
            await top.hides("trt-0 down, drained")
            top.press("d")
            await top.shows("Drain trt-0?", "[y/N]")


async def test_a_sidecar_that_is_away_is_said_and_found_again(tmp_path: Path) -> None:
    """A terminal that lost its sidecar says so, and what it shows is old; it goes on once that is back."""
    free, admin = {"address": "127.0.0.1:0"}, f"unix:{tmp_path}/admin"
    async with EngineProcess(*ENGINE) as engine:
        config = {
            "backends": [place_of(engine, 0)],
            "listeners": {"data": free, "admin": {"address": admin}, "http": free},
        }
        sidecar = await Sidecar.start(parse(config, "the test"))
        with Terminal("top", "--admin", admin, "--page", "engines") as top:
            try:
                await top.shows("1/1 engines serve", "slots of trt-0")
            finally:
                await sidecar.stop()
            await top.shows("cannot reach the admin listener", "what is below is old")
            config["backends"] = [place_of(engine, 0) | {"id": "renamed"}]
            sidecar = await Sidecar.start(parse(config, "the test"))
            try:
                await top.matches("1/1 engines serve( · 0 tok/s)? nobody waits")
                await top.shows("slots of renamed")
                top.press("q")
                assert await asyncio.to_thread(top.process.wait) == 0
            finally:
                await sidecar.stop()


async def test_a_terminal_that_is_gone_ends_it(tmp_path: Path) -> None:
    """Nothing goes on drawing for nobody."""
    async with pool(tmp_path) as made:
        with Terminal("top", *made.admin) as top:
            await top.shows("2/2 engines serve")
            top.hang_up()
            await until(lambda: top.process.poll() is not None)


async def test_it_ends_without_a_word_while_it_opens_something(tmp_path: Path) -> None:
    """Keys that come before the screen has acted on the ones before."""
    async with pool(tmp_path) as made:
        with Terminal("top", *made.admin, "--page", "engines") as top:
            await top.shows("slots of trt-0")
            top.press(ENTER + "q")
            await until(lambda: top.process.poll() is not None)
            await top.ended()
            assert "Warning" not in top.flat


ODD = "\x1b[2J\x1b]0;title\x07\x9b31m\rend\u202e"
SPELLED = r"\x1b[2J\x1b]0;title\x07\x9b31m\rend\u202e"


class Odd(admin_pb2_grpc.QueuesServicer, admin_pb2_grpc.PoolServicer):
    """Answers with sequences that would clear a screen, name a window and turn text around."""

    async def Get(self, request: Any, context: Any) -> Any:
        return pb.QueueResponse(verdict=ODD, groups=[pb.QueueGroup(adapter=ODD, tenant=ODD, waiting=1)], groups_total=1)

    async def List(self, request: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.INTERNAL, ODD)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield pb.PoolView(
            verdict=ODD,
            replica=ODD,
            rows_total=1,
            adapter_rows=[pb.AdapterRow(name=ODD, waiting=1, oldest=pb.WaitingRequest(adapter=ODD, voided=ODD))],
        )
        await asyncio.Event().wait()


@asynccontextmanager
async def answering(servicer: Any) -> AsyncIterator[str]:
    """Serve queues and the pool as a servicer does; yield the address."""
    server = grpc.aio.server()
    admin_pb2_grpc.add_QueuesServicer_to_server(servicer, server)
    admin_pb2_grpc.add_PoolServicer_to_server(servicer, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield address
    finally:
        await server.stop(None)


async def test_text_of_others_is_spelled_and_moves_no_cursor() -> None:
    """Whatever a server sends as a verdict, a name or an error appears as text in its place."""
    async with answering(Odd()) as admin:
        with Terminal("queue", "--admin", admin, columns=200) as queue:
            await queue.shows(f"{SPELLED} ADAPTER", f"{SPELLED} {SPELLED} -")
        with Terminal("requests", "list", "--admin", admin, columns=200) as requests:
            await requests.shows(f"error: {SPELLED}")
        with Terminal("top", "--admin", admin, "--page", "adapters", columns=200) as top:
            await top.shows(f"top · {SPELLED}", f"{SPELLED} 1 queue", "ADAPTER VERSION", f"{SPELLED} - 1 0")
            await top.shows(f"nothing has come from the sidecar at {admin} for 1", "what is below is old")


class Slow(admin_pb2_grpc.QueuesServicer, admin_pb2_grpc.PoolServicer):
    """Shows 7 groups at once, and the engines when it is told to."""

    def __init__(self) -> None:
        self.goes_on = asyncio.Event()

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        groups = [pb.QueueGroup(adapter=f"a{number}", waiting=1) for number in range(7)]
        if request.page == "queue":
            yield pb.PoolView(verdict="7 waiting", rows_total=7, groups=groups)
        else:
            await self.goes_on.wait()
            row = pb.BackendRow(backend=pb.Backend(id="gpu-0", state="up"))
            yield pb.PoolView(verdict="7 waiting", rows_total=1, backend_rows=[row])
        await asyncio.Event().wait()


async def test_a_page_that_has_not_come_is_loading() -> None:
    """Its key shows at once that it is on its way; that of the page that is shown leaves its rows."""
    slow = Slow()
    async with answering(slow) as admin:
        with Terminal("top", "--admin", admin) as top:
            await top.shows("by oldest 7", "a6 - -")
            top.press("2")
            await top.shows("by oldest loading")
            assert "of 7" not in top.flat
            slow.goes_on.set()
            await top.shows("by oldest 1 ENGINE", "gpu-0 up")
            top.press("1")
            await top.shows("by oldest 7", "a6 - -")
            top.press("1/")
            await top.shows("enter filters", "by oldest 7", "a6 - -")


async def test_a_page_keeps_its_row() -> None:
    """Somebody looks at another page, and comes back to the row that was under the cursor."""
    slow = Slow()
    slow.goes_on.set()
    async with answering(slow) as admin:
        with Terminal("top", "--admin", admin) as top:
            await top.shows("a6 - -")
            top.press("\x1b[B\x1b[B\x1b[B2")
            await top.shows("gpu-0 up")
            top.press("1")
            await top.shows("a6 - -")
            top.press("c")
            await top.shows("Cancel the request for a3 that no engine takes yet?")


class Groups(admin_pb2_grpc.QueuesServicer, admin_pb2_grpc.PoolServicer):
    """Shows three groups and, as the requests' ids, by which names they are asked for; keeps what it is to cancel."""

    rows = (("sql", "acme", "gpu-1"), ("sql", "acme", "gpu-3"), ("", "", ""))

    def __init__(self) -> None:
        self.cancelled: list[Any] = []

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        view = pb.PoolView(verdict="5 waiting", rows_total=1)
        if request.page == "requests":
            names = [f"{each.name}={value}" for each, value in request.only.ListFields()]
            view.request_rows.add(request_id=",".join(names) or "all", state="waiting")
        elif request.page == "tenants":
            view.tenant_rows.add(tenant="acme", waiting=2)
        else:
            rows = [row for row in self.rows if request.filter in row[0]]
            view.groups.extend(
                pb.QueueGroup(adapter=adapter, tenant=tenant, backend=backend, waiting=2, running=1)
                for adapter, tenant, backend in rows
            )
            view.rows_total = len(rows)
        yield view
        await asyncio.Event().wait()

    async def Cancel(self, request: Any, context: Any) -> Any:
        self.cancelled.append(request)
        return pb.CancelResponse(cancelled=3)


async def test_a_row_opens_and_cancels_its_own_requests() -> None:
    """Nothing of the same adapter and tenant at another engine; Esc goes back to the page and its filter."""
    groups = Groups()
    async with answering(groups) as admin:
        with Terminal("top", "--admin", admin, columns=120) as top:
            await top.shows("base model - -")
            top.press("/sq" + ENTER)
            await top.shows("by oldest /sq 2")
            top.press(DOWN + ENTER)
            await top.shows(
                "adapter=sql,tenant=acme,backend=gpu-3 waiting", "requests of adapter sql, tenant acme, backend "
            )
            top.press(ESCAPE)
            await top.shows("by oldest /sq 2", "sql acme gpu-3 2 1")
            top.press("c")
            await top.shows("Cancel 3 requests for sql of tenant acme at gpu-3?")
            top.press("y")
            await top.shows("3 requests cancelled")
            top.press(ESCAPE)
            await top.shows("base model - - 2 1")
            top.press(DOWN + DOWN + ENTER)
            await top.shows("adapter=,tenant=,backend= waiting", "requests of adapter none")
            top.press("5")
            await top.shows("all waiting")
            top.press("4")
            await top.shows("TENANT WAIT", "acme 2 0")
            top.press(ENTER)
            await top.shows("tenant=acme waiting", "requests of tenant acme")
            top.press(ESCAPE)
            await top.shows("acme 2 0")
    (asked,) = groups.cancelled
    assert (asked.only.adapter, asked.only.tenant, asked.only.backend) == ("sql", "acme", "gpu-3")


async def test_a_page_key_closes_the_help() -> None:
    """The help says how to close it; a page's key shows that page, and "?" closes it, too."""
    slow = Slow()
    slow.goes_on.set()
    async with answering(slow) as admin:
        with Terminal("top", "--admin", admin) as top:
            await top.shows("a6 - -")
            top.press("?")
            await top.shows("drain or undrain an engine", "esc closes")
            top.press("2")
            await top.hides("esc closes")
            await top.shows("ENGINE STATE", "gpu-0 up")
            top.press("?")
            await top.shows("esc closes")
            top.press("?")
            await top.hides("esc closes")
            await top.shows("gpu-0 up")


class Failing(admin_pb2_grpc.QueuesServicer, admin_pb2_grpc.PoolServicer):
    """Refuses with one status."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    async def Get(self, request: Any, context: Any) -> None:
        await context.abort(self._code, "as the test wants it")

    async def Watch(self, request: Any, context: Any) -> None:
        await context.abort(self._code, "as the test wants it")


FAILURES = {
    grpc.StatusCode.UNAUTHENTICATED: 1,
    grpc.StatusCode.PERMISSION_DENIED: 1,
    grpc.StatusCode.INTERNAL: 1,
    grpc.StatusCode.UNIMPLEMENTED: 4,
    grpc.StatusCode.UNAVAILABLE: 4,
}


@pytest.mark.parametrize("code", FAILURES, ids=lambda code: code.name)
async def test_a_call_that_fails_at_the_start_ends_it_as_it_ends_other_commands(
    code: grpc.StatusCode, capfd: pytest.CaptureFixture[str]
) -> None:
    async with answering(Failing(code)) as admin:
        for more in ((), ("--json",)):
            other = await asyncio.to_thread(runner(capfd), "queue", "--admin", admin, *more)
            assert other.code == FAILURES[code]
            with Terminal("top", "--admin", admin, *more, columns=300) as top:
                await top.shows(" ".join(other.err.split()))
                assert await asyncio.to_thread(top.process.wait) == FAILURES[code]


async def test_a_token_file_that_is_not_there_ends_it(tmp_path: Path) -> None:
    """What is found before anything is sent ends it, too."""
    token = tmp_path / "token"
    with Terminal("top", "--admin", "127.0.0.1:1", "--token-file", str(token), columns=200) as top:
        await top.shows(f"error: {token}: No such file or directory")
        assert await asyncio.to_thread(top.process.wait) == 2


async def test_scripts_get_views_as_lines_of_json(tmp_path: Path) -> None:
    """`top --json` prints one view a line; `queue --json` has the same verdict and groups."""
    async with pool(tmp_path) as made:
        made.ask("a00", 6, tenant="acme")
        await made.runs(2)
        admin = "--admin", made.served.sidecar.admin_address
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        top = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "sidecar", "top", "--json", "--interval", "0.2", *admin, stdout=subprocess.PIPE
        )
        signal.signal(signal.SIGINT, before)
        assert top.stdout is not None
        first, second = [json.loads(await top.stdout.readline()) for _ in range(2)]
        top.send_signal(signal.SIGINT)
        assert await top.wait() == 130
        queue = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "sidecar", "queue", "--json", *admin, stdout=subprocess.PIPE
        )
        asked = json.loads((await queue.communicate())[0])
        assert first["time"] < second["time"]
        for view in (first, second, asked):
            assert " waiting, " in view["verdict"]
            assert {(each["adapter"], each["tenant"]) for each in view["groups"]} == {("a00", "acme")}
            assert sum(each["waiting"] + each["running"] for each in view["groups"]) == 6


def test_without_a_terminal_it_names_what_scripts_use(capfd: pytest.CaptureFixture[str]) -> None:
    ended = runner(capfd)("top")
    assert ended.code == 2
    assert ended.err == "error: top needs a terminal; with --json it prints a line of JSON an update\n"
    assert runner(capfd)("top", "--page", "x").err.startswith('error: --page is "x"; it is one of queue, engines, ')
