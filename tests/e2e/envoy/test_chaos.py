"""What goes wrong around the lane: processes that are killed, and an access log that is late, lossy and repeats itself.

No answer is wrong, no request is answered twice, and no seat and no pin is left once all is quiet.
"""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest

from sidecar.core.effects import Probe
from sidecar.core.events import RunEnded
from tests.bench.processes import SidecarProcess
from tests.e2e.envoy.house import ENGINE, Clients, House, Streamed, house, log_to
from tests.e2e.envoy.log_relay import log_relay
from tests.e2e.envoy.server import EnvoyServer
from tests.kit.ports import free_port
from tests.kit.serving import until, write_adapters
from tests.kit.vllm_emulated import VllmProcess

TOLD: tuple[tuple[str, Mapping[str, float]], ...] = (
    ("late", {"delay_s": 5.0}),
    ("lossy", {"dropped": 0.1}),
    ("twice", {"doubled": 0.5}),
    ("all", {"delay_s": 2.0, "dropped": 0.1, "doubled": 0.2}),
)

SEATS = 4


async def quiet(running: House) -> None:
    """Wait until nothing is queued, nothing runs and nothing is pinned."""
    state = running.served.state
    await until(lambda: not state.requests, patience_s=120)
    for backend in state.backends.values():
        assert not backend.running
        assert not backend.kv_reserved
        assert not any(slot.running for slot in backend.slots.values())
    assert not any(entry.pins for entry in state.store.entries.values())


@pytest.mark.parametrize("faults", [faults for _, faults in TOLD], ids=[name for name, _ in TOLD])
async def test_a_bad_access_log_costs_no_answer_and_no_seat(tmp_path: Path, faults: Mapping[str, float]) -> None:
    names = write_adapters(tmp_path / "adapters", 4)
    picker, random = f"127.0.0.1:{free_port()}", Random(7)
    async with log_relay(picker, **faults) as relay:
        listener = {"address": picker}
        changed = log_to(relay.address)
        async with house(tmp_path, names, time_scale=0.05, changed=changed, listener=listener) as running:
            asked = [(random.choice(names), random.choice((2, 30, 90))) for _ in range(120)]
            answers = await asyncio.gather(*(running.stream(name, tokens) for name, tokens in asked))
            for (name, tokens), answer in zip(asked, answers, strict=True):
                assert answer.token_ids == running.tokens_of(name, tokens)
                assert answer.is_complete
            await quiet(running)
            seen = Counter(each.seen.value for each in running.served.recorder.events if isinstance(each, RunEnded))
            assert sum(seen.values()) == len(asked)
            assert seen["nothing"] <= relay.counts["dropped"]  # some answers are seen whole in their first chunk
            assert bool(seen["nothing"]) == bool(relay.counts["dropped"])


async def test_a_killed_envoy_leaves_nothing_behind(tmp_path: Path) -> None:
    """Its clients' answers are cut; the engine has them no longer, and the seats are free again."""
    names = write_adapters(tmp_path / "adapters", 2)
    async with house(tmp_path, names, time_scale=1.0) as running:
        state = running.served.state
        asked = [asyncio.create_task(running.stream(names[number % 2], 900)) for number in range(6)]
        await until(lambda: sum(request.first_token for request in state.requests.values()) == len(asked))
        await running.envoy.kill()
        assert all(isinstance(each, httpx.HTTPError) for each in await asyncio.gather(*asked, return_exceptions=True))
        await quiet(running)
        await running.envoy.start()
        assert (await running.stream(names[0], 4)).is_complete


async def test_a_killed_engine_ends_what_it_ran(tmp_path: Path) -> None:
    """What had begun is cut, as in path, and the next request is answered by the other engine."""
    names = write_adapters(tmp_path / "adapters", 1)
    async with house(tmp_path, names, engines=2, time_scale=1.0) as running:
        state = running.served.state
        asked = [asyncio.create_task(running.stream(names[0], 900)) for _ in range(8)]
        await until(lambda: sum(request.first_token for request in state.requests.values()) == len(asked))
        busiest = max(state.backends.values(), key=lambda backend: len(backend.running))
        lost = len(busiest.running)
        await running.engines[int(busiest.id[-1])].kill()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        whole = [each for each in answers if not isinstance(each, BaseException) and each.is_complete]
        assert len(whole) == len(asked) - lost
        assert all(each.token_ids == running.tokens_of(names[0], 900) for each in whole)
        await until(lambda: not state.requests)
        assert (await running.stream(names[0], 4)).headers["x-lora-backend"] != busiest.id


