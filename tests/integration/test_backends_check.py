"""`sidecar backends check URL` and `config check --connect` against live engines, each with one thing wrong."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2

from sidecar.adapters.base_model import base_model_of
from sidecar.adapters.staging import AdaptersDir
from sidecar.backends import faults
from sidecar.backends.checking import STEPS, check, result_of
from sidecar.backends.checks import memory, runs
from sidecar.backends.checks.finding import Finding, Look, State, Target
from sidecar.backends.engine_facts import from_engine_config
from sidecar.core.facts import EngineFacts
from sidecar.core.words import Fault
from sidecar.emulator.face import Server, shared_memory
from tests.authority import NEEDS_OPENSSL, Authority
from tests.emulated import channel_to, running_engine
from tests.serving import write_adapters

DUMMY = {"compute": "none", "shape": "tiny"}
OF_TRITON = [step.name for step in STEPS if step.kind in (None, "triton")]


@asynccontextmanager
async def engine_and_target(folder: Path, **options: Any) -> AsyncIterator[tuple[Server, Target]]:
    """Run an engine, and give the target that a complete configuration would make of it."""
    config = folder / "engine.json"
    async with running_engine(**{**DUMMY, "metrics_port": 0, "write_engine_config": config, **options}) as engine:
        target = Target("trt-0", engine.grpc_address, facts=from_engine_config(config), store_bytes=1 << 20)
        if engine.metrics_address is not None:
            target = replace(target, metrics_url=f"http://{engine.metrics_address}/metrics")
        yield engine, target


async def look(target: Target) -> dict[str, Finding]:
    """Return all findings by their checks; every check ends in exactly one."""
    found = [finding async for finding in check(target)]
    assert [finding.check for finding in found] == OF_TRITON
    return {finding.check: finding for finding in found}


def worse(found: dict[str, Finding]) -> dict[str, State]:
    """Return the checks that did not end well."""
    return {name: finding.state for name, finding in found.items() if finding.state is not State.OK}


async def regions_of(address: str) -> list[str]:
    """Return the shared-memory regions that are registered at a server."""
    async with channel_to(address) as stub:
        reply = await stub.SystemSharedMemoryStatus(service_pb2.SystemSharedMemoryStatusRequest())
        return list(reply.regions)


@pytest.mark.parametrize("decoupled", [True, False])
async def test_an_engine_that_serves(tmp_path: Path, decoupled: bool) -> None:
    """All is well, decoupled or not but for what a client misses then; the engine is left as it was."""
    async with engine_and_target(tmp_path, decoupled=decoupled) as (engine, target):
        found = await look(target)
        assert worse(found) == ({} if decoupled else {"decoupled": State.WARNING})
        assert "by gRPC" in found["adapter"].text
        assert "by shared memory" in found["adapter, shared"].text
        assert "64 seats" in found["metrics"].text
        assert "triton 2.51.0" in found["reachable"].text
        if not decoupled:
            assert "config.pbtxt: model_transaction_policy { decoupled: true }" in found["decoupled"].fix
        assert await regions_of(engine.grpc_address) == []
        assert all(served.tokens <= 1 for served in engine.served)
        once = len(engine.served)
        assert once <= 5
        await look(target)
        assert len(engine.served) == 2 * once
        assert len({served.task_id for served in engine.served if served.task_id and served.error is None}) == 2


async def test_a_bfloat16_engine(tmp_path: Path) -> None:
    """The tiny adapter is made in the dtype that the model takes."""
    async with engine_and_target(tmp_path, dtype="bfloat16") as (_, target):
        found = await look(target)
        assert worse(found) == {}
        assert "bfloat16" in found["adapter"].text


async def test_a_declared_dtype_that_contradicts_the_model(tmp_path: Path) -> None:
    """Both values are named, and both ways out, each with its file and line."""
    async with engine_and_target(tmp_path) as (_, target):
        found = await look(replace(target, facts=replace(target.facts, dtype="bfloat16")))
        assert worse(found) == {"dtype": State.FAILED}
        assert "lora_weights is FP16 and the engine is declared as bfloat16" in found["dtype"].text
        assert "config.pbtxt, input lora_weights: data_type: TYPE_BF16" in found["dtype"].fix
        assert "config.yaml: engine: {dtype: float16}" in found["dtype"].fix


async def test_an_engine_of_another_dtype_than_its_model_says(tmp_path: Path) -> None:
    """Nobody declares it, and the engine itself refuses the weights: the config.pbtxt is what is wrong."""
    async with engine_and_target(tmp_path, dtype="bfloat16", lora_weights="fp16") as (_, target):
        found = await look(replace(target, facts=replace(target.facts, dtype=None)))
        assert found["dtype"].state is State.WARNING
        assert found["adapter"].state is State.FAILED
        assert "same data type as base model" in found["adapter"].text
        assert "data_type: TYPE_BF16" in found["adapter"].fix
        assert found["resident"].text == 'not looked at, because of "adapter"'


async def test_nothing_is_declared(tmp_path: Path) -> None:
    """What is not known is named with the line that would declare it; what can be looked at still is."""
    async with engine_and_target(tmp_path) as (_, target):
        found = await look(Target("bare", target.address))
        for name in ("dtype", "engine", "cache", "metrics"):
            assert found[name].state is State.WARNING, name
            assert "config.yaml:" in found[name].fix
        assert found["adapter"].state is State.SKIPPED
        assert "engine: {config:" in found["adapter"].fix
        assert found["unknown id"].state is State.OK
        assert result_of(list(found.values())) is State.WARNING


async def test_metrics_that_are_not_there(tmp_path: Path) -> None:
    """A configured URL that is dead fails, the usual one only warns; both say what stays unknown."""
    async with engine_and_target(tmp_path) as (_, target), engine_and_target(tmp_path) as (_, other):
        dead = await look(replace(target, metrics_url=f"http://127.0.0.1:{free_port()}/metrics"))
        assert dead["metrics"].state is State.FAILED
        assert "hangs or restarts" in dead["metrics"].text
        not_metrics = await look(replace(target, metrics_url=f"http://{other.address}/metrics"))
        assert not_metrics["metrics"].state is State.FAILED
        usual = replace(target, metrics_url=None, usual_metrics_url=target.metrics_url)
        assert (await look(usual))["metrics"].state is State.OK
        usual_dead = replace(target, metrics_url=None, usual_metrics_url=f"http://127.0.0.1:{free_port()}/metrics")
        assert (await look(usual_dead))["metrics"].state is State.WARNING


async def test_metrics_of_another_model(tmp_path: Path) -> None:
    """An engine's metrics that say nothing of the model are told from none at all."""
    async with engine_and_target(tmp_path) as (_, target), http_server(b"# TYPE nv_inference_count counter\n") as port:
        found = await look(replace(target, metrics_url=f"http://127.0.0.1:{port}/metrics"))
        assert found["metrics"].state is State.WARNING
        assert 'no nv_trt_llm_* gauges of "tensorrt_llm"' in found["metrics"].text


