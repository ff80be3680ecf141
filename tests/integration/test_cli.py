"""The command line, as scripts and people use it: in this process against a real listener, and as a process."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml
from typer.main import get_command

from sidecar.adapters.layout import Layout, numpy_dtype
from sidecar.adapters.packed import lora_config, pack, plan
from sidecar.adapters.peft import read_adapter
from sidecar.backends.api import Reply, Ticket
from sidecar.backends.wire import ModelInferResponse
from sidecar.cli import app, run
from sidecar.cli.generating import sentence
from sidecar.core.config import CoreConfig
from sidecar.core.effects import Dispatch
from sidecar.core.events import FirstToken, RunEnded
from sidecar.core.facts import EngineFacts
from sidecar.fronts.admin import add_admin
from sidecar.fronts.auth import TokenInterceptor
from sidecar.fronts.generate import GatewayService
from sidecar.plugins import policies_of
from sidecar.proto import gateway_pb2, gateway_pb2_grpc
from sidecar.shell.gateway import Gateway, RequestFacts
from sidecar.state.registry import SqliteRegistry
from tests.peft_files import BASE_MODEL, write_adapter
from tests.scripted_backend import PAYLOAD, ScriptedBackend

TOKEN = "s3cret"


class EchoingBackend(ScriptedBackend):
    """Answers each request with the adapter's name, in two pieces; holds those of an adapter called "slow"."""

    def run(self, effect: Dispatch, ticket: Ticket) -> None:
        if effect.name == "slow":
            super().run(effect, ticket)
            return
        self._post(FirstToken(effect.request, effect.attempt))
        for piece, final in ((f"I am {effect.name} ", False), ("— ja", True)):
            ticket.deliver(Reply(b"", text_response(piece), final))
        self._post(RunEnded(effect.request, effect.attempt, 2))


def text_response(text: str) -> Any:
    """Return a response of the engine's text model."""
    message = ModelInferResponse()
    message.outputs.add(name="text_output", datatype="BYTES", shape=[1])
    data = text.encode()
    message.raw_output_contents.append(len(data).to_bytes(4, "little") + data)
    return message


@dataclass
class Ended:
    """What a command left behind."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)

    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.err)["error"]
        return found


@pytest.fixture
def sidecar(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Return a function that runs one command here and now."""

    def command(*arguments: str) -> Ended:
        code = run(arguments)
        captured = capfd.readouterr()
        return Ended(code, captured.out, captured.err)

    return command


@dataclass
class Served:
    """A sidecar's listeners over scripted engines; `cli` runs a command that knows where it is."""

    gateway: Gateway
    address: str
    command: Callable[..., Ended]

    async def cli(self, *arguments: str) -> Ended:
        option = "--server" if arguments[0] == "generate" else "--admin"
        return await asyncio.to_thread(self.command, *arguments, option, self.address)

    async def register(self, name: str, folder: Path, **options: Any) -> None:
        await self.gateway.register(name, str(write_adapter(folder / name.replace("/", "_"), **options)))


