"""A configuration that is changed while requests run: nothing fails for it, and then it is as if started so."""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random
from typing import Any

import grpc
import httpx
import pytest

from sidecar.backends.registry import full_record
from sidecar.config import parse
from sidecar.config.reloading import is_reloadable
from sidecar.core.config import FIXED
from sidecar.core.effects import Settle
from sidecar.core.enums import Outcome
from sidecar.core.events import ConfigChanged
from sidecar.journal import replay
from sidecar.proto import admin_pb2, admin_pb2_grpc
from sidecar.serve import reloading
from sidecar.serve.app import Sidecar
from tests.kit.cases import first
from tests.kit.cli_runs import Ended, runner
from tests.kit.emulated import running_engine
from tests.kit.found_engines import loaded, pool_of, up
from tests.kit.found_engines import served as in_front_of
from tests.kit.openai_house import JSON
from tests.kit.peft_files import BASE_MODEL
from tests.kit.redis_servers import running
from tests.kit.replica_pool import owned, replicas
from tests.kit.serving import Serving, serving, until, write_adapters

CHANGES = (12, 1000)
ENGINE = {"compute": "none", "shape": "tiny", "lora_host_pages": 4, "lora_device_pages": 2}


def write(file: Path, record: dict[str, Any] | str) -> None:
    """Write a configuration whole, as an editor or Kubernetes does: at no moment there is half of it."""
    beside = file.with_suffix(".new")
    beside.write_text(record if isinstance(record, str) else json.dumps(record))
    beside.replace(file)


async def reload(served: Serving) -> list[str]:
    return list((await served.configuration.Reload(admin_pb2.ReloadRequest())).changed)


async def effective(served: Serving) -> Any:
    return json.loads((await served.configuration.Get(admin_pb2.GetConfigurationRequest())).json)


async def refused(served: Serving, file: Path, record: Any) -> str:
    """Reload what must be refused, and return the words; nothing may change for it."""
    before = await effective(served), served.state.config, list(served.sidecar.gateway.backends.items())
    write(file, record)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await reload(served)
    assert (await effective(served), served.state.config, list(served.sidecar.gateway.backends.items())) == before
    assert not any(backend.leaving for backend in served.state.backends.values())
    return str(error.value.details())


def changed(record: dict[str, Any], random: Random, addresses: list[str]) -> dict[str, Any]:
    """Return a configuration with one more valid change."""
    record = json.loads(json.dumps(record))
    queue, backends = record.setdefault("queue", {}), record["backends"]
    free = [f"triton://{each}" for each in addresses if f"triton://{each}" not in {one["url"] for one in backends}]
    kind = random.randrange(9)
    if kind == 0:
        queue["tenant_weights"] = {
            tenant: random.choice([0.5, 1.0, 4.0]) for tenant in random.sample(["", "t", "u"], 2)
        }
    elif kind == 1:
        queue["classes"] = {
            "default": {"queue_wait_s_max": random.randint(300, 900), "patience_s": random.randint(0, 30)},
            **({"batch": {"max_tokens": random.randint(1, 99)}} if random.random() < 0.5 else {}),
        }
    elif kind == 2:
        queue["queued_max"], queue["inbox_max"] = random.randint(1_000, 9_000), random.randint(1_000, 9_000)
        queue["answer_bytes_max"], queue["answers_bytes_max"] = random.randint(1 << 19, 1 << 20), 1 << 27
        queue["tenant_max_tokens"] = {"t": random.randint(100, 200)}
        queue["joining_s_max"] = random.choice([0.0, 0.1])
        record["store"] = {"prefetch_bytes_per_s": random.choice([0, 1 << 20])}
    elif kind == 3:
        record["access"] = {"limits": [{"tenant": "t", "requests_per_minute": random.randint(10**6, 10**7)}]}
    elif kind == 4:
        record["adapters"]["allow"] = {"a00": random.choice([["", "t"], ["", "t", "u"]])}
    elif kind == 5 and free:
        identity = next(f"e{number}" for number in range(9) if f"e{number}" not in {one["id"] for one in backends})
        backends.append({"id": identity, "url": random.choice(free)})
    elif kind == 6 and len(backends) > 1:
        del backends[random.randrange(len(backends))]
    elif kind == 7 and free:
        random.choice(backends)["url"] = random.choice(free)
    else:
        random.choice(backends)["progress_timeout_s"] = random.randint(20, 40)
    return record