async def test_a_cache_that_holds_no_adapter_of_the_largest_rank(tmp_path: Path) -> None:
    """Zero fit, as far as is known; the parameter and a value that would do are given."""
    async with engine_and_target(tmp_path, lora_host_pages=4) as (_, target):
        found = await look(replace(target, facts=replace(target.facts, host_pages=4)))
        assert found["cache"].state is State.FAILED
        assert "0 of rank 64" in found["cache"].text
        assert 'parameters { key: "lora_cache_host_memory_bytes"' in found["cache"].fix
        assert found["resident"].state is State.OK


async def test_an_unknown_model(tmp_path: Path) -> None:
    """The others are listed and the nearest proposed; what rests on the model is skipped and says so."""
    async with engine_and_target(tmp_path) as (_, target):
        found = await look(replace(target, model="tensorrt_lm"))
        assert found["model"].state is State.FAILED
        assert "ensemble, tensorrt_llm" in found["model"].text
        assert "--model tensorrt_llm" in found["model"].fix
        assert found["unknown id"].text == 'not looked at, because of "model"'
        assert found["metrics"].state is not State.SKIPPED


async def test_the_text_model_is_not_the_one_to_load_through(tmp_path: Path) -> None:
    """`ensemble` has LoRA inputs too, and loads go to the core model."""
    async with engine_and_target(tmp_path) as (_, target):
        found = await look(replace(target, model="ensemble"))
        assert found["kind"].state is State.FAILED
        assert "model: tensorrt_llm" in found["kind"].fix


