"""Adapters that a cluster declares, through a whole sidecar in front of an emulated engine: what it says is served."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from sidecar.kubernetes.declarations import RETRY, TAKE_OVER
from sidecar.proto import admin_pb2 as pb
from tests.kit.faulty_http import faulty_server
from tests.kit.kubernetes_cluster import on_clusters
from tests.kit.kubernetes_house import LORAS, condition, house, message_of
from tests.kit.peft_files import write_adapter
from tests.kit.serving import until


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
async def test_what_is_being_deleted_is_declared_no_more(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its object stays for as long as somebody's finalizer holds it."""
    async with house(kind, tmp_path, monkeypatch) as here:
        await here.home.declare("sql", here.write("sql", 1), removal={"graceSeconds": 0})
        await here.home.patch(LORAS, "sql", {"metadata": {"finalizers": ["example.org/hold"]}})
        await here.reaches("sql", "Ready")
        await here.home.delete(LORAS, "sql")
        await until(lambda: here.served.sidecar.registry.get("sql") is None)
        assert (await here.home.get(LORAS, "sql"))["metadata"]["deletionTimestamp"]
        await here.home.tells("Registered", "Removed")
        await here.home.patch(LORAS, "sql", {"metadata": {"finalizers": None}})
        assert await here.home.list(LORAS) == []


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
async def test_a_folder_that_comes_is_read_at_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the pause is: one that was not there, one that is written file by file, and one that is mended."""
    with monkeypatch.context() as patched:
        for pause in ("FIRST_RETRY_S", "LAST_RETRY_S"):
            patched.setattr(f"sidecar.kubernetes.work.{pause}", 3600.0)
        async with house(kind, tmp_path, monkeypatch) as here:
            await here.home.declare("late", here.folder / "late")
            await here.home.declare_in_map("more", [{"name": "later", "source": str(here.folder / "later")}])
            await here.home.declare("parts", here.folder / "parts")
            await here.home.declare("broken", here.write("broken", 3))
            digest = (await here.reaches("broken", "Ready"))["digest"]
            weights = here.folder / "broken" / "adapter_model.safetensors"
            whole = weights.read_bytes()
            weights.write_bytes(whole[:-8])
            await here.home.patch(LORAS, "broken", {"spec": {"rev": "2"}})
            for name in ("late", "parts", "broken"):
                await here.reaches(name, "Failed")
            for name, seed in (("late", 1), ("later", 2)):
                here.write(name, seed)
                await until(lambda name=name: name in here.served.state.names)  # type: ignore[misc]
                await here.answers(name)
            source = here.write("elsewhere", 4)
            (here.folder / "parts").mkdir()
            for file in sorted(source.iterdir()):
                (here.folder / "parts" / file.name).write_bytes(file.read_bytes())
            await here.reaches("parts", "Ready")
            weights.write_bytes(whole)
            await here.reaches("broken", "Ready", digest=digest, observedGeneration=2)


@on_clusters
async def test_an_annotation_hurries_what_failed(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a LoraAdapter and of a ConfigMap; each other value once, and what is served is left alone."""
    adapter = write_adapter(tmp_path / "origin", seed=1)
    with faulty_server() as server, monkeypatch.context() as patched:
        for pause in ("FIRST_RETRY_S", "LAST_RETRY_S"):
            patched.setattr(f"sidecar.kubernetes.work.{pause}", 3600.0)
        origins = {"allow": [server.url("")], "attempts_max": 1}
        record = {"data_directory": str(tmp_path / "data"), "origins": origins}
        async with house(kind, tmp_path, monkeypatch, **record) as here:
            await here.home.declare("sql", server.url("sql"))
            await here.home.declare_in_map("more", [{"name": "more", "source": server.url("more")}])
            await here.reaches("sql", "Failed")
            await here.home.tells("OriginUnreadable", "OriginUnreadable")
            asked = len(server.asked)
            await here.home.patch(LORAS, "sql", {"metadata": {"annotations": {RETRY: "1"}}})
            await until(lambda: len(server.asked) > asked)
            for name in ("sql", "more"):
                server.serve(name, adapter)
            await here.home.patch(LORAS, "sql", {"metadata": {"annotations": {RETRY: "2"}}})
            await here.reaches("sql", "Ready")
            assert "more" not in here.served.state.names
            await here.home.patch("configmaps", "more", {"metadata": {"annotations": {RETRY: "1"}}})
            await until(lambda: "more" in here.served.state.names)
            asked = len(server.asked)
            await here.home.patch(LORAS, "sql", {"metadata": {"annotations": {RETRY: "3"}}})
            await here.home.declare("next", server.url("sql"))
            await here.reaches("next", "Ready")
            assert [each.path for each in server.asked[asked:] if each.path.startswith("/more")] == []
            assert here.served.sidecar.registry.get("sql").current == 1


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