def parts_of(sidecar: Sidecar) -> dict[str, Any]:
    """Return what parts of a process have taken of its configuration, beside the core."""
    gateway, front = sidecar.gateway, sidecar.listening._openai
    assert front is not None
    return {
        "inbox": gateway.driver.inbox_max,
        "answers": (gateway.answers.each_bytes, gateway.answers.all_bytes),
        "allowed": gateway.sources.allow,
        "bases": gateway.catalogue.bases,
        "folders": gateway.store.folders,
        "limits": sidecar.access.limits.in_force(),
        "lengths": front._queue,
        "templates": front._destinations._templates,
    }


@pytest.mark.parametrize("count", first(1, CHANGES))
async def test_random_changes_under_load(tmp_path: Path, count: int) -> None:
    """No request fails for them; then the configuration, the core's part and the backends are those of a process that
    was started with the file; and the journal replays through them.
    """
    random = Random(count)
    write_adapters(tmp_path / "adapters", 6)
    file, data = tmp_path / "config.json", tmp_path / "data"
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(running_engine(**ENGINE)) for _ in range(5)]
        addresses = [engine.grpc_address for engine in engines]
        backends = [{"id": f"e{number}", "url": f"triton://{addresses[number]}"} for number in range(2)]
        journal = {"segment_bytes": 1 << 20, "segments_max": 64}
        options = {"file": file, "backends": backends, "data_directory": str(data), "journal": journal}
        served = await stack.enter_async_context(serving([], tmp_path / "adapters", **options))
        record = json.loads(file.read_text())
        async with loaded(served, tenants=("", "t")) as load:
            for _ in range(count):
                record = changed(record, random, addresses)
                write(file, record)
                await reload(served)
                await load.more(1)
        assert {end.outcome for end in served.recorder.of(Settle)} == {Outcome.OK}
        wanted = {one["id"]: one["url"].partition("://")[2] for one in record["backends"]}
        fleet = served.sidecar.gateway.backends
        await until(lambda: {identity: one.address for identity, one in fleet.items()} == wanted)
        await until(lambda: all(backend.takes_requests for backend in served.state.backends.values()))
        other = parse(record | {"data_directory": str(tmp_path / "other")}, "the file")
        fresh = await Sidecar.start(other)
        try:
            assert await effective(served) == full_record(other) | {"data_directory": str(data)}
            assert served.state.config == fresh.gateway.state.config
            assert served.state.names.keys() == fresh.gateway.state.names.keys()
            allowed = {name: known.allow for name, known in served.state.names.items()}
            assert allowed == {name: known.allow for name, known in fresh.gateway.state.names.items()}
            assert parts_of(served.sidecar) == parts_of(fresh)
        finally:
            await fresh.stop()
    assert sum(isinstance(event, ConfigChanged) for event in served.recorder.events) > count / 4
    summary = replay.Summary()
    assert all(step.same for step in replay.replay(data, summary))
    assert summary.steps > count


# What is refused.


async def test_a_faulty_file_changes_nothing(tmp_path: Path) -> None:
    """Whatever is wrong is found before anything is touched, also beside what could be taken."""
    names, file = write_adapters(tmp_path / "adapters", 2), tmp_path / "config.json"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    async with running_engine(**ENGINE) as engine, serving([engine], tmp_path / "adapters", file=file) as served:
        good = json.loads(file.read_text())
        more = {"id": "more", "url": "triton://127.0.0.1:9"}
        for wrong, words in (
            ("backends: [", "cannot be read as YAML"),
            ({"queue": {"queued_max": 0, "tenant_weights": {"t": 2.0}}}, "queue.queued_max"),
            ({"backends": [*good["backends"], more, {"url": "triton://127.0.0.1:9"}]}, "are one engine"),
            ({"backends": [more | {"engine": {"config": "/nowhere.json"}}]}, "nowhere.json"),
            ({"adapters": {"serve": "/nowhere"}, "queue": {"tenant_weights": {"t": 2.0}}}, "/nowhere is not a folder"),
            ({"backends": [more | {"tls": {"ca": "/nowhere.pem"}}]}, "nowhere.pem"),
            ({"backends": [more | {"engine": {"cost": str(pipe)}}]}, "it is no file"),
            ({"backends": [], "queue": {"classes": {"default": {"queue_wait_s_max": 1e300}}}}, "smaller number"),
            ({"queue": {"tenant_weights": {"t": 1e303}}}, "queue.tenant_weights"),
            ("", "is empty"),
            (
                {"backends": [], "queue": {"tenant_weights": {"t": 2.0}}},
                "no backends, which would take all engines out",
            ),
        ):
            told = await refused(served, file, wrong if isinstance(wrong, str) else good | wrong)
            assert words in told
        assert "lora_sidecar_config_last_reload_successful 0.0" in await metrics(served)
        assert (await served.ask(names[0])).tokens == served.expected(names[0], 4)
        write(file, good | {"queue": {"tenant_weights": {"t": 2.0}}})
        assert await reload(served) == ["queue.tenant_weights.t"]
        assert "lora_sidecar_config_last_reload_successful 1.0" in await metrics(served)