async def test_a_port_where_nobody_listens() -> None:
    """One failure, its cause, and everything else skipped because of it."""
    found = await look(Target("dead", f"127.0.0.1:{free_port()}"))
    assert "nothing listens" in found["reachable"].text
    assert worse(found) == dict.fromkeys(OF_TRITON, State.SKIPPED) | {"reachable": State.FAILED}


async def test_a_host_that_does_not_exist() -> None:
    """The name is what is wrong, not the port."""
    found = await look(Target("nowhere", "no-such-host.invalid:8001"))
    assert 'no host "no-such-host.invalid"' in found["reachable"].text


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"name":"triton","version":"2.51.0","extensions":[]}', "is Triton's HTTP port"),
        (b"# TYPE nv_inference_count counter\n", "is Triton's metrics port"),
        (b"<html></html>", "is an HTTP server"),
    ],
)
async def test_a_port_that_speaks_http(body: bytes, words: str) -> None:
    """The usual mistakes are told apart, and the right port is named."""
    async with http_server(body) as port:
        found = await look(Target("http", f"127.0.0.1:{port}"))
        assert words in found["reachable"].text
        assert "url: triton://127.0.0.1:8001" in found["reachable"].fix


async def test_a_port_that_hangs_up() -> None:
    """Something listens and speaks nothing that is known."""
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    async with server:
        found = await look(Target("mute", f"127.0.0.1:{server.sockets[0].getsockname()[1]}"))
        assert "neither gRPC nor HTTP" in found["reachable"].text


async def test_a_grpc_server_that_is_not_triton() -> None:
    """It answers gRPC and does not know KServe."""
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        found = await look(Target("other", f"127.0.0.1:{port}"))
        assert "a gRPC server, but not Triton" in found["reachable"].text
    finally:
        await server.stop(None)


async def test_an_engine_without_lora(tmp_path: Path) -> None:
    """It takes ids and answers as the base model: the silent failure is found by an id that nobody loaded."""
    async with engine_and_target(tmp_path, lora_modules=()) as (_, target):
        found = await look(target)
        assert found["unknown id"].state is State.FAILED
        assert "in silence" in found["unknown id"].text
        assert "--lora_plugin" in found["unknown id"].fix


async def test_declared_modules_that_the_engine_does_not_have(tmp_path: Path) -> None:
    """The tiny adapter is on every declared module, so the engine's own words say which one it lacks."""
    async with (
        engine_and_target(tmp_path) as (_, complete),
        engine_and_target(tmp_path, lora_modules=("attn_q", "attn_v")) as (_, target),
    ):
        found = await look(replace(target, facts=complete.facts))
        assert found["adapter"].state is State.FAILED
        assert "not enabled" in found["adapter"].text
        assert "not what it was built with" in found["adapter"].text


async def test_several_instances(tmp_path: Path) -> None:
    """Their caches cannot be addressed: the drawback is told, and the line that ends it."""
    async with engine_and_target(tmp_path, instances=4) as (_, target):
        found = await look(target)
        assert found["instances"].state is State.WARNING
        assert found["instances"].text.startswith("CACHES 4, not addressable")
        assert "instance_group [ { count: 1 kind: KIND_CPU } ]" in found["instances"].fix
        assert found["resident"].state in (State.OK, State.WARNING)
        assert result_of(list(found.values())) is State.WARNING


