"""Adapters that a cluster declares, through a whole sidecar in front of an emulated engine: what it says is served."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from sidecar.kubernetes.declarations import TAKE_OVER
from sidecar.kubernetes.pauses import Pauses
from sidecar.proto import admin_pb2 as pb
from tests.emulated import running_engine
from tests.kubernetes_api import Fault, write_kubeconfig
from tests.kubernetes_cluster import Cluster, cluster, needs_faults, on_clusters
from tests.peft_files import write_adapter
from tests.serving import Serving, serving, until

DUMMY = {"compute": "none", "shape": "tiny"}
LORAS = "loraadapters"
BOTH = {"config_maps": True, "custom_resources": True}


@dataclass
class House:
    """A sidecar that follows a cluster, and a folder of adapters that it may read."""

    home: Cluster
    served: Serving
    folder: Path

    def write(self, name: str, seed: int) -> Path:
        return write_adapter(self.folder / name, seed=seed)

    async def status(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = (await self.home.get(LORAS, name)).get("status") or {}
        return found

    async def reaches(self, name: str, phase: str, **fields: Any) -> dict[str, Any]:
        """Wait until a LoraAdapter's status says so."""
        async with asyncio.timeout(60):
            while True:
                status = await self.status(name)
                if status.get("phase") == phase and all(status.get(key) == value for key, value in fields.items()):
                    return status
                await asyncio.sleep(0.02)

    async def refused(self, call: Any) -> str:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        return str(caught.value.details())

    async def answers(self, name: str) -> str:
        """Ask by name; return the digest that the answer is of, having checked that its tokens are that version's."""
        answer = await self.served.ask(name, 3)
        (origin,) = answer.origins
        assert answer.tokens == self.served.expected(name, 3)
        return str(origin.digest)


@asynccontextmanager
async def house(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapters: Any = BOTH, **record: Any
) -> AsyncIterator[House]:
    """Serve from a cluster; `record` is configuration."""
    folder = tmp_path / "loras"
    folder.mkdir()
    for part in ("reconciler.LOOK_S", "prefetching.LOOK_S", "reporting.COUNTS_EVERY_S"):
        monkeypatch.setattr(f"sidecar.kubernetes.{part}", 0.2)
    monkeypatch.setattr("sidecar.kubernetes.mirror.Pauses", partial(Pauses, 0.02, 0.2))
    async with cluster(kind) as home, running_engine(**DUMMY) as engine:
        if home.server is not None:
            monkeypatch.setenv("KUBECONFIG", str(write_kubeconfig(tmp_path / "kubeconfig", home.server.address)))
        wanted = {"namespace": home.namespace, "adapters": adapters}
        async with serving([engine], roots=[folder], kubernetes=wanted, **record) as served:
            yield House(home, served, folder)


def condition(status: dict[str, Any], kind: str) -> dict[str, Any]:
    (found,) = [each for each in status["conditions"] if each["type"] == kind]
    return found


def message_of(status: dict[str, Any]) -> str:
    return str(status["message"])