async def metrics(served: Serving) -> str:
    return (await served.sidecar.metrics.render())[1].decode()


async def test_what_needs_a_restart_is_named_key_by_key(tmp_path: Path) -> None:
    """Beside changes that a running process takes, which it does not take then."""
    file = tmp_path / "config.json"
    over_grpc = {"weights_transport": "grpc"}
    async with running_engine(**ENGINE) as engine, serving([engine], file=file, backend=over_grpc) as served:
        good = json.loads(file.read_text())
        [backend] = good["backends"]
        assert backend["weights_transport"] == "grpc"
        away = {"id": "away", "kind": "triton", "discover": {"dns": "localhost:1"}}
        other_kind = {"id": "trt-0", "url": "vllm://127.0.0.1:9"}
        told = await refused(
            served,
            file,
            good
            | {
                "listeners": good["listeners"] | {"data": {"address": "127.0.0.1:0", "connections_max": 7}},
                "data_directory": str(tmp_path / "data"),
                "replicas": {"weight": 2.0},
                "store": {"memory_bytes": 1 << 30, "prefetch_bytes_per_s": 1},
                "queue": {"ordering": "fifo", "queued_max": 7},
                "backends": [other_kind, away],
                "watch_config": True,
            },
        )
        keys = (
            "listeners.data.connections_max, queue.ordering, store.memory_bytes, replicas.weight, data_directory, "
            "watch_config, backends.trt-0.kind"
        )
        assert sorted(told.partition(" needs")[0].removeprefix("a change of ").split(", ")) == sorted(keys.split(", "))
        assert "restart" in told
        assert "nothing was changed" in told
        shared = good | {"backends": [backend | {"weights_transport": "shared_memory", "url": "triton://127.0.0.1:9"}]}
        assert "backends.trt-0.weights_transport" in await refused(served, file, shared)
        write(file, good | {"backends": [backend, away]})
        assert await reload(served) == ["backends.away (added)"]
        await until(lambda: len(served.state.backends) == 2)  # its engine comes by itself, as soon as it is found
        narrow = away | {"discover": {"dns": "localhost:2"}}
        assert "backends.away.discover.dns" in await refused(served, file, good | {"backends": [backend, narrow]})
        write(file, good)
        assert await reload(served) == ["backends.away (removed)"]
        assert served.state.config.pools == {}


def test_the_core_is_told_of_nothing_that_it_cannot_take() -> None:
    """What the core takes for fixed, the configuration takes for fixed."""
    sections = {"store_bytes": "store.memory_bytes", "raise_on": "raise_on"}
    for name in FIXED:
        key = sections.get(name) or next(
            f"{section}.{name}" for section in ("store", "queue") if name in parse({}, "the test").model_dump()[section]
        )
        assert not is_reloadable(key), key
    assert not is_reloadable("data_directory")


async def test_a_process_without_a_file_says_so() -> None:
    async with serving([]) as served:
        with pytest.raises(grpc.aio.AioRpcError, match="--config FILE"):
            await reload(served)


# What is taken.


