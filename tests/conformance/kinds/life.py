"""How a kind's backends must follow an engine that comes and goes."""

from __future__ import annotations

import asyncio

from sidecar.core.events import BackendLost, BackendProbed, BackendUp, FirstToken
from tests.conformance.kinds.runs import right_or_a_miss
from tests.conformance.kinds.stage import LONG_TOKENS, Stage

QUIET_S = 0.1


async def answers_a_probe(stage: Stage) -> None:
    """A probe of an engine that is idle finds that it lives, once."""
    async with stage.backend() as bench:
        bench.backend.probe(10.0)
        probed = await bench.comes(BackendProbed)
        assert probed.alive, f"a probe of an engine that lives says {probed.text!r}"
        await asyncio.sleep(QUIET_S)
        assert len(bench.of(BackendProbed)) == 1, "one probe was answered twice"


async def is_lost_and_comes_up_again(stage: Stage) -> None:
    """An engine that is killed in the middle of a run is lost once; started again it is up, and nothing is believed."""
    async with stage.backend() as bench:
        assert bench.backend.detail(), "detail() is empty while it is up"
        up = bench.of(BackendUp)
        assert [event.backend for event in up] == [bench.backend.id], f"of one start it says {up}"
        assert bench.facts.kind in {model.name for model in stage.kind.models}, f"its model is a {bench.facts.kind}"
        await bench.load(0)
        said = await bench.says(0)
        request = await bench.begin(None, tokens=LONG_TOKENS, streams=bench.backend.streams)
        if bench.backend.streams:
            await bench.comes(FirstToken, request=request)
        await stage.engine.kill()
        await bench.comes(BackendLost)
        assert bench.backend.detail(), "detail() is empty while it is down"
        await stage.engine.start()
        await bench.comes(BackendUp, times=2)
        assert len(bench.of(BackendLost)) == 1, f"one loss was posted {len(bench.of(BackendLost))} times"
        assert len(bench.ends(request)) <= 1, f"a run that was lost ended twice: {bench.ends(request)}"
        await right_or_a_miss(bench, 0, said)


async def takes_nothing_while_it_is_down(stage: Stage) -> None:
    """While the engine is away orders are given up in silence: the loss that was posted ends them all."""
    async with stage.backend() as bench:
        adapter = await bench.adapter(0)
        await stage.engine.kill()
        await bench.comes(BackendLost)
        request = await bench.begin(None)
        bench.order_load(*adapter)
        bench.backend.cancel(request, 1)
        bench.backend.probe(1.0)
        await bench.backend.forget(adapter[1].key)
        before = len(bench.events)
        await asyncio.sleep(QUIET_S)
        assert bench.events[before:] == [], f"of an engine that is away it says {bench.events[before:]}"
        assert bench.ends(request) == [], f"the loss has ended this run already: {bench.ends(request)}"
        assert [weights.released for weights in bench.weights] == [1], "the weights of a load were not released"


async def stops_and_leaves_nothing(stage: Stage) -> None:
    """`stop` in the middle of a run frees the engine's seat, and no task of the backend's is left."""
    before = asyncio.all_tasks()
    async with stage.backend() as bench:
        request = await bench.begin(None, tokens=LONG_TOKENS, streams=bench.backend.streams)
        if bench.backend.streams:
            await bench.comes(FirstToken, request=request)
        await bench.stop()
        await bench.until(lambda: stage.engine.running() == 0, "the engine still answers what ran")
        assert len(bench.ends(request)) <= 1, f"a run that was stopped ended twice: {bench.ends(request)}"
        await stage.engine.kill()
        left: set[asyncio.Task[object]] = set()

        def nothing_is_left() -> bool:
            nonlocal left
            left = asyncio.all_tasks() - before
            return not left

        try:
            await bench.until(nothing_is_left, "tasks are left")
        except AssertionError:
            raise AssertionError(f"after stop() these tasks are left: {[task.get_coro() for task in left]}") from None