@on_clusters
async def test_what_is_declared_answers_by_name(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A LoraAdapter by its own name or the one it gives, and a ConfigMap's entries: registered, and reported."""
    async with house(kind, tmp_path, monkeypatch) as here:
        await here.home.declare("sql", here.write("sql", 1))
        await here.home.declare("french", here.write("french", 2), name="team/french", tenants=["acme"], pinned=True)
        source = str(here.write("chef", 3))
        await here.home.declare_in_map("more", [{"name": "chef", "source": source, "pinned": True, "rev": 3}])
        status = await here.reaches("sql", "Ready", desired=1, ready=1)
        digest = await here.answers("sql")
        assert (status["version"], status["digest"], status["observedGeneration"]) == ("v1", digest, 1)
        assert (condition(status, "Ready")["status"], condition(status, "Held")["status"]) == ("True", "False")
        await here.reaches("french", "Ready")
        await until(lambda: "chef" in here.served.state.names)
        await here.answers("chef")
        record = here.served.sidecar.registry.get("team/french")
        assert (record.allow, record.pinned) == (("acme",), True)
        assert record.managed_by == f"k8s:{here.home.namespace}/LoraAdapter/french"
        await here.refused(here.served.ask("team/french", 1))  # the tests' client is of no tenant
        await until(
            lambda: here.served.state.names["sql"].digest in here.served.state.backends["trt-0"].shadow.host.held
        )
        await here.reaches("sql", "Ready", residentOn=["trt-0"])
        await here.home.tells(*["Registered"] * 3)


@on_clusters
async def test_a_changed_source_is_a_new_version(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is asked all the time: no answer is of the old weights once the status says Ready for the new ones."""
    async with house(kind, tmp_path, monkeypatch) as here:
        await here.home.declare("sql", here.write("v0", 0))
        await here.reaches("sql", "Ready")
        digests = [await here.answers("sql")]
        asking = True
        seen: list[tuple[int, str]] = []

        async def ask() -> None:
            while asking:
                begun = len(digests)
                answer = await here.served.ask("sql", 2)
                seen.append((begun, str(answer.origins[0].digest)))

        askers = [asyncio.create_task(ask()) for _ in range(4)]
        for number in range(1, 6):
            path = here.write(f"v{number}", number)
            await here.home.patch(LORAS, "sql", {"spec": {"source": str(path)}})
            status = await here.reaches("sql", "Ready", observedGeneration=number + 1)
            digests.append(status["digest"])
            assert status["version"] == f"v{number + 1}"
            assert await here.answers("sql") == status["digest"]
        asking = False
        await asyncio.gather(*askers)
        assert len(set(digests)) == 6
        assert all(digests.index(digest) >= begun - 1 for begun, digest in seen)


@on_clusters
async def test_a_new_rev_reads_the_source_again(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New content behind an unchanged source is found when `rev` changes; a rev that brings nothing is no version."""
    async with house(kind, tmp_path, monkeypatch) as here:
        path = here.write("sql", 1)
        await here.home.declare("sql", path, rev="1")
        first = (await here.reaches("sql", "Ready"))["digest"]
        await here.home.patch(LORAS, "sql", {"spec": {"rev": "2"}})
        assert (await here.reaches("sql", "Ready", observedGeneration=2))["version"] == "v1"
        here.write("sql", 2)
        await here.home.patch(LORAS, "sql", {"spec": {"rev": "3"}})
        status = await here.reaches("sql", "Ready", observedGeneration=3, version="v2")
        assert status["digest"] != first
        assert await here.answers("sql") == status["digest"]


@on_clusters
async def test_what_is_taken_out_is_refused_after_its_grace(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then it answers; one that is declared again in time stays. Without a grace it goes at once."""
    async with house(kind, tmp_path, monkeypatch) as here:
        registry = here.served.sidecar.registry
        await here.home.declare("gone", here.write("gone", 1), removal={"graceSeconds": 0})
        await here.home.declare("later", here.write("later", 2), removal={"graceSeconds": 2})
        await here.home.declare("back", here.write("back", 3), removal={"graceSeconds": 3600})
        for name in ("gone", "later", "back"):
            await here.reaches(name, "Ready")
            await here.home.delete(LORAS, name)
        await until(lambda: registry.get("gone") is None)
        assert "unknown adapter" in await here.refused(here.served.ask("gone", 1))
        await until(lambda: registry.get("back").declared.gone_at > 0)
        await here.answers("back")
        await here.home.declare("back", here.folder / "back")
        await here.reaches("back", "Ready")
        assert registry.get("back").declared.gone_at == 0
        assert len(registry.get("back").versions) == 1
        await until(lambda: registry.get("later") is None)
        assert "unknown adapter" in await here.refused(here.served.ask("later", 1))


@on_clusters
async def test_a_failure_is_told_and_others_go_on(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that is not there, one that may not be read, another content than is named: Failed, with the reason.

    Each is tried again, and well when its cause has gone; a name that answered already goes on with what it has.
    """
    async with house(kind, tmp_path, monkeypatch) as here:
        monkeypatch.setattr("sidecar.kubernetes.work.LAST_RETRY_S", 1.0)
        await here.home.declare("absent", here.folder / "absent")
        await here.home.declare("outside", "/etc")
        await here.home.declare("sql", here.write("sql", 1))
        digest = (await here.reaches("sql", "Ready"))["digest"]
        await here.home.declare("other", here.folder / "sql", digest="0" * 64)
        assert condition(await here.reaches("absent", "Failed"), "Ready")["reason"] == "OriginUnreadable"
        assert condition(await here.reaches("outside", "Failed"), "Ready")["reason"] == "OriginNotAllowed"
        assert digest in message_of(await here.reaches("other", "Failed"))
        await here.home.patch(LORAS, "sql", {"spec": {"source": str(here.folder / "nothing")}})
        status = await here.reaches("sql", "Failed")
        assert "still answers with v1" in message_of(status)
        assert await here.answers("sql") == digest
        here.write("absent", 4)
        await here.reaches("absent", "Ready")
        await here.home.patch(LORAS, "other", {"spec": {"digest": f"sha256:{digest}"}})
        await here.reaches("other", "Ready", digest=digest)
        unreadable = ["OriginUnreadable"] * 2
        await here.home.tells(*["Registered"] * 3, *unreadable, "OriginNotAllowed", "AdapterMismatch")


@on_clusters
async def test_a_name_of_somebody_elses_is_left_alone(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The condition says whose it is and how to get it: by unregistering it, or by the annotation."""
    async with house(kind, tmp_path, monkeypatch) as here:
        mine = here.write("mine", 1)
        registered = await here.served.adapters.Register(pb.RegisterRequest(name="sql", path=str(mine)))
        await here.home.declare("sql", here.write("theirs", 2))
        status = await here.reaches("sql", "Failed")
        assert condition(status, "Accepted")["reason"] == "NameTaken"
        assert "sidecar adapters unregister sql" in message_of(status)
        assert await here.answers("sql") == registered.adapter.digest
        await here.home.patch(LORAS, "sql", {"metadata": {"annotations": {TAKE_OVER: "true"}}})
        status = await here.reaches("sql", "Ready", version="v2")
        assert await here.answers("sql") == status["digest"]
        assert here.served.sidecar.registry.get("sql").managed_by.endswith("/LoraAdapter/sql")


@on_clusters
async def test_of_two_declarations_the_older_has_the_name(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The younger one's condition names the other; when that is taken out the younger has it, without a gap."""
    async with house(kind, tmp_path, monkeypatch) as here:
        await here.home.declare_in_map("older", [{"name": "sql", "source": str(here.write("one", 1))}])
        await asyncio.sleep(1.1 if kind == "real" else 0)  # a real cluster's creation times are whole seconds
        await here.home.declare("younger", here.write("two", 2), name="sql")
        status = await here.reaches("younger", "Failed")
        assert condition(status, "Accepted")["reason"] == "DeclaredTwice"
        assert "ConfigMap older" in message_of(status)
        await until(lambda: "sql" in here.served.state.names)
        first = await here.answers("sql")
        await here.home.delete("configmaps", "older")
        status = await here.reaches("younger", "Ready")
        assert await here.answers("sql") == status["digest"] != first
        assert here.served.sidecar.registry.get("sql").managed_by.endswith("/LoraAdapter/younger")


@on_clusters
async def test_a_map_that_cannot_be_read_takes_nothing_out(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad YAML, an entry without a name, one with a wrong key: what the map declared before stays, and it is told."""
    async with house(kind, tmp_path, monkeypatch) as here:
        registry = here.served.sidecar.registry
        entries = [
            {"name": name, "source": str(here.write(name, seed)), "removalGraceSeconds": 0}
            for seed, name in enumerate(("a", "b"))
        ]
        await here.home.declare_in_map("loras", entries)
        await until(lambda: {"a", "b"} <= set(here.served.state.names))
        for text in (
            "- name: [",
            "- source: /somewhere",
            "{}",
            f"[{{name: a, source: {here.folder / 'a'}, sauce: 1}}]",
        ):
            told = len(await here.home.reasons())
            await here.home.patch("configmaps", "loras", {"data": {"adapters.yaml": text}})
            async with asyncio.timeout(60):
                while len(await here.home.reasons()) == told:
                    await asyncio.sleep(0.02)
            if "sauce" not in text:
                assert registry.get("b") is not None
        await here.answers("a")
        await until(lambda: registry.get("b") is None)
        assert any("sauce" in event["note"] for event in await here.home.list("events"))
        await here.home.patch("configmaps", "loras", {"data": {"adapters.yaml": "[]"}})
        await until(lambda: registry.get("a") is None)


@on_clusters
async def test_rolled_back_by_hand_with_a_hold(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused without one; with it the version before stays for so long and is shown as Held, then it is as declared.

    What is declared meanwhile waits for that, too.
    """
    async with house(kind, tmp_path, monkeypatch) as here:
        for seed in (1, 2):
            path = here.write(f"v{seed}", seed)
            if seed == 1:
                await here.home.declare("sql", path)
            else:
                await here.home.patch(LORAS, "sql", {"spec": {"source": str(path)}})
            await here.reaches("sql", "Ready", version=f"v{seed}")
        adapters = here.served.adapters
        for call in (
            adapters.Rollback(pb.RollbackRequest(name="sql")),
            adapters.Promote(pb.PromoteRequest(name="sql", version="v1")),
            adapters.Register(pb.RegisterRequest(name="sql", path=str(here.folder / "v1"))),
        ):
            assert "--hold" in await here.refused(call)
        assert "delete it there" in await here.refused(adapters.Unregister(pb.UnregisterRequest(name="sql", hold_s=60)))
        assert "set pinned there" in await here.refused(adapters.Pin(pb.AdapterRequest(name="sql")))
        held = await adapters.Rollback(pb.RollbackRequest(name="sql", hold_s=3600))
        assert (held.version, held.managed_by) == ("sql@v1", f"k8s:{here.home.namespace}/LoraAdapter/sql")
        status = await here.reaches("sql", "Held", version="v1")
        assert condition(status, "Held")["status"] == "True"
        assert await here.answers("sql") == status["digest"]
        _, text = await here.served.sidecar.metrics.render()
        assert b"lora_sidecar_declared_held 1.0" in text
        assert b'lora_sidecar_declared_adapters{phase="Held"} 1.0' in text
        here.write("v3", 3)
        await here.home.patch(LORAS, "sql", {"spec": {"source": str(here.folder / "v3")}})
        await here.reaches("sql", "Held", observedGeneration=3, version="v1")
        await adapters.Promote(pb.PromoteRequest(name="sql", version="v1", hold_s=1))
        status = await here.reaches("sql", "Ready", version="v3")
        assert await here.answers("sql") == status["digest"]
        assert condition(status, "Held")["status"] == "False"
        await here.home.tells("Registered", "Registered", "Held", "Registered")


@on_clusters
async def test_a_hold_that_ends_needs_no_source(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The declared version is still there: it is promoted again though its files have gone."""
    async with house(kind, tmp_path, monkeypatch) as here:
        await here.home.declare("sql", here.write("v1", 1))
        await here.reaches("sql", "Ready")
        other = here.write("by-hand", 2)
        await here.answers("sql")
        (here.folder / "v1" / "adapter_model.safetensors").unlink()
        request = pb.RegisterRequest(name="sql", path=str(other), hold_s=2)
        assert (await here.served.adapters.Register(request)).version == "v2"
        await here.reaches("sql", "Held", version="v2")
        status = await here.reaches("sql", "Ready", version="v1")
        assert await here.answers("sql") == status["digest"]


@on_clusters
async def test_it_is_loaded_ahead_where_it_is_wanted(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `prefetch` it is Ready only when it is resident, and nobody had to ask for it."""
    async with house(kind, tmp_path, monkeypatch) as here:
        await here.home.declare("sql", here.write("sql", 1), prefetch={"backends": ["trt-*"]})
        status = await here.reaches("sql", "Ready")
        assert status["residentOn"] == ["trt-0"]
        answer = await here.served.ask("sql", 1)
        assert answer.origins[0].cache == "resident"


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
        monkeypatch.setenv("KUBECONFIG", str(write_kubeconfig(tmp_path / "kubeconfig", home.fake.address)))
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


async def command(served: Serving, *arguments: str) -> tuple[int, str, str]:
    """Run `sidecar adapters …` against the served sidecar."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sidecar", "adapters", *arguments, stdout=PIPE, stderr=PIPE,
        env=os.environ | {"LORA_SIDECAR_ADMIN": served.sidecar.admin_address},
    )  # fmt: skip
    out, error = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), error.decode()


@on_clusters
async def test_the_command_line_says_who_has_the_say(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who manages a name, that it is held and for how long; a hold without a time is an hour."""
    async with house(kind, tmp_path, monkeypatch) as here:
        await here.home.declare("sql", here.write("v1", 1))
        await here.reaches("sql", "Ready")
        await here.home.patch(LORAS, "sql", {"spec": {"source": str(here.write("v2", 2))}})
        await here.reaches("sql", "Ready", version="v2")
        code, _, error = await command(here.served, "rollback", "sql")
        assert code == 1
        assert "managed by the LoraAdapter sql in Kubernetes' namespace" in error
        assert "--hold" in error
        code, out, _ = await command(here.served, "rollback", "sql", "--hold")
        assert (code, out) == (0, "sql stands for v1\n")
        code, out, _ = await command(here.served, "show", "sql")
        assert "the LoraAdapter sql in Kubernetes' namespace" in out
        assert re.search(r"held for (59|60) min", out)
        code, out, _ = await command(here.served, "list")
        assert "held for" in out


async def test_without_a_cluster_it_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration wants one: that is told, with the ways to have one."""
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(Exception, match="runs in no pod"):
        async with running_engine(**DUMMY) as engine, serving([engine], kubernetes={"adapters": BOTH}):
            pass
