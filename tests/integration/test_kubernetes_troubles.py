"""Declared adapters while the API server is away, refuses, forgets, or knows less than it should."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from sidecar.errors import Misused, Reason, Refused
from tests.kit.emulated import running_engine
from tests.kit.kubernetes_api import Fault
from tests.kit.kubernetes_cluster import cluster, needs_faults
from tests.kit.kubernetes_house import BOTH, DUMMY, LORAS, house, message_of
from tests.kit.peft_files import write_adapter
from tests.kit.serving import serving, until


@needs_faults
async def test_an_api_server_that_is_away_loses_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names answer meanwhile, and stay after, also when its history is lost and lists are refused at first."""
    async with house(kind, tmp_path, monkeypatch) as here:
        registry = here.served.sidecar.registry
        for seed in range(3):
            await here.home.declare(f"a{seed}", here.write(f"a{seed}", seed), removal={"graceSeconds": 0})
            await here.reaches(f"a{seed}", "Ready")
        await here.home.fake.stop()
        await here.answers("a0")
        here.home.fake.objects.delete(("lora-sidecar.io", "ml", LORAS), "a2")
        here.home.fake.objects.forget()
        for plural in (LORAS, "configmaps"):
            here.home.fake.faults += [Fault("list", plural, status=403, times=2), Fault("list", plural, cut=True)]
        await here.home.fake.start()
        await until(lambda: registry.get("a2") is None)
        assert [record.name for record in registry.all()] == ["a0", "a1"]
        await here.answers("a1")


@needs_faults
async def test_a_definition_that_is_missing_takes_nothing_out(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the CRD the list is refused (404): that is told, and no empty list."""
    async with house(kind, tmp_path, monkeypatch) as here:
        await here.home.declare("sql", here.write("sql", 1), removal={"graceSeconds": 0})
        await here.reaches("sql", "Ready")
        faults = here.home.fake.faults
        faults += [Fault("watch", LORAS, status=404, times=3), Fault("list", LORAS, status=404, times=2)]
        here.home.fake.cut()
        await until(lambda: not faults and here.home.fake.watching(LORAS))
        assert here.served.sidecar.registry.get("sql") is not None
        assert "definition (CRD) is not installed" in caplog.text


@needs_faults
async def test_a_status_that_somebody_else_writes_is_no_obstacle(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conflict (409) is read again and written; a server that is busy (429) or down (500) is asked again."""
    async with house(kind, tmp_path, monkeypatch) as here:
        here.home.fake.faults += [Fault("patch", LORAS, status=409, times=2), Fault("patch", LORAS, status=500)]
        here.home.fake.faults += [Fault("create", "events", status=429, retry_after="0")]
        await here.home.declare("sql", here.write("sql", 1))
        await here.reaches("sql", "Ready")
        assert not here.home.fake.faults or here.home.fake.faults[0].verb == "create"
        await here.home.tells("Registered")


@needs_faults
async def test_nothing_is_written_when_nothing_has_changed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A status that says what is so is left alone, also by the next process; so are the registry and the events."""
    async with house(kind, tmp_path, monkeypatch, data_directory=str(tmp_path / "data")) as here:
        await here.home.declare("sql", here.write("sql", 1))
        await here.reaches("sql", "Ready", ready=1)
        patches, version = here.home.fake.count("patch"), here.served.sidecar.registry.last_change
        passes = here.served.sidecar._declared._reconciler  # type: ignore[union-attr]
        for _ in range(5):
            passes.take(passes._cluster)
            await asyncio.sleep(0.15)
        assert here.home.fake.count("patch") == patches
        assert here.served.sidecar.registry.last_change == version
        await here.home.tells("Registered")


@needs_faults
async def test_names_are_there_when_serving_begins(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that keeps nothing on disk has them before it is ready: clients are not refused after a restart.

    What cannot be had, and a server that is away, delay it for a moment only.
    """
    write_adapter(tmp_path / "loras" / "sql", seed=1)
    async with cluster(kind) as home, running_engine(**DUMMY) as engine:
        monkeypatch.setenv("KUBECONFIG", str(await home.kubeconfig(tmp_path)))
        await home.declare("sql", tmp_path / "loras" / "sql")
        await home.declare("absent", tmp_path / "loras" / "absent")
        options = {"roots": [tmp_path / "loras"], "kubernetes": {"adapters": BOTH}}
        async with serving([engine], **options) as served:
            assert set(served.state.names) == {"sql"}
        await home.fake.stop()
        monkeypatch.setattr("sidecar.kubernetes.declared.FIRST_LOOK_S", 0.2)
        async with serving([engine], **options) as served:
            assert not served.state.names
        await home.fake.start()


@needs_faults
async def test_a_status_that_is_refused_holds_up_no_other(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when an older CRD does not know a word of it (422): it is told once, the others are written."""
    async with house(kind, tmp_path, monkeypatch) as here:
        here.home.fake.faults.append(Fault("patch", LORAS, status=422, message="phase: Unsupported value"))
        await here.home.declare("a", here.write("a", 1))
        await until(lambda: "Unsupported value" in caplog.text)
        await here.home.declare("b", here.folder / "a")
        await here.reaches("b", "Ready")
        await here.reaches("a", "Ready")  # another standing than the one that was refused


@needs_faults
async def test_it_is_ready_only_when_every_replica_knows(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change that is written down and not known to all yet is not reported: another replica may answer the old."""
    async with house(kind, tmp_path, monkeypatch) as here:
        registry = here.served.sidecar.registry
        put, acknowledged = registry.put, asyncio.Event()

        async def half_done(record: Any, before: Any) -> int:
            await put(record, before)
            raise Refused(Reason.STATE_UNAVAILABLE, "r1 did not read it yet")

        async def wait(number: int) -> None:
            if not acknowledged.is_set():
                raise Refused(Reason.STATE_UNAVAILABLE, "r1 did not read it yet")

        monkeypatch.setattr(registry, "put", half_done)
        monkeypatch.setattr(registry, "acknowledged", wait)
        await here.home.declare("sql", here.write("sql", 1))
        status = await here.reaches("sql", "Failed", version="v1")
        assert "r1 did not read it yet" in message_of(status)
        acknowledged.set()
        await here.reaches("sql", "Ready", version="v1")


@needs_faults
async def test_without_the_right_to_write_all_is_served(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Status and events are refused (403): what is declared is registered all the same, and the log says what lacks."""
    async with house(kind, tmp_path, monkeypatch) as here:
        denied = "patch is forbidden"
        here.home.fake.faults += [Fault("patch", LORAS, status=403, message=denied, times=1000)]
        here.home.fake.faults += [Fault("create", "events", status=403, message="create is forbidden", times=1000)]
        await here.home.declare("sql", here.write("sql", 1))
        await until(lambda: "sql" in here.served.state.names)
        await here.answers("sql")
        await until(lambda: denied in caplog.text and "create is forbidden" in caplog.text)
        assert "give the service account a Role" in caplog.text


async def test_without_a_cluster_it_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration wants one: that is told, with the ways to have one."""
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(Misused, match="runs in no pod"):
        async with running_engine(**DUMMY) as engine, serving([engine], kubernetes={"adapters": BOTH}):
            pass