async def test_a_server_that_does_not_see_our_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another container's /dev/shm: a warning, unless the configuration rests on it; weights still go by gRPC."""
    monkeypatch.setattr(shared_memory, "DIRECTORY", tmp_path)
    async with engine_and_target(tmp_path) as (engine, target):
        found = await look(target)
        assert worse(found) == {"shared memory": State.WARNING, "adapter, shared": State.SKIPPED}
        assert "--ipc=host" in found["shared memory"].fix
        insists = await look(replace(target, transport="shared_memory"))
        assert insists["shared memory"].state is State.FAILED
        assert await regions_of(engine.grpc_address) == []


async def test_a_region_goes_whatever_happens(tmp_path: Path) -> None:
    """An error or a cancellation inside leaves no region at the server and no file here."""
    async with engine_and_target(tmp_path) as (engine, target), channel_to(engine.grpc_address) as stub:
        looking = Look(target, None, stub, EngineFacts())  # type: ignore[arg-type]
        seen: list[str] = []
        entered = asyncio.Event()

        async def held() -> None:
            async with memory.region(looking, b"x" * 100) as name:
                seen.append(name)
                entered.set()
                await asyncio.Event().wait()

        async def fails() -> None:
            async with memory.region(looking, b"x") as name:
                seen.append(name)
                raise ZeroDivisionError

        task = asyncio.create_task(held())
        await entered.wait()
        assert await regions_of(engine.grpc_address) == seen
        task.cancel()
        await asyncio.wait([task])
        with pytest.raises(ZeroDivisionError):
            await fails()
        assert await regions_of(engine.grpc_address) == []
        assert not [name for name in seen if (Path("/dev/shm") / name).exists()]


async def test_an_engine_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Live and ready, and no token comes: found within the bound, and nothing more is sent."""
    monkeypatch.setattr(runs, "RUN_S", 0.3)
    async with engine_and_target(tmp_path, freeze_after=0) as (_, target):
        found = await look(target)
        assert worse(found) == {
            "base model": State.FAILED,
            "adapter": State.SKIPPED,
            "adapter, shared": State.SKIPPED,
            "resident": State.SKIPPED,
            "unknown id": State.SKIPPED,
        }
        assert "hangs" in found["base model"].text


async def test_a_cache_full_of_adapters_in_use(tmp_path: Path) -> None:
    """A busy engine is not a broken one."""
    async with engine_and_target(tmp_path, full_errors=1) as (_, target):
        found = await look(target)
        assert found["adapter"].state is State.WARNING
        assert "nothing is proven" in found["adapter"].text
        assert found["resident"].state is State.SKIPPED


async def test_a_miss_in_words_that_are_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a later engine says may be new to us: then heals would not be recognised."""
    known = tuple((text, fault) for text, fault in faults._TEXTS if fault is not Fault.MISS)
    monkeypatch.setattr(faults, "_TEXTS", known)
    async with engine_and_target(tmp_path) as (_, target):
        found = await look(target)
        assert worse(found) == {"unknown id": State.WARNING}
        assert "instead of being healed" in found["unknown id"].text


TINY_BASE = base_model_of(
    {
        "_name_or_path": "tiny-llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 160,
    }
)


async def look_at_files(target: Target) -> dict[str, Finding]:
    """Return the findings at an engine that reads adapters from files: those of the other kind are not among them."""
    found = [finding async for finding in check(target)]
    assert [finding.check for finding in found] == [s.name for s in STEPS if s.kind in (None, "triton_llmapi")]
    return {finding.check: finding for finding in found}