async def serve_here(
    tmp_path: Path, command: Callable[..., Ended], interceptors: tuple[Any, ...] = ()
) -> AsyncIterator[Served]:
    """Serve both APIs on one free port until the test is done."""
    config, registry = CoreConfig(), SqliteRegistry(None)
    gateway = Gateway(config, policies_of(config), registry, [tmp_path])
    backends = (EchoingBackend("trt-0"), EchoingBackend("trt-1", up=False))
    await gateway.start([(backend, EngineFacts(base_models=(BASE_MODEL,), seats=2)) for backend in backends])
    server = grpc.aio.server(interceptors=interceptors)
    add_admin(server, gateway)
    gateway_pb2_grpc.add_GatewayServicer_to_server(GatewayService(gateway, "metadata", False), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield Served(gateway, f"127.0.0.1:{port}", command)
    await server.stop(None)
    await gateway.stop()
    registry.close()


@pytest.fixture
async def served(tmp_path: Path, sidecar: Callable[..., Ended]) -> AsyncIterator[Served]:
    async for each in serve_here(tmp_path, sidecar):
        yield each


# Help and misuse.


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every command and group."""
    group = group or get_command(app)
    yield path
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_every_command_explains_itself(path: tuple[str, ...], sidecar: Callable[..., Ended]) -> None:
    """--help of every command and group ends with 0 and begins with what it does."""
    ended = sidecar(*path, "--help")
    assert ended.code == 0
    assert f"Usage: sidecar {' '.join(path)}".rstrip() in ended.out


def test_the_commands_are_those_that_are_promised() -> None:
    """No command is missing, and none stands there without its mechanism."""
    groups = {"adapters", "backends", "config", "policies"}
    assert sorted(" ".join(path) for path in commands() if path and path[0] not in groups) == [
        "demo", "emulate", "generate", "queue", "replay", "serve",
    ]  # fmt: skip
    assert sorted(path[1] for path in commands() if path[:1] == ("adapters",) and len(path) == 2) == [
        "convert", "evict", "inspect", "list", "pin", "prefetch", "register", "release", "show", "unpin", "unregister",
    ]  # fmt: skip
    assert sorted(path[1] for path in commands() if path[:1] == ("backends",) and len(path) == 2) == [
        "drain", "list", "show", "undrain",
    ]  # fmt: skip


def test_exit_codes_are_documented(sidecar: Callable[..., Ended]) -> None:
    """The top help names each exit code."""
    text = " ".join(sidecar("--help").out.split())
    for words in ("0 done", "1 failed", "2 wrong usage", "3 the data directory", "4 no sidecar", "130 interrupted"):
        assert words in text


@pytest.mark.parametrize("arguments", [("adaptors",), ("adapters", "show"), ("queue", "--limit", "0"), ("--nope",)])
def test_wrong_usage_is_one_line_and_two(arguments: tuple[str, ...], sidecar: Callable[..., Ended]) -> None:
    """A wrong word ends with 2, one line that says where help is, and JSON when that was asked for."""
    ended = sidecar(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert re.fullmatch(r'error: .* \(see "sidecar.* --help"\)\n', ended.err)
    assert sidecar(*arguments, "--json").error()["reason"] == "MISUSED"


def test_nobody_there(sidecar: Callable[..., Ended]) -> None:
    """Without a sidecar at the address the exit code is 4, and the message names the address and the option."""
    ended = sidecar("adapters", "list", "--admin", "127.0.0.1:1")
    assert ended.code == 4
    assert "127.0.0.1:1" in ended.err
    assert "--admin" in ended.err
    assert sidecar("generate", "sql", "hi", "--server", "127.0.0.1:1", "--json").error()["reason"] == "UNREACHABLE"


# Without a sidecar: folders, configurations, policies.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_convert_writes_the_packers_rows(dtype: Any, tmp_path: Path, sidecar: Callable[..., Ended]) -> None:
    """The two files hold what the packer makes, in the shapes and dtypes of NVIDIA's script."""
    source = write_adapter(tmp_path / "sql", dtype="float16")
    ended = sidecar("adapters", "convert", str(source), "--out", str(tmp_path / "out"), "--dtype", dtype, "--json")
    assert ended.code == 0
    with read_adapter(source) as adapter:
        planned = plan(adapter, Layout(dtype))
        expected = np.zeros(planned.shape, numpy_dtype(planned.layout))
        pack(adapter, planned, expected)
    weights = np.load(tmp_path / "out" / "model.lora_weights.npy")
    config = np.load(tmp_path / "out" / "model.lora_config.npy")
    assert weights.shape == (1, *planned.shape)
    assert weights.dtype == (np.float16 if dtype == "float16" else np.dtype("V2"))
    assert weights.tobytes() == expected.tobytes()
    assert config.dtype == np.int32
    assert np.array_equal(config, lora_config(planned)[np.newaxis])
    assert ended.json()["shape"] == [1, *planned.shape]


def test_inspect_shows_modules_and_packed_forms(tmp_path: Path, sidecar: Callable[..., Ended]) -> None:
    """People see modules and sizes; scripts get every fact."""
    source = str(write_adapter(tmp_path / "sql"))
    ended = sidecar("adapters", "inspect", source)
    assert ended.code == 0
    assert re.search(r"^attn_q +64 → 64 +2 +8 +2 ", ended.out, re.M)
    found = sidecar("adapters", "inspect", source, "--json").json()
    assert [layout["dtype"] for layout in found["layouts"]] == ["float16", "bfloat16"]


def test_a_bad_folder_is_told_with_its_reason(tmp_path: Path, sidecar: Callable[..., Ended]) -> None:
    """A folder that is not there, and an adapter that cannot be expressed, end with 1 and a reason."""
    ended = sidecar("adapters", "inspect", str(tmp_path / "missing"))
    assert ended.code == 1
    assert ended.err.startswith("error: ")
    assert ended.err.rstrip().endswith("[ORIGIN_UNREADABLE]")
    dora = write_adapter(tmp_path / "dora", use_dora=True)
    ended = sidecar("adapters", "convert", str(dora), "--out", str(tmp_path / "out"), "--json")
    assert (ended.code, ended.error()["reason"]) == (1, "ADAPTER_UNSUPPORTED")
    assert not (tmp_path / "out").exists()


def test_config_check_prints_what_would_be_served(
    tmp_path: Path, sidecar: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defaults, the file and the environment come together; YAML for people, JSON for scripts."""
    file = tmp_path / "sidecar.yaml"
    file.write_text("store: {eviction: lfu}\nbackends: [{url: 'triton://gpu:8001'}]\n")
    monkeypatch.setenv("LORA_SIDECAR_STORE__FETCHES_MAX", "7")
    monkeypatch.setenv("LORA_SIDECAR_ADMIN", "127.0.0.1:9001")
    ended = sidecar("config", "check", str(file))
    assert ended.code == 0
    record = yaml.safe_load(ended.out)
    assert (record["store"]["eviction"], record["store"]["fetches_max"]) == ("lfu", 7)
    assert record["listeners"]["data"]["address"] == "0.0.0.0:9000"
    assert sidecar("config", "check", str(file), "--json").json() == record


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stor: {}", "unknown key stor; did you mean store?"),
        ("store: {eviction: lfru}", 'no eviction policy is called "lfru"; there are lfu, lru'),
        ("store: {memory_bytes: much}", "store.memory_bytes"),
        ("listeners: {admin: {token_file: /nowhere}}", "listeners.admin.token_file: there is no file /nowhere"),
        ("- a list", "the top level must be keys"),
    ],
)
def test_config_check_says_what_is_wrong(text: str, words: str, tmp_path: Path, sidecar: Callable[..., Ended]) -> None:
    """Each mistake ends with 2 and names the key and the way out."""
    file = tmp_path / "sidecar.yaml"
    file.write_text(text)
    ended = sidecar("config", "check", str(file))
    assert (ended.code, ended.out) == (2, "")
    assert words in ended.err
    assert sidecar("config", "check", str(file), "--json").error()["reason"] == "CONFIG_INVALID"


def test_policies_check(sidecar: Callable[..., Ended]) -> None:
    """A policy is found by name, by kind and name, and by class; an unknown one lists those there are."""
    for name in ("lru", "eviction.lru", "policies.eviction.lru:LRU"):
        ended = sidecar("policies", "check", name, "--json")
        assert ended.code == 0
        assert ended.json()["kind"] == "eviction"
        assert "is pure" in ended.json()["checks"]
    ended = sidecar("policies", "check", "nope")
    assert ended.code == 2
    assert "eviction.lfu" in ended.err


def test_policies_check_fails_a_policy_that_does_not_conform(
    tmp_path: Path, sidecar: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy in a file beside the caller is found, and one that forgets its keys fails by name."""
    (tmp_path / "forgetful.py").write_text(
        "from policies.eviction.lru import LRU\n\n\n"
        "class Forgetful(LRU):\n    def victims(self, now_ns):\n        return iter(())\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    ended = sidecar("policies", "check", "forgetful:Forgetful")
    assert ended.code == 1
    assert ended.err.startswith('error: the eviction policy "forgetful:Forgetful" does not conform')


# Against a sidecar.


async def test_an_adapters_life(served: Served, tmp_path: Path) -> None:
    """Register, list, show, pin, prefetch, evict, unregister: tables for people."""
    source = str(write_adapter(tmp_path / "sql"))
    ended = await served.cli("adapters", "register", "sql", source, "--allow", "acme")
    assert ended.out.startswith("sql@v1 registered: rank 8, attn_q, attn_v, ")
    assert "was registered already" in (await served.cli("adapters", "register", "sql", source, "--allow", "acme")).out
    listed = await served.cli("adapters", "list")
    assert re.search(r"^sql +v1 +8 +attn_q,attn_v +- +- +for acme", listed.out, re.M)
    assert "stays in the host store" in (await served.cli("adapters", "pin", "sql")).out
    assert "may be evicted again" in (await served.cli("adapters", "unpin", "sql")).out
    assert "PLACE" in (await served.cli("adapters", "prefetch", "sql", "--backend", "trt-0")).out
    await served.gateway.backends["trt-0"].loaded.wait()  # type: ignore[attr-defined]
    shown = await served.cli("adapters", "show", "sql")
    assert re.search(r"^float16 +held +8.2 kB +0 +\d+", shown.out, re.M)
    assert re.search(r"^trt-0 +gpu +\d+ m?s +load", shown.out, re.M)
    assert "no unload" in (await served.cli("adapters", "evict", "sql")).out
    assert (await served.cli("adapters", "unregister", "sql")).out == "sql is forgotten\n"
    assert "no adapter is registered" in (await served.cli("adapters", "list")).out


async def test_json_everywhere(served: Served, tmp_path: Path) -> None:
    """Every command of the admin side prints one JSON value when asked."""
    source = str(write_adapter(tmp_path / "sql"))
    assert (await served.cli("adapters", "register", "sql", source, "--json")).json()["unchanged"] is False
    assert (await served.cli("adapters", "list", "--json")).json()[0]["name"] == "sql"
    shown = (await served.cli("adapters", "show", "sql", "--json")).json()
    assert (shown["rank"], shown["pinned"], shown["modules"]) == (8, False, ["attn_q", "attn_v"])
    assert [place["tier"] for place in shown["backends"]] == ["absent", "absent"]
    for verb in ("pin", "unpin", "release"):
        assert (await served.cli("adapters", verb, "sql", "--json")).json()["name"] == "sql"
    for verb in ("prefetch", "evict"):
        assert (await served.cli("adapters", verb, "sql", "--json")).json()["places"]
    assert [each["id"] for each in (await served.cli("backends", "list", "--json")).json()] == ["trt-0", "trt-1"]
    for verb, state in (("drain", "draining"), ("undrain", "up"), ("show", "up")):
        assert (await served.cli("backends", verb, "trt-0", "--json")).json()["state"] == state
    assert (await served.cli("queue", "--json")).json()["verdict"] == "nobody waits, nothing runs"
    assert (await served.cli("adapters", "unregister", "sql", "--json")).json() == {}


async def test_the_sidecars_errors(served: Served, tmp_path: Path) -> None:
    """A refusal ends with 1, in the sidecar's words and with its reason; --json has the details."""
    await served.register("sql", tmp_path)
    ended = await served.cli("adapters", "show", "sqk")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err == 'error: unknown adapter "sqk"; did you mean sql? [UNKNOWN_ADAPTER]\n'
    error = (await served.cli("adapters", "register", "x", "/etc", "--json")).error()
    assert (error["reason"], error["code"], error["adapter"]) == ("ORIGIN_NOT_ALLOWED", "PERMISSION_DENIED", "x")
    assert (await served.cli("backends", "show", "nope", "--json")).error()["reason"] == "UNKNOWN_BACKEND"


async def test_backends_and_queue_for_people(served: Served, tmp_path: Path) -> None:
    """With two seats taken `queue` begins with the verdict and `backends show` says what is pinned by what."""
    await served.register("slow", tmp_path)
    tickets = [served.gateway.submit(RequestFacts("slow", tenant="acme"), PAYLOAD) for _ in range(3)]
    await served.gateway.backends["trt-0"].running_are(2)  # type: ignore[attr-defined]
    lines = (await served.cli("queue")).out.splitlines()
    assert re.match(r"1 waiting for .* \(bound 600 s\) because all seats are taken on trt-0", lines[0])
    assert re.search(r"10 min +slow +acme +default +trt-0 +seats full +\d+ *$", lines[-1])
    assert re.search(r"^trt-1 +down +0/2 ", (await served.cli("backends", "list")).out, re.M)
    shown = (await served.cli("backends", "show", "trt-0")).out
    assert "2 of 2 taken, 1 queued" in shown
    assert re.search(r"^slow +\w+ +[\d.]+ m?s +1 +2 +1 +running", shown, re.M)
    for ticket in tickets:
        served.gateway.close(ticket)


async def test_generate(served: Served, tmp_path: Path) -> None:
    """The text goes to stdout, where it came from to stderr, and --json has both."""
    await served.register("sql", tmp_path)
    ended = await served.cli("generate", "sql", "hello", "--stats")
    assert (ended.code, ended.out) == (0, "I am sql — ja\n")
    assert re.fullmatch(
        r"sql@v1 from trt-0: adapter fetched and loaded \(load .* ms\), queued .* ms, 2 tokens, 0 heals\n", ended.err
    )
    answer = (await served.cli("generate", "sql", "hello", "--json")).json()
    assert answer["text"] == "I am sql — ja"
    assert (answer["origin"]["cache"], answer["origin"]["backend"]) == ("resident", "trt-0")


async def test_generate_when_it_cannot(served: Served, tmp_path: Path) -> None:
    """An unknown adapter, a passed deadline and a missing prompt have their own endings."""
    await served.register("slow", tmp_path)
    assert (await served.cli("generate", "slaw", "hi", "--json")).error()["reason"] == "UNKNOWN_ADAPTER"
    late = await served.cli("generate", "slow", "hi", "--deadline-ms", "100", "--json")
    assert (late.code, late.error()["reason"]) == (1, "DEADLINE_EXCEEDED")
    assert (await served.cli("generate", "slow")).code == 2
    assert (await served.cli("generate", "slow", "--tokens", "1,x")).code == 2


async def test_a_token_file(tmp_path: Path, sidecar: Callable[..., Ended]) -> None:
    """With --token-file the command is let in; without, the reason is UNAUTHENTICATED; a missing file is misuse."""
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    async for served in serve_here(tmp_path, sidecar, (TokenInterceptor(file),)):
        assert (await served.cli("adapters", "list", "--token-file", str(file))).code == 0
        assert (await served.cli("adapters", "list", "--json")).error()["reason"] == "UNAUTHENTICATED"
        assert (await served.cli("adapters", "list", "--token-file", str(tmp_path / "no"))).code == 2


async def test_the_wrong_listener(served: Served) -> None:
    """A server that has not got the service is named as such."""
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    ended = await asyncio.to_thread(served.command, "adapters", "list", "--admin", f"127.0.0.1:{port}")
    await server.stop(None)
    assert ended.code == 4
    assert "is not the admin listener" in ended.err


def test_a_sentence_for_each_cache() -> None:
    """Where the adapter was is said in words; a load only when there was one."""
    origin = gateway_pb2.Origin(version="sql@v1", backend="b", cache="resident", queue_ms=3, output_tokens=24, heals=1)
    assert sentence(origin) == "sql@v1 from b: adapter resident, queued 3 ms, 24 tokens, 1 heal"
    origin = gateway_pb2.Origin(cache="base", output_tokens=1)
    assert sentence(origin) == "base model: no adapter needed, queued 0 ms, 1 token, 0 heals"


# As a process.


def test_a_reader_that_leaves_is_no_traceback(tmp_path: Path) -> None:
    """Output into a closed pipe ends quietly."""
    source = write_adapter(tmp_path / "sql")
    arguments = [sys.executable, "-c", "from sidecar.cli import main; main()", "adapters", "inspect", str(source)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        errors = process.stderr.read()
        process.wait()
    assert process.returncode == 1
    assert errors == b""


def start(*arguments: str) -> subprocess.Popen[str]:
    """Start the command as a process of its own."""
    command = [sys.executable, "-c", "from sidecar.cli import main; main()", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def serve(*options: str) -> subprocess.Popen[str]:
    """Start `serve` on free ports; an option that is given twice counts the second time."""
    anywhere = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--http", "127.0.0.1:0")
    return start("serve", "--json", *anywhere, *options)


def test_serve_from_start_to_end(tmp_path: Path, sidecar: Callable[..., Ended]) -> None:
    """`serve` says when it is ready, answers, keeps others out of its data and its ports, and leaves with 0."""
    write_adapter(tmp_path / "loras" / "sql")
    data = str(tmp_path / "data")
    with serve("--data", data, "--adapters", str(tmp_path / "loras"), "--set", "log_format=json") as process:
        assert process.stdout
        ready = json.loads(process.stdout.readline())
        assert ready["adapters"] == 1
        assert [each["name"] for each in sidecar("adapters", "list", "--json", "--admin", ready["admin"]).json()] == [
            "sql"
        ]
        second = serve("--data", data)
        _, errors = second.communicate()
        assert second.returncode == 3
        error = json.loads(errors.splitlines()[-1])["error"]
        assert str(process.pid) in error["message"]
        assert data in error["message"]
        third = serve("--listen", ready["data"])
        _, errors = third.communicate()
        assert third.returncode == 2
        assert json.loads(errors.splitlines()[-1])["error"]["reason"] == "PORT_IN_USE"
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--set", "store.memory_byte=1"), "unknown key store.memory_byte; did you mean memory_bytes?"),
        (("--set", "nonsense"), "--set wants key=value"),
        (("--config", "/nowhere.yaml"), "/nowhere.yaml"),
        (("--admin", "0.0.0.0:0"), "token_file"),
        (("--backend", "triton://nowhere"), "triton://HOST:PORT"),
    ],
)
def test_serve_refuses_a_wrong_configuration(arguments: tuple[str, ...], words: str) -> None:
    """What is wrong with the options is said in one line, and the exit code is 2."""
    process = serve(*arguments)
    _, errors = process.communicate()
    assert process.returncode == 2
    assert words in json.loads(errors.splitlines()[-1])["error"]["message"]
