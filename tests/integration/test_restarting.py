"""Engines that never free an adapter's memory, restarted one after the other under load."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from sidecar.core.events import DrainSet
from sidecar.proto import admin_pb2
from sidecar.serve import restart_rounds
from sidecar.tasks import ended
from tests.kit.peft_files import write_adapter
from tests.kit.serving import Serving, until
from tests.kit.trtllm_emulated import Client, TrtllmProcess, expected
from tests.kit.trtllm_served import entry_of, fronted

SLOTS = ("--max-loras", "4", "--max-cpu-loras", "8")
LIMIT = 20
STEPS = 500
BEYOND = 6
"""Steps that a trainer may make while an engine that is at its limit waits for its turn."""
KEPT = 4
ASKING = """
printf '%s %s %s' "$ENGINE_ID" "$ENGINE_URL" "$ENGINE_ADDRESS" > "$0/asked.new"
mv "$0/asked.new" "$0/asked"
until [ -e "$0/answer" ]; do sleep 0.02; done
answer=$(cat "$0/answer"); rm "$0/answer"
echo "the answer is $answer" >&2
exit "$answer"
"""
"""A restart command that leaves the restart to the test: it writes what it was told, and ends as the test says."""


@dataclass
class Pool:
    """Two engines that are restarted when `LIMIT` versions are in memory, and a sidecar in front of them."""

    folder: Path
    engines: dict[str, TrtllmProcess]
    served: Serving = field(init=False)
    ids: dict[str, list[int]] = field(default_factory=lambda: {"trtllm-0": [], "trtllm-1": []})
    """The ids in an engine's memory when it was restarted, and at the end."""
    host_bytes: int = 0

    def state(self, backend: str) -> Any:
        return self.served.state.backends[backend]

    def versions(self, backend: str) -> int:
        wear = self.served.sidecar.gateway.backends[backend].wear
        return 0 if wear is None else wear.versions

    async def asked(self) -> str:
        """Wait until a restart is asked for; return the engine."""
        file = self.folder / "asked"
        await until(file.exists)
        backend, url, address = file.read_text().split()
        file.unlink()
        assert url == f"trtllm://{address}" == f"trtllm://{self.engines[backend].http_address}"
        return backend

    def answer(self, status: int) -> None:
        (self.folder / "answer.new").write_text(str(status))
        (self.folder / "answer.new").rename(self.folder / "answer")

    async def note(self, backend: str) -> None:
        """Note what an engine keeps, by its own word."""
        async with Client(self.engines[backend].http_address) as client:
            told = await client.state()
        self.ids[backend].append(told["ids"])
        self.host_bytes = max(self.host_bytes, told["host_bytes"])

    async def agree(self, backend: str) -> None:
        """Wait until as many versions are counted as an engine has by its own word: a load may be on its way."""
        async with asyncio.timeout(60):
            while True:
                await self.note(backend)
                if self.ids[backend][-1] == self.versions(backend) > 0:
                    return
                self.ids[backend].pop()
                await asyncio.sleep(0.01)

    async def restart(self, backend: str) -> None:
        await self.note(backend)
        await self.engines[backend].kill()
        await self.engines[backend].start()
        self.answer(0)

    async def keep_restarting(self) -> None:
        while True:
            backend = await self.asked()
            others = [other for other in self.engines if other != backend]
            assert not self.state(backend).in_flight
            assert all(self.state(other).takes_requests for other in others)
            await self.restart(backend)

    async def load(self, step: int) -> str:
        """Load a step as a trainer does, and return the version that it became."""
        folder = write_adapter(self.folder / "steps" / f"{step}", seed=step)
        record = {"lora_name": "grpo", "lora_path": str(folder), "load_inplace": True}
        async with httpx.AsyncClient(base_url=f"http://{self.served.sidecar.http_address}", timeout=60) as http:
            reply = await http.post("/v1/load_lora_adapter", json=record)
        assert reply.status_code == 200, reply.text
        return str(reply.headers["x-lora-version"])

    async def fill(self) -> None:
        """Load steps until both engines keep as many versions as they may."""
        step = 0
        while not all(self.versions(backend) >= LIMIT for backend in self.engines):
            step += 1
            await self.load(step)


