"""New content under a name: the switch is atomic, every answer is one version's, and going back never waits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from sidecar.core.effects import Fetch, Load
from sidecar.core.facts import Layout, packed_key, task_id_of
from sidecar.lab.engine.kserve.compute import dummy_token
from sidecar.proto import admin_pb2 as pb
from tests.kit.emulated import running_engine
from tests.kit.peft_files import write_adapter
from tests.kit.serving import Answer, Serving, serving, until

DUMMY = {"compute": "none", "shape": "tiny"}


def tokens_of(version: Any, count: int = 3) -> list[int]:
    """Return the answer of a version as `Adapters.Get` shows it."""
    task_id = task_id_of(packed_key(version.digest, Layout("float16"), version.generation))
    return [dummy_token(task_id, position) for position in range(count)]


async def register(served: Serving, path: Path, **fields: Any) -> Any:
    return await served.adapters.Register(pb.RegisterRequest(name="sql", path=str(path), **fields))


async def versions(served: Serving) -> dict[str, Any]:
    adapter = await served.adapters.Get(pb.AdapterRequest(name="sql"))
    return {version.version: version for version in adapter.versions}


def roles(found: dict[str, Any]) -> dict[str, str]:
    return {name: version.role for name, version in found.items()}


async def switching(served: Serving, switch: Callable[[int], Awaitable[Any]]) -> list[tuple[int, Answer]]:
    """Send 1,000 requests, 50 at a time, while `switch` is called 20 times; say after how many each began."""
    limit, switched = asyncio.Semaphore(50), 0

    async def one() -> tuple[int, Answer]:
        async with limit:
            begun = switched
            return begun, await served.ask("sql", 3)

    running = [asyncio.create_task(one()) for _ in range(1000)]
    for number in range(1, 21):
        while sum(task.done() for task in running) < 45 * number:
            await asyncio.sleep(0.001)
        await switch(number)
        switched = number
    return await asyncio.gather(*running)


def of_one_version(answer: Answer) -> str:
    """Return the digest that an answer says it is of, having checked that its tokens are that version's, once."""
    (origin,) = answer.origins
    task_id = task_id_of(packed_key(origin.digest, Layout("float16")))
    assert answer.tokens == [dummy_token(task_id, position) for position in range(3)]
    return str(origin.digest)


async def test_1000_requests_while_a_name_switches_20_times(tmp_path: Path) -> None:
    """Each answer is one version's, none fails, and none that began after a switch is from before it."""
    paths = [write_adapter(tmp_path / f"v{number}", seed=number) for number in range(21)]
    async with running_engine(**DUMMY) as engine, serving([engine], roots=[tmp_path]) as served:
        digests = [(await register(served, paths[0])).adapter.digest]

        async def switch(number: int) -> None:
            digests.append((await register(served, paths[number])).adapter.digest)

        for begun, answer in await switching(served, switch):
            assert digests.index(of_one_version(answer)) >= begun


@pytest.mark.slow
async def test_1000_requests_while_a_name_rolls_back_20_times(tmp_path: Path) -> None:
    """To and fro between two versions: every answer is wholly of one of them."""
    one, two = write_adapter(tmp_path / "one", seed=1), write_adapter(tmp_path / "two", seed=2)
    async with running_engine(**DUMMY) as engine, serving([engine], roots=[tmp_path]) as served:
        for path in (one, two):
            await register(served, path)
        known = {version.digest for version in (await versions(served)).values()}

        async def switch(number: int) -> None:
            await served.adapters.Rollback(pb.RollbackRequest(name="sql", version=f"v{2 - number % 2}"))

        answers = await switching(served, switch)
        assert {of_one_version(answer) for _, answer in answers} == known