async def test_the_file_is_read_when_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Kubernetes changes a mounted ConfigMap: `..data` becomes a link to another folder. A fault is read once, and
    what comes after it is read.
    """
    monkeypatch.setattr(reloading, "WATCH_S", 0.01)
    mount = tmp_path / "etc"
    mount.mkdir()

    def swap(number: int, text: str) -> None:
        folder = mount / f"..{number}"
        folder.mkdir()
        (folder / "config.yaml").write_text(text)
        (mount / "..new").symlink_to(folder.name)
        (mount / "..new").replace(mount / "..data")

    swap(0, "")
    (mount / "config.yaml").symlink_to("..data/config.yaml")
    data = tmp_path / "data"
    record = {"watch_config": True, "data_directory": str(data)}
    async with serving([], file=mount / "config.yaml", **record) as served:
        reloads = served.sidecar.reloads
        started = json.loads((mount / "config.yaml").read_text())
        swap(1, json.dumps(started | {"queue": {"tenant_weights": {"t": 3.0}}}))
        await until(lambda: served.state.config.tenant_weights == {"t": 3.0})
        swap(2, "queue: {queued_max: none}")
        await until(lambda: not reloads.figures.successful)
        read_at = reloads.figures.read_at
        swap(3, json.dumps(started | {"queue": {"queued_max": 77}}))
        await until(lambda: served.state.config.queued_max == 77)
        assert reloads.figures.successful
        assert reloads.figures.read_at > read_at
        await until(lambda: len(audited(data)) == 3)
    lines = audited(data)
    assert [line["after"].get("changed") for line in lines] == [
        ["queue.tenant_weights.t"], None, ["queue.queued_max", "queue.tenant_weights.t"],
    ]  # fmt: skip
    assert "queue.queued_max" in json.dumps(lines[1])


async def test_a_file_that_is_being_written_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first half of a configuration is one, too. It is taken once it is the same at two looks, and never empty."""
    looks = 0
    ours = reloading._digest

    def written(file: Path) -> bytes:
        nonlocal looks
        looks += 1
        with file.open("a") as more:
            more.write(f"# {looks}\n")  # it has grown at each look
        return ours(file)

    monkeypatch.setattr(reloading, "WATCH_S", 0.01)
    file = tmp_path / "config.yaml"
    async with serving([], file=file, watch_config=True) as served:
        reloads, before = served.sidecar.reloads, served.state.config
        started = file.read_text()
        with monkeypatch.context() as growing:
            growing.setattr(reloading, "_digest", written)
            await until(lambda: looks > 20)
            assert served.state.config == before
        file.write_text("")
        await until(lambda: not reloads.figures.successful)
        assert served.state.config == before
        file.write_text(started)
        await until(lambda: reloads.figures.successful)


