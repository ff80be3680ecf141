"""Real Tritons behind a sidecar: starting several, changing their models, and what they and the sidecar say of it."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.grpc import service_pb2

from sidecar.core.events import BackendLost
from sidecar.proto import admin_pb2
from tests.e2e.triton.repository import Repository
from tests.e2e.triton.server import TritonServer
from tests.kit.emulated import channel_to
from tests.kit.serving import PATIENCE_S, Serving, until

ENGINE: dict[str, Any] = {"compute": "none", "shape": "tiny"}
ATTEMPTS = 6
ABORTED = re.compile(r"^Signal \((?:4|6|7|8|11)\) received", re.MULTILINE)
"""What a server that ends itself writes into its log, before its connections break."""
OURS = "lora-sidecar-"
"""How the ids of the sidecar's own requests begin: loads and probes."""


class TritonAborted(Exception):
    """A server ended itself while a test ran, which its log says."""


def repeated_if_triton_aborts(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """Run a test again where the server itself aborted.

    Triton's Python backend shares locks with its models' processes: when one of these ends while it holds such a lock,
    which one in ten that are killed does, and one that is frozen or unloaded on a busy machine may, Triton aborts. And
    its gRPC front end fails an assertion of its own now and then when a model is unloaded under requests on streams.
    """

    @wraps(test)
    async def attempts(tmp_path: Path, **arguments: Any) -> None:
        for number in range(ATTEMPTS):
            try:
                return await test(tmp_path=tmp_path / f"attempt-{number}", **arguments)
            except TritonAborted:
                if number == ATTEMPTS - 1:
                    raise
        return None

    return attempts


@asynccontextmanager
async def servers(
    folder: Path, count: int = 1, control: str = "none", engine: dict[str, Any] | None = None, **repository: Any
) -> AsyncIterator[list[TritonServer]]:
    """Run servers with equal models, started at once; `engine` are their options beside those of ENGINE.

    Raises TritonAborted as soon as one of them has aborted.
    """
    models = Repository(engine=ENGINE | (engine or {}), **repository)
    made = [TritonServer(folder / f"triton-{number}", models, control) for number in range(count)]
    async with AsyncExitStack() as stack:
        for server in made:
            stack.push_async_callback(server.kill)
        await asyncio.gather(*(server.start() for server in made))
        async with _watched(made):
            yield made


@asynccontextmanager
async def _watched(made: Sequence[TritonServer]) -> AsyncIterator[None]:
    """Break a block off when a server that it runs has aborted."""
    block = asyncio.current_task()
    assert block is not None

    async def watch() -> None:
        while not _aborted(made):
            await asyncio.sleep(0.1)
        block.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    except BaseException as failure:
        if watching.done():
            block.uncancel()
        if server := _aborted(made):
            raise TritonAborted(server.log_tail()) from failure
        raise
    finally:
        watching.cancel()


def _aborted(made: Sequence[TritonServer]) -> TritonServer | None:
    """Return a server that has ended itself, None if there is none."""
    return next((one for one in made if ABORTED.search(one.log_path.read_text(errors="replace"))), None)


async def at_once(limit: int, items: Sequence[Any], ask: Callable[[Any], Awaitable[Any]]) -> list[Any]:
    """Ask for each item, no more than so many at a time; returns the answers in the items' order."""
    free = asyncio.Semaphore(limit)

    async def one(item: Any) -> Any:
        async with free:
            return await ask(item)

    return await asyncio.gather(*(one(item) for item in items))


async def verb(server: TritonServer, name: str, model: str = "tensorrt_llm") -> None:
    """Have a server load or unload a model: the reply comes when it takes requests, or takes no more."""
    async with channel_to(server.grpc_address) as stub:
        request = getattr(service_pb2, f"RepositoryModel{name}Request")(model_name=model)
        await getattr(stub, f"RepositoryModel{name}")(request)


async def reload(server: TritonServer) -> None:
    await verb(server, "Unload")
    await verb(server, "Load")


# What the engines say.


def endings(made: Sequence[TritonServer]) -> list[dict[str, Any]]:
    """Return how what ran for clients ended, on all servers."""
    return [one for server in made for one in server.served if not one["request_id"].startswith(OURS)]


def outcomes(made: Sequence[TritonServer]) -> Counter[str]:
    """Count the outcomes of what ran for clients. Fails where an attempt ran twice."""
    ended = endings(made)
    twice = [attempt for attempt, times in Counter(one["request_id"] for one in ended).items() if times > 1]
    assert not twice, f"ran twice: {twice}"
    return Counter(one["outcome"] for one in ended)


def answered(made: Sequence[TritonServer]) -> Counter[str]:
    """Count for each request, over all its attempts, how often an engine answered it to its end."""
    return Counter(one["request_id"].partition(".")[0] for one in endings(made) if one["outcome"] == "done")


async def gauges_of(server: Any, model: str = "tensorrt_llm") -> dict[str, float]:
    """Return the engine's gauges by family and label, as `request_metrics/active`."""
    async with httpx.AsyncClient(trust_env=False) as client:
        text = (await client.get(f"http://{server.metrics_address}/metrics")).text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if family.name.startswith("nv_trt_llm_") and sample.labels["model"] == model:
                (kind,) = [value for label, value in sample.labels.items() if label not in ("model", "version")]
                found[f"{family.name.removeprefix('nv_trt_llm_')}/{kind}"] = sample.value
    return found


async def engine_has(server: Any, count: int, model: str = "tensorrt_llm") -> None:
    """Wait until an engine's gauge says that so many requests are in it; a real Triton or an emulated one."""
    async with asyncio.timeout(PATIENCE_S):
        while (await gauges_of(server, model))["request_metrics/active"] != count:
            await asyncio.sleep(0.02)


# What the sidecar says.


def losses(served: Serving) -> list[str]:
    """Return why backends were given up, in order."""
    return [event.cause for event in served.recorder.events if isinstance(event, BackendLost)]


async def told_of(served: Serving, number: int = 0) -> Any:
    """Return what `backends list` says of a backend."""
    return (await served.backends.List(admin_pb2.ListBackendsRequest())).backends[number]


async def detail_has(served: Serving, text: str, number: int = 0) -> None:
    """Wait until `backends list` says something of a backend that is down."""
    async with asyncio.timeout(PATIENCE_S):
        while text not in (told := await told_of(served, number)).detail or told.state != "down":
            await asyncio.sleep(0.02)


async def back(served: Serving, backend: str = "trt-0") -> None:
    """Wait until a backend takes requests."""
    await until(lambda: served.state.backends[backend].takes_requests)
