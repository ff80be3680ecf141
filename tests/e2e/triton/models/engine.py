"""The emulated engine in an event loop of its own, in a thread of Triton's Python stub."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from functools import partial
from threading import Thread
from typing import Any

from sidecar.lab.engine.kserve.faults import Faults
from sidecar.lab.engine.kserve.inference import Answer, Inference, Query
from sidecar.lab.engine.kserve.llmapi import inference_of
from sidecar.lab.engine.kserve.options import Options, spec_of
from sidecar.lab.engine.kserve.served import ServedLog
from sidecar.lab.engine.kserve.server import EngineGauges, driver_of
from tests.e2e.triton.models.gauges import Gauges
from tests.e2e.triton.models.outbox import Outbox, Reply

PERIOD_S = 0.1
"""cancellation_check_period_ms and stats_check_period_ms of the real backend."""


class EngineThread:
    """One engine. All methods may be called from any thread."""

    def __init__(self, options: Options, number: int, outbox: Outbox, gauges: Gauges) -> None:
        self._options = options
        self._number = number
        self._outbox = outbox
        self._gauges = gauges
        self._answering: set[asyncio.Task[None]] = set()
        started: Future[tuple[asyncio.AbstractEventLoop, Inference, EngineGauges]] = Future()
        self._thread = Thread(target=self._run, args=(started,), name="engine", daemon=True)
        self._thread.start()
        self._loop, self._inference, families = started.result()
        # All are there when the model is ready.
        gauges.set(families.collect())

    def answer(self, query: Query, reply: Reply) -> None:
        """Run a query; its answers go by the reply."""
        self._loop.call_soon_threadsafe(self._begin, query, reply)

    def stop(self) -> None:
        """Cancel what runs and end the thread."""
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def _run(self, started: Future[Any]) -> None:
        try:
            asyncio.run(self._serve(started))
        except BaseException as error:
            if not started.done():
                started.set_exception(error)
            raise

    async def _serve(self, started: Future[Any]) -> None:
        self._stopping = asyncio.Event()
        log = ServedLog(self._options.served_log)
        driver = driver_of(self._options, spec_of(self._options), log, Faults(self._options), self._number)
        families = EngineGauges(lambda: driver.engine)
        started.set_result((asyncio.get_running_loop(), inference_of(driver, self._options), families))
        tasks = [asyncio.create_task(driver.run()), asyncio.create_task(self._look_around(families))]
        await self._stopping.wait()
        await _end([*self._answering, *tasks])
        log.close()

    async def _look_around(self, families: EngineGauges) -> None:
        """Every period: who has left, and what the gauges show."""
        while True:
            await asyncio.sleep(PERIOD_S)
            self._outbox.post(self._outbox.look_for_cancelled)
            self._outbox.post(partial(self._gauges.set, list(families.collect())))

    def _begin(self, query: Query, reply: Reply) -> None:
        task = asyncio.create_task(self._answer(query, reply))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)
        reply.cancelled = partial(self._loop.call_soon_threadsafe, task.cancel)

    async def _answer(self, query: Query, reply: Reply) -> None:
        try:
            await self._inference.run(query, reply.emit)
        except asyncio.CancelledError:
            # Triton keeps the request until it has a last response, though nobody will read it.
            await reply.emit(Answer([] if not query.model.decoupled else None, None, final=True))
            raise


async def _end(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