async def test_a_refused_reload_is_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One line, with the key, whoever asks for it."""
    file = tmp_path / "config.json"
    async with serving([], file=file) as served:
        record = json.loads(file.read_text())
        await refused(served, file, record | {"client_stall_s": 7})
        (line,) = [each for each in caplog.records if each.name == "sidecar.serve.reloading"]
        assert (line.levelname, "client_stall_s" in line.getMessage()) == ("ERROR", True)


def audited(data: Path) -> list[Any]:
    lines = [json.loads(line) for line in (data / "audit" / "audit.jsonl").read_text().splitlines()]
    return [line for line in lines if line["verb"] == "Configuration.Reload"]


async def test_limits_and_classes_are_those_of_the_file(tmp_path: Path) -> None:
    """Of access, too: a limit counts at once, and a key may be for a class that came later."""
    file = tmp_path / "config.json"
    async with running_engine(**ENGINE) as engine, serving([engine], file=file) as served:
        good = json.loads(file.read_text())
        limits = {"limits": [{"tenant": "t", "requests_per_day": 1}]}
        write(file, good | {"access": limits, "queue": {"classes": {"batch": {}}}})
        assert await reload(served) == ["access.limits", "queue.classes.batch"]
        await served.ask("", tenant="t")
        with pytest.raises(grpc.aio.AioRpcError, match="requests_per_day"):
            await served.ask("", tenant="t")
        await served.ask("", tenant="u", **{"class": "batch"})
        of_batch = admin_pb2.CreateKeyRequest(tenant="u", **{"class": "batch"})
        access: Any = admin_pb2_grpc.AccessStub(served.admin_channel)
        assert getattr((await access.CreateKey(of_batch)).key, "class") == "batch"
        write(file, good)
        await reload(served)
        await served.ask("", tenant="t")
        with pytest.raises(grpc.aio.AioRpcError, match='there is no class "batch"'):
            await access.CreateKey(of_batch)
        with pytest.raises(grpc.aio.AioRpcError, match='unknown class "batch"'):
            await served.ask("", tenant="u", **{"class": "batch"})


async def test_a_served_folder_is_looked_at_again(tmp_path: Path) -> None:
    """What has come into it becomes a name; another folder is served from then on, and names stay."""
    [first_name] = write_adapters(tmp_path / "one", 1)
    file = tmp_path / "config.json"
    async with running_engine(**ENGINE) as engine, serving([engine], tmp_path / "one", file=file) as served:
        _, second = write_adapters(tmp_path / "one", 2)
        assert await reload(served) == []
        assert (await served.ask(second)).tokens == served.expected(second, 4)
        *_, third = write_adapters(tmp_path / "two", 3)
        record = json.loads(file.read_text())
        write(file, record | {"adapters": {"serve": str(tmp_path / "two")}})
        assert await reload(served) == ["adapters.serve"]
        for name in (first_name, second, third):
            assert (await served.ask(name)).tokens == served.expected(name, 4)


# What operators add and remove.


async def test_an_engine_without_a_folder_is_added_and_serves_its_base_model_only(tmp_path: Path) -> None:
    """Who adds a vLLM with the settings of a Triton is told, and which setting adapters need."""
    file = tmp_path / "config.json"
    async with running_engine(**ENGINE) as one, serving([one], file=file) as served:
        add = admin_pb2.AddBackendRequest(backend="v2", url="vllm://127.0.0.1:1", like="trt-0")
        assert "serves its base model only" in (await served.backends.Add(add)).detail
        known = {
            each.id: each.detail for each in (await served.backends.List(admin_pb2.ListBackendsRequest())).backends
        }
        assert "set backends[].adapters_dir" in known["v2"]
        assert "base model only" not in known["trt-0"]


async def test_backends_that_are_added_and_removed(tmp_path: Path) -> None:
    """For the life of the process; the file wins when it is read again."""
    file = tmp_path / "config.json"
    like = {"progress_timeout_s": 44.0, "metrics": "http://127.0.0.1:9/metrics"}
    async with (
        running_engine(**ENGINE) as one,
        running_engine(**ENGINE) as two,
        serving([one], file=file, backend=like) as served,
    ):
        add = admin_pb2.AddBackendRequest(backend="more", url=f"triton://{two.grpc_address}", like="trt-0")
        assert (await served.backends.Add(add)).id == "more"
        for wrong, words in (
            (add, "already"),
            (admin_pb2.AddBackendRequest(backend="again", url=f"triton://{two.grpc_address}"), "are one engine"),
            (
                admin_pb2.AddBackendRequest(backend="again", url=f"triton://localhost:{two.grpc_address[10:]}"),
                "are one engine",
            ),
            (admin_pb2.AddBackendRequest(backend="x", url="http://somewhere"), "must be of the form"),
            (admin_pb2.AddBackendRequest(backend="x", url="triton://h:1", like="nobody"), "there are trt-0, more"),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match=words):
                await served.backends.Add(wrong)
        await until(lambda: served.state.backends["more"].takes_requests)
        old, new = (await effective(served))["backends"]
        assert new == old | {"id": "more", "url": f"triton://{two.grpc_address}", "metrics": None}
        answer = await served.backends.Remove(admin_pb2.BackendRequest(backend="trt-0"))
        assert answer.state in ("leaving", "removed")
        await until(lambda: list(served.state.backends) == ["more"])
        assert (await served.ask("")).origins[0].backend == "more"
        with pytest.raises(grpc.aio.AioRpcError, match="there are more"):
            await served.backends.Remove(admin_pb2.BackendRequest(backend="trt-0"))
        assert await reload(served) == ["backends.more (removed)", "backends.trt-0 (added)"]
        await until(lambda: list(served.state.backends) == ["trt-0"])
        await served.backends.Remove(admin_pb2.BackendRequest(backend="trt-0"))
        await until(lambda: not served.state.backends)
        words = "no engine is configured at the moment; try again later, or ask your operator"
        with pytest.raises(grpc.aio.AioRpcError, match=words):
            await served.ask("")
        async with httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}") as http:
            answer = await http.post("/v1/completions", json={"model": "base", "prompt": "x", "max_tokens": 1})
            ready = await http.get("/readyz")
        assert answer.status_code == 503
        assert words in answer.json()["error"]["message"]
        assert "sidecar backends add" in ready.text  # who looks at the process is an operator


async def test_what_the_command_line_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A faulty file is wrong usage, as it is for `config check`; an engine whose metrics are nowhere is told of."""
    file = tmp_path / "config.json"
    async with serving([], file=file) as served:

        async def cli(*words: str) -> Ended:
            return await asyncio.to_thread(runner(capfd), *words, "--admin", served.sidecar.admin_address)

        added = await cli("backends", "add", "x", "--address", "triton://127.0.0.1:9")
        assert (added.code, "no metrics: " in added.err) == (0, True)
        assert "no metrics" not in (await cli("backends", "add", "y", "--address", "triton://127.0.0.1:8001")).err
        assert "no metrics" not in (await cli("backends", "add", "z", "--address", "vllm://127.0.0.1:9")).err
        write(file, "stor: {}")
        for words in (("config", "reload"), ("config", "check", str(file))):
            ended = await cli(*words) if words[1] == "reload" else await asyncio.to_thread(runner(capfd), *words)
            assert (ended.code, "[CONFIG_INVALID]" in ended.err) == (2, True)


