"""CPU of `sidecar top` on a large pool: of a view and a viewer in the process, of an update in the terminal."""

from __future__ import annotations

import asyncio
import gc
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic, thread_time
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import grpc
import psutil

from sidecar.fronts.admin import pool as front
from sidecar.proto import admin_pb2_grpc
from sidecar.shell.flow import Lanes, TokenRates
from sidecar.telling.groups import Page
from tests.bench.core import Pool
from tests.bench.figures import Figure, middle
from tests.kit.scripted_backend import ScriptedBackend
from tests.kit.terminal import Terminal

ADAPTERS, BACKENDS, TENANTS, WAITING = 5_000, 200, 100, 10_000
ROWS, ROUNDS = 60, 5
SCREENS = ((80, 24), (200, 60))
PAGES = {"queue": "queue", "engines": "backends", "adapters": "adapters", "tenants": "tenants", "requests": "requests"}
"""By the name on the screen: the name in the API."""
WATCHED_S, UPDATES = 10.0, 10
SHARE_GOAL, UPDATE_GOAL_MS = 2.0, 100.0


async def bench(folder: Path) -> list[Figure]:
    pool = Pool(ADAPTERS, BACKENDS, TENANTS)
    pool.fill(WAITING)
    gc.freeze()
    lanes = Lanes(lambda: pool.core.state)
    for _ in range(ROWS):
        lanes.sample()
    service = front.PoolService(_gateway(pool, lanes), "r0")
    beside = f"{BACKENDS} engines, {ADAPTERS:,} adapters, {WAITING:,} waiting, {len(pool.running):,} running"
    figures: list[Figure] = []
    with patch.object(front, "monotonic_ns", lambda: pool.now_ns):
        for name, page in PAGES.items():
            value = middle([await _view_ms(service, page) for _ in range(ROUNDS)])
            figures.append(Figure(f"pool: a view of the page {name}", value, "ms", note="" if figures else beside))
        async with _served(service) as (address, views):
            share = await _viewer(address, views)
            figures.append(Figure("pool: a viewer who asks for five a second", share, "% of a core", goal=SHARE_GOAL))
            with patch.object(front, "SHARE_MAX", math.inf):
                for columns, lines in SCREENS:
                    for name in PAGES:
                        value = await _update_ms(address, views, name, columns, lines)
                        figures.append(
                            Figure(f"pool: an update of {name} at {columns}x{lines}", value, "ms", goal=UPDATE_GOAL_MS)
                        )
    gc.unfreeze()
    return figures


def _gateway(pool: Pool, lanes: Lanes) -> Any:
    """Return what the service asks of a gateway: nobody is confined, nothing is passed on to other replicas."""
    return SimpleNamespace(
        state=pool.core.state,
        tickets={},
        fleet=SimpleNamespace(successors={}),
        backends={name: ScriptedBackend(name) for name in pool.core.state.backends},
        lanes=lanes,
        access=SimpleNamespace(check=lambda caller: None),
        elsewhere=None,
        catalogue=SimpleNamespace(registry={}),
        observe=lambda observer: None,
        driver=SimpleNamespace(forget=lambda observer: None),
        known_backend=lambda backend: None,
    )


async def _view_ms(service: front.PoolService, page: str) -> float:
    rates = TokenRates(service._gateway.state, {}, {})
    begun_s = thread_time()
    await service._view(page, Page(limit=ROWS), "b00" if page == "backends" else "", None, rates)
    return (thread_time() - begun_s) * 1e3


@asynccontextmanager
async def _served(service: front.PoolService) -> AsyncIterator[tuple[str, list[float]]]:
    """Serve the pool; yield its address and a list that grows by the time of each view."""
    views: list[float] = []
    make = service._view

    async def counted(*arguments: Any) -> Any:
        views.append(monotonic())
        return await make(*arguments)

    server = grpc.aio.server()
    admin_pb2_grpc.add_PoolServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    with patch.object(service, "_view", counted), patch.object(front, "confined_to", lambda *_: None):
        await server.start()
        try:
            yield f"127.0.0.1:{port}", views
        finally:
            await server.stop(None)


async def _viewer(address: str, views: list[float]) -> float:
    """Return what one viewer takes of a core, in percent, in the thread that serves it."""
    with Terminal("top", "--admin", address, "--page", "engines", "--interval", "0.2") as top:
        await top.shows(f"{BACKENDS}/{BACKENDS} engines serve")
        begun_s, begun_cpu_s = monotonic(), thread_time()
        await asyncio.sleep(WATCHED_S)
        return 100 * (thread_time() - begun_cpu_s) / (monotonic() - begun_s)


async def _update_ms(address: str, views: list[float], page: str, columns: int, lines: int) -> float:
    """Return the CPU of the terminal's process for one update."""
    terminal = Terminal("top", "--admin", address, "--page", page, "--interval", "0.2", columns=columns, lines=lines)
    with terminal as top:
        await top.shows(f"{BACKENDS}/{BACKENDS} engines serve")
        process: Any = psutil.Process(top.process.pid)
        begun, cpu = len(views), process.cpu_times()
        while len(views) < begun + UPDATES:
            await asyncio.sleep(0.1)
        after = process.cpu_times()
        return float(1e3 * (after.user + after.system - cpu.user - cpu.system) / (len(views) - begun))