async def test_a_name_that_is_taken_anew_never_answers_as_before(tmp_path: Path) -> None:
    """Unregister, then register other content under the same name: nothing of the old one is left anywhere."""
    paths = [write_adapter(tmp_path / f"v{number}", seed=number) for number in range(6)]
    async with running_engine(**DUMMY) as engine, serving([engine], roots=[tmp_path]) as served:
        for path in paths:
            digest = (await register(served, path)).adapter.digest
            answers = await asyncio.gather(*(served.ask("sql", 3) for _ in range(20)))
            assert {of_one_version(answer) for answer in answers} == {digest}
            await served.adapters.Unregister(pb.UnregisterRequest(name="sql"))


async def test_rollback_never_fetches(tmp_path: Path) -> None:
    """The version before stays in the store however small that is; going back needs no origin."""
    one, two = write_adapter(tmp_path / "one", seed=1), write_adapter(tmp_path / "two", seed=2)
    async with running_engine(**DUMMY, lora_host_pages=1) as engine, serving([engine], roots=[tmp_path]) as served:
        await register(served, one)
        first = await served.ask("sql", 3)
        await register(served, two)
        second = await served.ask("sql", 3)
        assert first.tokens != second.tokens
        for path in (one, two):
            (path / "adapter_model.safetensors").unlink()
        fetches = served.recorder.count(Fetch)
        await served.adapters.Rollback(pb.RollbackRequest(name="sql"))
        assert (await served.ask("sql", 3)).tokens == first.tokens
        with pytest.raises(grpc.aio.AioRpcError, match="rolled back to v1 already, from v2"):
            await served.adapters.Rollback(pb.RollbackRequest(name="sql"))
        assert (await served.ask("sql", 3)).tokens == first.tokens
        assert served.recorder.count(Fetch) == fetches


async def test_stage_promote_and_share(tmp_path: Path) -> None:
    """A staged version is asked for by ordinal only; a share is kept by session; promotion moves the name."""
    one, two = write_adapter(tmp_path / "one", seed=1), write_adapter(tmp_path / "two", seed=2)
    async with running_engine(**DUMMY) as engine, serving([engine], roots=[tmp_path]) as served:
        await register(served, one)
        await register(served, two, stage=True, labels={"run": "7"})
        found = await versions(served)
        assert roles(found) == {"v1": "current", "v2": ""}
        assert dict(found["v2"].labels) == {"run": "7"}
        assert (await served.ask("sql", 3)).tokens == tokens_of(found["v1"])
        assert (await served.ask("sql@v2", 3)).tokens == tokens_of(found["v2"])
        assert (await served.ask(f"sql@{found['v2'].digest[:12]}", 3)).tokens == tokens_of(found["v2"])
        await served.adapters.Promote(pb.PromoteRequest(name="sql", version="v2", weight=30))
        assert roles(await versions(served)) == {"v1": "current", "v2": "canary"}
        sessions = [f"s{number}" for number in range(60)]
        picked = [(await served.ask("sql", 3, session=session)).tokens for session in sessions]
        again = [(await served.ask("sql", 3, session=session)).tokens for session in sessions]
        assert picked == again
        assert 0 < sum(tokens == tokens_of(found["v2"]) for tokens in picked) < 60
        await served.adapters.Promote(pb.PromoteRequest(name="sql", version="v2"))
        assert roles(await versions(served)) == {"v1": "previous", "v2": "current"}
        assert (await served.ask("sql", 3)).tokens == tokens_of(found["v2"])


async def test_refresh_gives_every_engine_a_fresh_copy(tmp_path: Path) -> None:
    """A new task id for the same content, loaded anew; the old one is not asked for again."""
    path = write_adapter(tmp_path / "one")
    async with running_engine(**DUMMY) as engine, serving([engine], roots=[tmp_path]) as served:
        await register(served, path)
        before = await served.ask("sql", 3)
        await served.adapters.Refresh(pb.RefreshRequest(name="sql"))
        after = await served.ask("sql", 3)
        found = (await versions(served))["v1"]
        assert found.generation == 1
        assert after.tokens == tokens_of(found) != before.tokens
        assert len({load.packed.task_id for load in served.recorder.of(Load)}) == 2