async def test_a_backend_that_comes_back_stays(tmp_path: Path) -> None:
    """It was about to go while it answered; its answer and its id are the same, and it was never removed."""
    file = tmp_path / "config.json"
    options = ENGINE | {"time_scale": 1.0}
    async with running_engine(**options) as engine, serving([engine], file=file) as served:
        record, backend = json.loads(file.read_text()), served.sidecar.gateway.backends["trt-0"]
        answer = asyncio.create_task(served.ask("", 60))
        await until(lambda: bool(served.state.backends["trt-0"].running))
        for _ in range(2):
            write(file, record | {"backends": [{"id": "other", "url": "triton://127.0.0.1:9"}]})
            await reload(served)
            assert served.state.backends["trt-0"].leaving
            write(file, record | {"backends": [record["backends"][0] | {"progress_timeout_s": 33.0}]})
            await reload(served)
            assert served.state.backends["trt-0"].leaving
            write(file, record)
            await reload(served)
            assert not served.state.backends["trt-0"].leaving
        assert len((await answer).tokens) == 60
        assert served.sidecar.gateway.backends["trt-0"] is backend


async def test_pools_that_are_taken_out_and_come_back(tmp_path: Path) -> None:
    """Under load: the engines of one go to others and are back with it; another pool is added beside it."""
    write_adapters(tmp_path / "adapters", 4)
    file = tmp_path / "config.json"
    async with pool_of(2, time_scale=0.02) as pool, running_engine(**ENGINE) as engine:
        record = pool.config(tmp_path / "adapters")
        fixed = {"id": "fixed", "url": f"triton://{engine.grpc_address}"}
        [gpu] = record["backends"]
        async with in_front_of(pool, record, file=file) as served:
            await until(lambda: len(up(served)) == 2)
            async with loaded(served) as load:
                for backends, expected in (
                    ([gpu, fixed], {"gpu-127.0.0.2", "gpu-127.0.0.3", "fixed"}),
                    ([fixed], {"fixed"}),
                    ([fixed, gpu], {"gpu-127.0.0.2", "gpu-127.0.0.3", "fixed"}),
                    ([gpu], {"gpu-127.0.0.2", "gpu-127.0.0.3"}),
                ):
                    write(file, record | {"backends": backends})
                    await reload(served)
                    await load.more(20)
                    await until(lambda: set(served.state.backends) == expected)  # noqa: B023
                    await load.more(20)
                write(file, record | {"backends": [fixed]})  # before they are gone, it is back
                await reload(served)
                write(file, record | {"backends": [fixed, gpu]})
                await reload(served)
                await load.more(20)
                await until(lambda: len(up(served)) == 3)
            assert {end.outcome for end in served.recorder.of(Settle)} == {Outcome.OK}


async def test_replicas_take_the_same_change_one_after_the_other(tmp_path: Path) -> None:
    """Under load: one knows an engine earlier than the other, and then no longer."""
    write_adapters(tmp_path / "adapters", 4)
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(running_engine(**ENGINE)) for _ in range(3)]
        redis = await stack.enter_async_context(running(tmp_path))
        pool = await stack.enter_async_context(replicas(2, redis.url, engines[:2], tmp_path / "adapters"))
        more = admin_pb2.AddBackendRequest(backend="b2", url=f"triton://{engines[2].grpc_address}", like="b0")
        async with loaded(*pool) as load:
            for _ in range(2):
                for each in pool:
                    await each.backends.Add(more)
                    await load.more(20)
                await until(lambda: any("b2" in owned(each) for each in pool))
                await load.more(20)
                for each in pool:
                    await each.backends.Remove(admin_pb2.BackendRequest(backend="b2"))
                    await load.more(20)
                await until(lambda: not any("b2" in each.state.backends for each in pool))