async def test_an_engine_that_stops_is_suspected_by_what_the_log_no_longer_tells(tmp_path: Path) -> None:
    """Where the log tells of answers each second. While it does, an engine that goes on is not suspected."""
    names = write_adapters(tmp_path / "adapters", 1)
    backend = {"engine": ENGINE | {"cost": "llama-3.1-8b/a100_sxm/vllm"}}
    async with house(tmp_path, names, time_scale=1.0, backend=backend) as running:
        (known,) = running.served.state.backends.values()
        first = asyncio.create_task(running.stream(names[0], 400))
        await until(lambda: running.served.sidecar.metrics.picker().entries["used"] >= 3)
        asked = [asyncio.create_task(running.stream(names[0], 900)) for _ in range(4)]
        assert (await first).is_complete
        assert not any(isinstance(effect, Probe) for effect in running.served.recorder.effects)
        running.engines[0].signal(signal.SIGSTOP)
        await until(lambda: known.silence.suspected)
        running.engines[0].signal(signal.SIGCONT)
        answers = await asyncio.gather(*asked)
        assert all(answer.token_ids == running.tokens_of(names[0], 900) for answer in answers)
        assert not known.silence.suspected
        await quiet(running)


class Killable:
    """An engine with SEATS seats, a sidecar of its own process, and an Envoy in front of both."""

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._settings: dict[str, Any] = {}
        self._backend: dict[str, Any] = {}
        self.clients: Clients
        self.name = ""

    async def start(self) -> None:
        """Start all of it."""
        (self.name,) = write_adapters(self._folder / "adapters", 1)
        (self._folder / "shared").mkdir()
        free, picker = {"address": "127.0.0.1:0"}, f"127.0.0.1:{free_port()}"
        engine = VllmProcess("--compute", "none", time_scale=1.0)
        await engine.start()
        self._stack.push_async_callback(engine.kill)
        self._backend = {
            "url": f"vllm://{engine.http_address}", "id": "vllm-0", "adapters_dir": str(self._folder / "shared"),
            "engine": {"device_pages": 2, "host_pages": 4, "seats": SEATS},
        }  # fmt: skip
        self._settings = {
            "listeners": {"data": free, "admin": free, "http": free, "endpoint_picker": {"address": picker}},
            "adapters": {"serve": str(self._folder / "adapters")},
        }
        self.sidecar = await self.started()
        envoy = await self._stack.enter_async_context(EnvoyServer(self._folder / "envoy", picker))
        http = httpx.AsyncClient(base_url=f"http://{envoy.address}", timeout=60.0, trust_env=False)
        self.clients = Clients(await self._stack.enter_async_context(http))

    async def started(self) -> SidecarProcess:
        """Start a sidecar."""
        return await self._stack.enter_async_context(SidecarProcess(self._folder, [self._backend], **self._settings))

    async def let_go(self, count: int, tokens: int) -> list[asyncio.Task[Streamed]]:
        """Ask for answers, and wait until the sidecar has let all of them go."""
        asked = [asyncio.create_task(self.clients.stream(self.name, tokens)) for _ in range(count)]
        await self.shows(self.sidecar, "picker_requests", "unseen", count)
        return asked

    async def shows(self, sidecar: SidecarProcess, name: str, label: str, value: float) -> None:
        """Wait until a metric has a value."""
        async with asyncio.timeout(60):
            while (await sidecar.metrics()).get((name, (label,))) != value:
                await asyncio.sleep(0.02)


async def test_a_killed_sidecar_cuts_no_answer_that_it_has_let_go(tmp_path: Path) -> None:
    """Held requests get their 503 at once, answers go on to their end, and a new sidecar serves again."""
    async with AsyncExitStack() as stack:
        house = Killable(tmp_path, stack)
        await house.start()
        running = await house.let_go(4, 300)
        held = [asyncio.create_task(house.clients.stream(house.name, 4)) for _ in range(4)]
        await house.shows(house.sidecar, "picker_requests", "held", 4)
        house.sidecar.signal(signal.SIGKILL)
        assert {answer.status for answer in await asyncio.gather(*held)} == {503}
        assert (await house.clients.stream(house.name, 4)).status == 503
        answers = await asyncio.gather(*running)
        assert all(answer.is_complete and len(answer.token_ids) == 300 for answer in answers)
        await house.started()
        async with asyncio.timeout(60):
            while (answer := await house.clients.stream(house.name, 4)).status == 503:
                await asyncio.sleep(0.1)
        assert answer.is_complete


async def test_a_new_process_counts_the_answers_that_the_one_before_has_let_go(tmp_path: Path) -> None:
    """Their seats are taken until they end, by the engine's own count."""
    async with AsyncExitStack() as stack:
        house = Killable(tmp_path, stack)
        await house.start()
        await house.shows(house.sidecar, "seats", "vllm-0", SEATS)
        running = await house.let_go(3, 1500)
        house.sidecar.signal(signal.SIGKILL)
        anew = await house.started()
        await house.shows(anew, "seats", "vllm-0", SEATS - 3)
        assert not any(task.done() for task in running)
        assert (await house.clients.stream(house.name, 4)).is_complete
        assert all(answer.is_complete for answer in await asyncio.gather(*running))
        await house.shows(anew, "seats", "vllm-0", SEATS)