@pytest.mark.parametrize("decoupled", [True, False])
async def test_an_engine_that_reads_files(tmp_path: Path, decoupled: bool) -> None:
    """A tiny PEFT adapter is staged, loaded by the engine from its own disk, and taken away again."""
    shared = tmp_path / "shared"
    shared.mkdir()
    async with engine_and_target(tmp_path, protocol="llmapi", decoupled=decoupled) as (_, target):
        here = replace(target, base=TINY_BASE, adapters_dir=AdaptersDir(shared, str(shared)))
        found = await look_at_files(here)
        expected = {"metrics": State.WARNING}  # this kind publishes none
        assert worse(found) == expected | ({} if decoupled else {"decoupled": State.WARNING})
        assert "staged, loaded by the engine" in found["adapter"].text
        assert [path for path in shared.iterdir() if not path.name.startswith(".")] == []


async def test_a_folder_that_the_engine_does_not_see(tmp_path: Path) -> None:
    """No folder, one that is not here, and one that is another on the engine's side: each with the way out."""
    shared = tmp_path / "shared"
    async with engine_and_target(tmp_path, protocol="llmapi") as (_, target):
        none = await look_at_files(replace(target, base=TINY_BASE))
        assert none["shared folder"].state is State.FAILED
        assert "adapters_dir: {ours:" in none["shared folder"].fix
        assert none["adapter"].text == 'not looked at, because of "shared folder"'
        missing = await look_at_files(replace(target, base=TINY_BASE, adapters_dir=AdaptersDir(shared, str(shared))))
        assert f"there is no folder {shared}" in missing["shared folder"].text
        shared.mkdir()
        elsewhere = replace(target, base=TINY_BASE, adapters_dir=AdaptersDir(shared, "/not/mounted"))
        found = await look_at_files(elsewhere)
        assert found["adapter"].state is State.FAILED
        assert "the engine does not see what is staged" in found["adapter"].text
        unknown = await look_at_files(replace(elsewhere, base=None))
        assert unknown["engine"].state is State.WARNING
        assert unknown["adapter"].state is State.SKIPPED
        assert "base_model: {name:" in unknown["adapter"].fix


@NEEDS_OPENSSL
async def test_tls(tmp_path: Path) -> None:
    """Each way in which TLS can be wrong is told from the others; when it is right its certificate is looked at."""
    authority = Authority(tmp_path)
    await authority.found()
    engine_key, engine_certificate = await authority.sign("engine", "IP:127.0.0.1")
    key, certificate = await authority.sign("sidecar")
    (tmp_path / "stranger").mkdir()
    stranger = Authority(tmp_path / "stranger")
    await stranger.found()
    ours = {"ca": str(authority.ca), "key": str(key), "certificate": str(certificate)}
    files = {"tls_certificate": engine_certificate, "tls_key": engine_key}

    async with engine_and_target(tmp_path, **files, tls_client_ca=authority.ca) as (_, target):
        found = await look(replace(target, tls=ours))
        assert worse(found) == {"TLS": State.WARNING}  # the test's certificates are short-lived
        assert "with a certificate of ours" in found["TLS"].text
        unasked = await look(replace(target, tls={"ca": ours["ca"]}))
        assert "it wants one of ours that its CA signed: none is configured" in unasked["reachable"].text
    async with engine_and_target(tmp_path, **files) as (_, target):
        plain = await look(target)
        assert "speaks TLS, and no TLS is configured" in plain["reachable"].text
        assert "tls: {ca:" in plain["reachable"].fix
        wrong = await look(replace(target, tls={"ca": str(stranger.ca)}))
        assert "its certificate is not accepted" in wrong["reachable"].text
    async with engine_and_target(tmp_path) as (_, target):
        plaintext = await look(replace(target, tls={"ca": ours["ca"]}))
        assert "does not speak TLS" in plaintext["reachable"].text
        assert "take tls out" in plaintext["reachable"].fix