async def test_a_chat_template_that_comes_later(tmp_path: Path) -> None:
    """The front takes it with the rest; until then a chat is refused."""
    write_adapters(tmp_path / "adapters", 1)
    file, template = tmp_path / "config.json", tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    base = {"base_model": {"name": BASE_MODEL}}
    asked = {"model": "a00", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    async with running_engine(**ENGINE) as engine, AsyncExitStack() as stack:
        served = await stack.enter_async_context(serving([engine], tmp_path / "adapters", file=file, backend=base))
        url = f"http://{served.sidecar.http_address}"
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=url, headers=JSON, timeout=60))
        answer = await client.post("/v1/chat/completions", json=asked)
        assert "no chat template is configured" in answer.json()["error"]["message"]
        record = json.loads(file.read_text())
        record["backends"][0]["base_model"]["chat_template"] = str(template)
        write(file, record)
        assert await reload(served) == ["backends.trt-0.base_model.chat_template"]
        answer = await client.post("/v1/chat/completions", json=asked)
        assert answer.status_code == 200, answer.text


async def test_a_change_whose_call_is_cut_off_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asked for it has left in the middle."""
    file = tmp_path / "config.json"
    (tmp_path / "adapters").mkdir()
    async with running_engine(**ENGINE) as engine, serving([engine], tmp_path / "adapters", file=file) as served:
        begun, may_go_on = asyncio.Event(), asyncio.Event()
        change = served.sidecar.reloads._parts.pools.change

        async def slow(made: Any) -> None:
            begun.set()
            await may_go_on.wait()
            await change(made)

        monkeypatch.setattr(served.sidecar.reloads._parts.pools, "change", slow)
        [name] = write_adapters(tmp_path / "adapters", 1)
        call = served.configuration.Reload(admin_pb2.ReloadRequest())
        async with asyncio.timeout(60):
            await begun.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        may_go_on.set()
        await until(lambda: name in served.state.names)


async def test_a_drain_waits_for_what_waits_for_a_successor(tmp_path: Path) -> None:
    """A process that is told to stop while an engine is being replaced still sends what waits there to the next one."""
    file = tmp_path / "config.json"
    slow = ENGINE | {"time_scale": 0.3}
    async with running_engine(**slow) as one, running_engine(**ENGINE) as two, serving([one], file=file) as served:
        first_answer = asyncio.create_task(served.ask("", 60))
        await until(lambda: bool(served.state.backends["trt-0"].running))
        record = json.loads(file.read_text())
        record["backends"][0]["url"] = f"triton://{two.grpc_address}"
        write(file, record)
        await reload(served)
        second_answer = asyncio.create_task(served.ask("", 4))
        await until(lambda: served.state.queued == 1)
        verdict = (await served.queues.Get(admin_pb2.QueueRequest())).verdict
        assert verdict.endswith(" because trt-0 is leaving with 1 running, and its successor waits for it")
        draining = asyncio.create_task(served.sidecar.drain())
        assert len((await first_answer).tokens) == 60
        assert len((await second_answer).tokens) == 4
        async with asyncio.timeout(60):
            await draining


@pytest.mark.parametrize(
    "absent", [{"url": "triton://127.0.0.1:9"}, {"kind": "triton", "discover": {"dns": "x.test:1"}}]
)
async def test_what_waits_for_an_engine_that_is_not_there_gets_another(tmp_path: Path, absent: dict[str, Any]) -> None:
    """Under another id, in the same change that takes the first one out, a pool or one with a wrong address."""
    file = tmp_path / "config.json"
    options: dict[str, Any] = {"file": file, "until_up": False, "backends": [absent]}
    async with running_engine(**ENGINE) as engine, serving([], **options) as served:
        answer = asyncio.create_task(served.ask("", 4))
        await until(lambda: served.state.queued == 1)
        record = json.loads(file.read_text())
        write(file, record | {"backends": [{"url": f"triton://{engine.grpc_address}"}]})
        await reload(served)
        assert len((await answer).tokens) == 4
