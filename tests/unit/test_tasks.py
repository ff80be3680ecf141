"""Tasks end when their owner stops, also if what they await swallows a cancellation."""

from __future__ import annotations

import ast
import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

import sidecar
from sidecar.access.jwks import Jwks
from sidecar.backends.api import Reply
from sidecar.config import Config
from sidecar.config.identity import Issuer
from sidecar.core.effects import Settle
from sidecar.core.enums import Outcome
from sidecar.discovery.following import Follower
from sidecar.discovery.found import Finder, Found
from sidecar.errors import Misused, Reason
from sidecar.fronts import relay
from sidecar.serve.reloading import Reloads, Source
from sidecar.tasks import ended, undisturbed

PATIENCE_S = 60.0
ENDING = Settle(1, Outcome.CANCELLED, "sql", "acme", "default", 0, 0)


class Swallowing:
    """Awaits for ever what swallows the first cancellation, as `asyncio.wait_for` may before Python 3.12."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.swallowed = 0

    async def wait(self, *_: Any, **__: Any) -> NoReturn:
        self.begun.set()
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.swallowed += 1
                if self.swallowed == 2:
                    raise


Stop = Callable[[], Awaitable[None]]


def of_discovery(swallowing: Swallowing, tmp_path: Path) -> Stop:
    class Finding(Finder):
        async def watch(self) -> AsyncIterator[frozenset[Found]]:
            await swallowing.wait()
            yield frozenset()

    follower = Follower(Finding(), SimpleNamespace(), 0.0, 0.0)  # type: ignore[arg-type]
    follower.start()
    return follower.stop


def of_reloads(swallowing: Swallowing, tmp_path: Path) -> Stop:
    """A reload that fails, and that the audit records."""

    def read() -> NoReturn:
        raise Misused(Reason.CONFIG_INVALID, "it is wrong")

    (tmp_path / "config.yaml").write_text("wrong: true")
    parts: Any = SimpleNamespace(access=SimpleNamespace(access=SimpleNamespace(changed=swallowing.wait)))
    reloads = Reloads(Config(), parts, Source(tmp_path / "config.yaml", read))
    reloads.hung_up()
    return reloads.stop


def of_an_issuer(swallowing: Swallowing, tmp_path: Path) -> Stop:
    issuer = Issuer(issuer="https://issuer.test", audience="sidecar", jwks="https://issuer.test/keys")
    keys = Jwks(issuer, None, lambda: 0.0, swallowing.wait)
    keys.start()
    return keys.stop


@pytest.mark.parametrize("owner", [of_discovery, of_reloads, of_an_issuer])
async def test_a_swallowed_cancellation_does_not_keep_its_owner(
    owner: Callable[[Swallowing, Path], Stop], tmp_path: Path
) -> None:
    swallowing = Swallowing()
    stop = owner(swallowing, tmp_path)
    async with asyncio.timeout(PATIENCE_S):
        await swallowing.begun.wait()
        await stop()
    assert swallowing.swallowed == 2


async def test_a_task_that_swallows_a_cancellation_is_ended_beside_one_that_fails() -> None:
    """Also one that has ended by itself; None is a task that was never begun."""
    swallowing = Swallowing()
    going = asyncio.create_task(swallowing.wait())
    failing = asyncio.create_task(asyncio.to_thread(int, "no number"))
    await swallowing.begun.wait()
    await asyncio.wait([failing])
    async with asyncio.timeout(PATIENCE_S):
        await ended(None, going, failing)
    assert going.cancelled()
    assert swallowing.swallowed == 2


def test_no_part_of_the_product_swallows_a_cancellation() -> None:
    """What catches it raises, and a task is awaited with `ended`; the one exception is at the bottom of its task."""
    swallow = []
    for file in sorted(Path(sidecar.__file__).parent.rglob("*.py")):
        text, name = file.read_text(), f"{file.parent.name}/{file.name}"
        if re.search(r"suppress\([^)]*CancelledError", text):
            swallow.append(name)
        for node in ast.walk(ast.parse(text)) if "CancelledError" in text else ():
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type is not None else "BaseException"
                raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
                if "CancelledError" in caught and not raises:
                    swallow.append(name)
    assert swallow == ["demo/run.py", "sidecar/tasks.py"]


async def test_a_call_that_is_cancelled_as_its_client_stalls_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The write is given up for the client's sake, and the call for the server's, in the same moment."""
    monkeypatch.setattr(relay, "LOOK_S", 0.0)
    writing = asyncio.Event()

    class Stalled:
        """A ticket whose client takes nothing."""

        blocked_since_ns: int | None = None
        settled_ns = 0

        @property
        def settled(self) -> Settle:
            if writing.is_set():  # the watch looks
                writing.clear()
                call.cancel()
            return replace(ENDING, reason=Reason.CLIENT_STALLED)

        async def next(self) -> Reply:
            return Reply(b"", None, False)

    async def write(reply: Reply) -> None:
        writing.set()
        await asyncio.Event().wait()

    call = asyncio.create_task(relay.relay(Stalled(), write))  # type: ignore[arg-type]
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.wait([call])
    assert call.cancelled()


async def test_undisturbed_work_ends_however_often_its_caller_is_cancelled() -> None:
    may_end, log = asyncio.Event(), []

    async def work() -> None:
        await may_end.wait()
        log.append("work")

    async def caller() -> None:
        try:
            await undisturbed(work())
        finally:
            log.append("caller")

    task = asyncio.create_task(caller())
    for _ in range(3):
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.sleep(0)
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log == ["work", "caller"]