async def test_the_command_line(tmp_path: Path) -> None:
    """A line a check, a summary, JSON for scripts; 1 only when something fails, 2 for what is not to be checked."""
    async with engine_and_target(tmp_path) as (engine, target):
        url, config = f"triton://{engine.grpc_address}", str(tmp_path / "engine.json")
        code, out, err = await sidecar("backends", "check", url, "--engine-config", config)
        assert (code, err) == (0, "")
        assert "✓ reachable" in out
        assert "! metrics" in out
        assert out.rstrip().endswith(f"{engine.grpc_address}: 1 warning, 19 ok")
        options = ("--metrics", str(target.metrics_url), "--dtype", "bfloat16", "--json")
        code, out, _ = await sidecar("backends", "check", engine.grpc_address, "--engine-config", config, *options)
        record = json.loads(out)
        assert (code, record["result"]) == (1, "failed")
        assert [each["check"] for each in record["findings"] if each["state"] != "ok"] == ["dtype"]
        assert len(record["findings"][5]["fix"]) == 2
        code, _, err = await sidecar("backends", "check", "http://127.0.0.1:8000")
        assert code == 2
        assert "triton://HOST:PORT" in err


async def test_a_configured_backend_by_its_id(tmp_path: Path) -> None:
    """All that the configuration says of it counts: model, metrics, engine, the store's size, the served adapters."""
    write_adapters(tmp_path / "loras", 3)
    (tmp_path / "loras" / "broken").mkdir()
    (tmp_path / "loras" / "broken" / "adapter_config.json").write_text("{")
    async with engine_and_target(tmp_path) as (_, target):
        file = configuration(
            tmp_path, target, f"adapters: {{serve: {tmp_path / 'loras'}}}\nstore: {{memory_bytes: 99}}\n"
        )
        code, out, err = await sidecar("backends", "check", "good", "--config", str(file))
        assert code == 0
        assert "the 3 served adapters take 3: all fit" in out
        assert "store.memory_bytes is 9.22e-08 GiB" in out
        assert "not counted: " in err
        code, _, err = await sidecar("backends", "check", "nobody", "--config", str(file))
        assert code == 2
        assert 'has no backend "nobody"; it has good, typo, dead' in err


async def test_config_check_connects_to_all(tmp_path: Path) -> None:
    """What is wrong at each backend, then a line for each; without --connect nobody is asked."""
    async with engine_and_target(tmp_path) as (_, target):
        file = configuration(tmp_path, target)
        code, out, _ = await sidecar("config", "check", str(file), "--connect")
        assert code == 1
        assert "typo, triton://" in out
        table = out[out.index("BACKEND") :].splitlines()[1:]
        assert [line.split()[:3] for line in table] == [
            ["good", "✓", "ok"],
            ["typo", "✗", "failed"],
            ["dead", "✗", "failed"],
        ]
        code, out, _ = await sidecar("config", "check", str(file), "--connect", "--json")
        results = {backend["backend"]: backend["result"] for backend in json.loads(out)["backends"]}
        assert (code, results) == (1, {"good": "ok", "typo": "failed", "dead": "failed"})
        assert (await sidecar("config", "check", str(file)))[0] == 0


def configuration(folder: Path, target: Target, more: str = "") -> Path:
    """Write a configuration with one engine that serves, one whose model is misspelt, and one that is not there."""
    known = f"metrics: '{target.metrics_url}', engine: {{config: {folder / 'engine.json'}}}"
    file = folder / "sidecar.yaml"
    file.write_text(
        f"backends:\n- {{url: 'triton://{target.address}', id: good, {known}}}\n"
        f"- {{url: 'triton://{target.address}', id: typo, model: tensorrtllm, {known}}}\n"
        f"- {{url: 'triton://127.0.0.1:{free_port()}', id: dead}}\n{more}"
    )
    return file


async def sidecar(*arguments: str) -> tuple[int, str, str]:
    """Run a command in a process of its own; return its exit code and what it printed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sidecar", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


@asynccontextmanager
async def http_server(body: bytes) -> AsyncIterator[int]:
    """Serve one body over HTTP/1.1 whatever is asked, and give the port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (await reader.readline()).startswith(b"GET "):
            head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
            writer.write(head + body)
        else:
            writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def free_port() -> int:
    """Return a port where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