@asynccontextmanager
async def pool(folder: Path, **record: Any) -> AsyncIterator[Pool]:
    (folder / "steps").mkdir()
    (folder / "adapters").mkdir()
    async with AsyncExitStack() as stack:
        engines = {}
        for number in range(record.pop("engines", 2)):
            engine = TrtllmProcess("--compute", "none", *SLOTS, "--iteration-stats")
            engines[f"trtllm-{number}"] = await stack.enter_async_context(engine)
        backend = entry_of(folder, 4, 8) | {
            "host_versions_max": LIMIT,
            "host_versions_on_limit": record.pop("on_limit", "drain"),
            "restart": {"command": ["sh", "-c", ASKING, str(folder)]},
        }
        made = Pool(folder, engines)
        openai = {"load_calls": True, "versions_kept": KEPT}
        made.served = await stack.enter_async_context(
            fronted(list(engines.values()), folder, backend=backend, openai=openai, **record)
        )
        yield made


async def trained(pool: Pool, steps: int) -> int:
    """Load a version at each step while clients ask for the name and its versions; return the number of requests."""
    failed: list[str] = []
    asked = 0
    done = asyncio.Event()

    async def ask(number: int) -> None:
        nonlocal asked
        while not done.is_set():
            name = pool.served.state.names["grpo"]
            before = name.current
            selected = None if number % 2 else max(1, before - number % KEPT // 2)
            try:
                answer = await pool.served.ask("grpo" if selected is None else f"grpo@v{selected}")
            except grpc.aio.AioRpcError as error:
                # The steps that were made while the request was on its way to the sidecar have taken its version away.
                is_gone = selected is not None and pool.served.state.names["grpo"].current >= selected + KEPT
                if not is_gone or error.code() is not grpc.StatusCode.NOT_FOUND:
                    raise
                continue
            asked += 1
            (origin,) = answer.origins
            version = int(origin.version.removeprefix("grpo@v"))
            if answer.tokens != expected(pool.folder / "steps" / str(version), 4):
                failed.append(f"{origin.version} on {origin.backend}: {answer.tokens}")
            if version > pool.served.state.names["grpo"].current:
                failed.append(f"{origin.version} before it was the name's own")

    assert await pool.load(1) == "grpo@v1"
    asking = [asyncio.create_task(ask(number)) for number in range(8)]
    restarting = asyncio.create_task(pool.keep_restarting())
    for step in range(2, steps + 1):
        await until(lambda: all(pool.versions(backend) < LIMIT + BEYOND for backend in pool.engines))
        assert await pool.load(step) == f"grpo@v{step}"
    done.set()
    await asyncio.gather(*asking)
    await until(lambda: all(pool.state(each).takes_requests and pool.versions(each) < LIMIT for each in pool.engines))
    await ended(restarting)
    assert restarting.cancelled()
    assert failed == []
    return asked


@pytest.mark.slow
async def test_memory_is_bounded_and_nothing_fails(tmp_path: Path) -> None:
    """Each step is a version that stays in both engines' memory; both are restarted again and again, in turn."""
    async with pool(tmp_path) as made:
        asked = await trained(made, STEPS)
        for backend in made.engines:
            await made.agree(backend)
        most = max(max(ids) for ids in made.ids.values())
        restarts = {backend: len(ids) - 1 for backend, ids in made.ids.items()}
        print(
            f"{STEPS} versions, {asked} requests: at most {most} ids and {made.host_bytes} bytes, {restarts} restarts"
        )
        assert most <= LIMIT + BEYOND + 1
        # An engine misses the steps that are made while it restarts; the other has room for no more than its limit.
        assert min(restarts.values()) >= STEPS // (2 * (LIMIT + BEYOND)) - 1


async def test_a_restart_that_fails_leaves_the_engine_in_service(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has what the command said; the other engine has its turn meanwhile."""
    async with pool(tmp_path) as made:
        filling = asyncio.create_task(made.fill())
        first = await made.asked()
        made.answer(7)
        await until(lambda: made.state(first).takes_requests)
        assert f"{first}: its restart failed: sh ended with 7 (the answer is 7)" in caplog.text
        assert made.versions(first) >= LIMIT
        second = await made.asked()
        assert second != first
        await made.restart(second)
        await until(lambda: made.state(second).takes_requests and made.versions(second) < LIMIT)
        filling.cancel()


async def test_a_command_that_restarts_something_else_is_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine's steps go on, so its memory is as it was: the count stays, and the log says so."""
    async with pool(tmp_path) as made:
        filling = asyncio.create_task(made.fill())
        first = await made.asked()
        made.answer(0)
        await until(lambda: made.state(first).takes_requests and "it still keeps" in caplog.text)
        assert f"{first} was not restarted: its steps go on" in caplog.text
        assert made.versions(first) >= LIMIT
        filling.cancel()


async def test_an_operators_drain_in_the_middle_stays(tmp_path: Path) -> None:
    """The command runs already, so the engine is restarted, and it is the operator's to return."""
    async with pool(tmp_path) as made:
        filling = asyncio.create_task(made.fill())
        first = await made.asked()
        await made.served.backends.Drain(admin_pb2.BackendRequest(backend=first))
        await made.restart(first)
        await until(lambda: 0 < made.versions(first) < LIMIT)
        # The other engine is not drained: it is the last one that takes requests.
        filling.cancel()
        await until(lambda: made.served.sidecar.restarts.at is None)
        assert made.state(first).draining
        await made.served.backends.Undrain(admin_pb2.BackendRequest(backend=first))
        assert made.state(first).takes_requests


async def test_the_only_engine_is_not_restarted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on beyond its limit, and the log says once what would help."""
    monkeypatch.setattr(restart_rounds, "STANDS_S", 0.1)
    async with pool(tmp_path, engines=1) as made:
        await made.fill()
        await until(lambda: "no other engine that takes requests serves all that it serves" in caplog.text)
        assert await made.load(1000)
        assert made.state("trtllm-0").takes_requests
        assert caplog.text.count("which only a restart frees") == 1
        assert not [event for event in made.served.recorder.events if isinstance(event, DrainSet)]


async def test_a_warning_is_a_line_in_the_log_a_word_and_a_figure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By default nothing is restarted. The figures are those of the engine's own."""
    async with pool(tmp_path, on_limit="warn") as made:
        await made.fill()
        await until(lambda: caplog.text.count("which only a restart frees") == 2)
        shown = await made.served.backends.Get(admin_pb2.BackendRequest(backend="trtllm-0"))
        assert (
            f"{made.versions('trtllm-0')} adapter versions of {LIMIT} that it may keep in its memory; restart it"
            in (shown.detail)
        )
        async with httpx.AsyncClient() as http:
            text = (await http.get(f"http://{made.served.sidecar.http_address}/metrics")).text
        for backend, engine in made.engines.items():
            async with Client(engine.http_address) as client:
                ids = (await client.state())["ids"]
            assert f'lora_sidecar_backend_versions_kept{{backend="{backend}"}} {ids}.0' in text
            assert f'lora_sidecar_backend_versions_max{{backend="{backend}"}} {LIMIT}.0' in text
        assert not [event for event in made.served.recorder.events if isinstance(event, DrainSet)]


async def test_the_count_ends_with_the_engine_and_not_with_a_connection(tmp_path: Path) -> None:
    """An engine that is lost for a moment still has what it had; one that was started again has nothing."""
    async with pool(tmp_path, on_limit="warn") as made:
        for step in range(3):
            await made.load(step)
        before = made.versions("trtllm-0")
        backend = made.served.sidecar.gateway.backends["trtllm-0"]
        backend._lose("as a broken connection does")
        await until(lambda: made.state("trtllm-0").takes_requests and backend.wear is not None)
        assert made.versions("trtllm-0") == before
        await made.agree("trtllm-0")
        assert made.ids["trtllm-0"] == [before]
        await made.engines["trtllm-0"].kill()
        await until(lambda: backend.wear is None)
        await made.engines["trtllm-0"].start()
        await until(lambda: made.state("trtllm-0").takes_requests)
        await made.agree("trtllm-0")
        assert made.ids["trtllm-0"][-1] < before