async def test_the_same_content_is_unchanged_and_old_content_is_its_own_version_again(tmp_path: Path) -> None:
    """No new ordinal for content that the name has had."""
    one, two = write_adapter(tmp_path / "one", seed=1), write_adapter(tmp_path / "two", seed=2)
    async with running_engine(**DUMMY) as engine, serving([engine], roots=[tmp_path]) as served:
        assert not (await register(served, one)).unchanged
        assert (await register(served, one)).unchanged
        await register(served, two)
        await register(served, one)
        assert roles(await versions(served)) == {"v1": "current", "v2": "previous"}


async def test_unregister_drains_first(tmp_path: Path) -> None:
    """What runs is answered in full before the name is forgotten; what comes after is refused at once."""
    path = write_adapter(tmp_path / "one")
    async with running_engine(**DUMMY, time_scale=0.2) as engine, serving([engine], roots=[tmp_path]) as served:
        await register(served, path)
        running = asyncio.create_task(served.ask("sql", 60))
        while not engine.engine.counters.active:
            await asyncio.sleep(0.001)
        forgetting = asyncio.ensure_future(served.adapters.Unregister(pb.UnregisterRequest(name="sql")))
        while "sql" in served.state.names:
            await asyncio.sleep(0.001)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.ask("sql", 1)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert not forgetting.done()
        assert len((await running).tokens) == 60
        await forgetting
        assert served.sidecar.registry.get("sql") is None
        assert not served.state.versions


async def test_a_declared_name_is_its_owners_unless_held(tmp_path: Path) -> None:
    """What the configuration serves cannot be changed from the command line, except for a while."""
    write_adapter(tmp_path / "served" / "sql", seed=1)
    other = write_adapter(tmp_path / "other", seed=2)
    async with running_engine(**DUMMY) as engine, serving([engine], tmp_path / "served", [tmp_path]) as served:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await register(served, other)
        assert "managed by config" in (caught.value.details() or "")
        held = await register(served, other, hold_s=3600)
        assert (held.adapter.managed_by, held.adapter.version) == ("config", "sql@v2")
        assert 0 < held.adapter.held_s <= 3600


async def test_a_hold_that_runs_out_gives_the_name_back(tmp_path: Path) -> None:
    """Overridden or unregistered for a moment: then it is as the configuration says again, without a restart."""
    write_adapter(tmp_path / "served" / "sql", seed=1)
    other = write_adapter(tmp_path / "other", seed=2)
    async with running_engine(**DUMMY) as engine, serving([engine], tmp_path / "served", [tmp_path]) as served:
        configured = served.state.names["sql"].digest
        await register(served, other, hold_s=1)
        await until(lambda: served.state.names["sql"].digest == configured)
        await served.adapters.Unregister(pb.UnregisterRequest(name="sql", hold_s=1))
        await until(lambda: "sql" in served.state.names)
        assert served.state.names["sql"].digest == configured


async def test_watch_streams_changes_and_resumes(tmp_path: Path) -> None:
    """All names first, then each change; a token takes up where a watcher stopped, one that is too old is refused."""
    one, two = write_adapter(tmp_path / "one", seed=1), write_adapter(tmp_path / "two", seed=2)
    async with running_engine(**DUMMY) as engine, serving([engine], roots=[tmp_path]) as served:
        await register(served, one)
        watching = served.adapters.Watch(pb.WatchRequest())
        first = await watching.read()
        assert (first.name, first.adapter.version) == ("sql", "sql@v1")
        await register(served, two)
        second = await watching.read()
        assert second.adapter.version == "sql@v2"
        watching.cancel()
        await served.adapters.Unregister(pb.UnregisterRequest(name="sql"))
        resumed = served.adapters.Watch(pb.WatchRequest(token=second.token))
        gone = await resumed.read()
        assert (gone.name, gone.HasField("adapter")) == ("sql", False)
        resumed.cancel()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.adapters.Watch(pb.WatchRequest(token="999999")).read()
        assert caught.value.code() is grpc.StatusCode.OUT_OF_RANGE
