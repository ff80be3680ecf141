"""The command line without a sidecar, and as a process of its own."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.main import get_command

from sidecar.adapters.layout import Layout, numpy_dtype
from sidecar.adapters.packed import lora_config, pack, plan
from sidecar.adapters.peft import read_adapter
from sidecar.cli import app
from tests.kit.cli_runs import Ended, runner
from tests.kit.forked import Popen
from tests.kit.peft_files import write_adapter


@pytest.fixture
def sidecar(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Return a function that runs one command here and now."""
    return runner(capfd)


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


def test_the_version_is_the_package_s(sidecar: Callable[..., Ended]) -> None:
    """It is printed whatever follows, and nothing is done."""
    for arguments in (["--version"], ["--version", "serve"]):
        ended = sidecar(*arguments)
        assert (ended.code, ended.out, ended.err) == (0, f"lora-sidecar {version('lora-sidecar')}\n", "")


def test_the_commands_are_those_that_are_promised() -> None:
    """No command is missing, and none stands there without its mechanism."""
    groups = {
        "access", "adapters", "backends", "config", "debug", "envoy", "keys", "limits", "policies", "replicas",
        "requests", "state",
    }  # fmt: skip
    assert sorted(" ".join(path) for path in commands() if path and path[0] not in groups) == [
        "audit", "calibrate", "demo", "emulate", "generate", "login", "logout", "plan", "queue", "replay", "serve",
        "simulate", "top", "usage", "whoami",
    ]  # fmt: skip
    assert sorted(path[1] for path in commands() if path[:1] == ("adapters",) and len(path) == 2) == [
        "convert", "evict", "inspect", "list", "pause", "pin", "prefetch", "promote", "refresh", "register", "release",
        "resume", "rollback", "show", "unpin", "unregister", "verify", "watch",
    ]  # fmt: skip
    assert sorted(path[1] for path in commands() if path[:1] == ("backends",) and len(path) == 2) == [
        "add", "check", "drain", "list", "remove", "show", "undrain",
    ]  # fmt: skip


def test_exit_codes_are_documented(sidecar: Callable[..., Ended]) -> None:
    """The top help names each exit code."""
    text = " ".join(sidecar("--help").out.split())
    for words in ("0 done", "1 failed", "2 wrong usage", "3 the data directory", "4 no sidecar", "130 interrupted"):
        assert words in text


@pytest.mark.parametrize(
    "arguments", [("adaptors",), ("adapters", "show"), ("adapters", "push"), ("queue", "--limit", "0"), ("--nope",)]
)
def test_wrong_usage_is_one_line_and_two(arguments: tuple[str, ...], sidecar: Callable[..., Ended]) -> None:
    """A wrong word ends with 2, one line that says where help is, and JSON when that was asked for."""
    ended = sidecar(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert re.fullmatch(r'error: .* \(see "sidecar.* --help"\)\n', ended.err)
    assert sidecar(*arguments, "--json").error()["reason"] == "MISUSED"
    if "push" in arguments:
        assert '"sidecar adapters register NAME FOLDER --push" does it' in ended.err


def test_nobody_there(sidecar: Callable[..., Ended]) -> None:
    """Without a sidecar at the address the exit code is 4, and the message names the address and the option."""
    ended = sidecar("adapters", "list", "--admin", "127.0.0.1:1")
    assert ended.code == 4
    assert "127.0.0.1:1" in ended.err
    assert "--admin" in ended.err
    assert sidecar("generate", "sql", "hi", "--server", "127.0.0.1:1", "--json").error()["reason"] == "UNREACHABLE"


@pytest.mark.parametrize(
    "arguments",
    [
        ("adapters", "list", "--admin", ""),
        ("generate", "sql", "hi", "--server", " "),
        ("backends", "check", "--admin", ""),
    ],
)
def test_an_empty_address(arguments: tuple[str, ...], sidecar: Callable[..., Ended]) -> None:
    """It is wrong usage, as a variable of a script that is not set would give it."""
    ended = sidecar(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == f"error: {arguments[-2]} names no address: give HOST:PORT or unix:PATH\n"


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
    assert record["listeners"]["data"]["address"] == "127.0.0.1:9000"
    assert sidecar("config", "check", str(file), "--json").json() == record


def test_envoy_listens_at_an_ip_address(tmp_path: Path, sidecar: Callable[..., Ended]) -> None:
    """Envoy takes no name there, and refuses such a bootstrap."""
    file = tmp_path / "sidecar.yaml"
    file.write_text("listeners: {endpoint_picker: {address: '127.0.0.1:9004'}}\n")
    ended = sidecar("envoy", "config", str(file), "--host", "localhost")
    assert (ended.code, ended.out) == (2, "")
    assert "--host localhost: Envoy listens at an IP address only, as 127.0.0.1 or 0.0.0.0" in ended.err
    assert sidecar("envoy", "config", str(file), "--host", "::1").code == 0


@pytest.mark.parametrize(
    ("data", "picker", "places"),
    [
        ("127.0.0.1:9000", "127.0.0.1:9004", ["127.0.0.1"]),
        ("0.0.0.0:9000", "10.0.0.7:9004", ["10.0.0.7"]),
        ("127.0.0.1:9000", "10.0.0.7:9004", []),
    ],
)
def test_envoy_is_given_data_listeners_that_it_can_reach(
    tmp_path: Path, sidecar: Callable[..., Ended], data: str, picker: str, places: list[str]
) -> None:
    """On another machine than the sidecars it reaches none that listen on loopback."""
    file = tmp_path / "sidecar.yaml"
    file.write_text(f"listeners: {{data: {{address: '{data}'}}, endpoint_picker: {{address: '0.0.0.0:9004'}}}}\n")
    record = sidecar("envoy", "config", str(file), "--picker", picker, "--json").json()
    found = [
        endpoint["endpoint"]["address"]["socket_address"]["address"]
        for cluster in record["static_resources"]["clusters"]
        if cluster["name"] == "sidecar_data"
        for endpoint in cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    ]
    assert found == places


def test_config_check_says_that_nothing_would_be_served(tmp_path: Path, sidecar: Callable[..., Ended]) -> None:
    """As a comment: a sidecar without an engine may start, and one that runs does not take it."""
    file = tmp_path / "sidecar.yaml"
    file.write_text(f"{{backends: [], adapters: {{roots: ['{tmp_path}', /nowhere]}}}}\n")
    ended = sidecar("config", "check", str(file))
    assert ended.code == 0
    assert ended.out.splitlines()[-2].startswith("# backends is empty: requests are refused until ")
    assert ended.out.splitlines()[-1].startswith("# adapters.roots: there is no folder /nowhere; ")


def test_config_check_says_how_late_a_stall_is_noticed(tmp_path: Path, sidecar: Callable[..., Ended]) -> None:
    """Of a Triton whose metrics are at no usual place; of one on the usual port, or with their URL, it says nothing."""
    file = tmp_path / "sidecar.yaml"
    file.write_text("backends: [{url: 'triton://a:8001'}, {url: 'triton://b:9'}]\n")
    [note] = [line for line in sidecar("config", "check", str(file)).out.splitlines() if "no metrics" in line]
    assert note.startswith("# b:9: no metrics, by which an engine that stalls is taken for lost after 30 s: ")


def test_config_check_says_what_paces_rest_on(tmp_path: Path, sidecar: Callable[..., Ended]) -> None:
    """A backend with a cost file is calibrated, one without is a guess; as comments of the YAML, or beside the JSON."""
    file = tmp_path / "sidecar.yaml"
    file.write_text(
        "backends:\n- {url: 'triton://a:8001', engine: {cost: llama-3.1-8b/a100_sxm/trtllm}}\n"
        "- {url: 'triton://b:8001', id: other}\n"
    )
    ended = sidecar("config", "check", str(file))
    calibrated, guess = ended.out.splitlines()[-2:]
    assert calibrated.startswith("# a:8001: its pace is calibrated from llama-3.1-8b/a100_sxm/trtllm: a step takes ")
    assert guess.startswith("# other: its pace is a guess until it is learned")
    assert yaml.safe_load(ended.out)["backends"][0]["engine"]["cost"] == "llama-3.1-8b/a100_sxm/trtllm"
    as_json = sidecar("config", "check", str(file), "--json")
    assert as_json.json() == yaml.safe_load(ended.out)
    assert as_json.err.splitlines() == [calibrated.removeprefix("# "), guess.removeprefix("# ")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("backends: [{url: 'triton://a:1', engine: {cost: x/y/z}}]", "there is no cost_x_y_z.json"),
        ("stor: {}", "unknown key stor; did you mean store?"),
        ("store: {eviction: lfru}", 'no eviction policy is called "lfru"; there are gdsf, lfu, lru'),
        ("store: {memory_bytes: much}", "store.memory_bytes"),
        ("listeners: {admin: {token_file: /nowhere}}", "listeners.admin.token_file: there is no file /nowhere"),
        (
            "{state: {url: 'redis://a:1'}, replicas: {address: '127.0.0.1:1', tls: {ca: /nowhere}}}",
            "replicas.tls.ca: there is no file /nowhere",
        ),
        ("- a list", "the top level must be keys"),
        (
            "backends: [{url: 'triton://a:1', base_model: {name: m, chat_template: nosuch.jinja}}]",
            "chat template nosuch.jinja: no such file; relative paths count from the folder in which the process is "
            "started",
        ),
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
    return Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def serve(*options: str) -> subprocess.Popen[str]:
    """Start `serve` on free ports; an option that is given twice counts the second time."""
    anywhere = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--http", "127.0.0.1:0")
    return start("serve", "--json", *anywhere, *options)


def test_serve_from_start_to_end(tmp_path: Path, sidecar: Callable[..., Ended]) -> None:
    """`serve` says when it is ready, answers, keeps others out of its data and its ports, and leaves with 0."""
    write_adapter(tmp_path / "loras" / "sql")
    data = str(tmp_path / "data")
    with serve("--data-directory", data, "--adapters", str(tmp_path / "loras"), "--set", "log_format=json") as process:
        assert process.stdout
        ready = json.loads(process.stdout.readline())
        assert ready["adapters"] == 1
        assert [each["name"] for each in sidecar("adapters", "list", "--json", "--admin", ready["admin"]).json()] == [
            "sql"
        ]
        second = serve("--data-directory", data)
        _, errors = second.communicate()
        assert second.returncode == 3
        error = json.loads(errors.splitlines()[-1])["error"]
        assert str(process.pid) in error["message"]
        assert data in error["message"]
        for option in ("--listen", "--admin", "--http"):
            another = serve(option, ready["data"])
            _, errors = another.communicate()
            assert another.returncode == 2
            error = json.loads(errors.splitlines()[-1])["error"]
            assert error["reason"] == "PORT_IN_USE"
            assert error["message"].startswith(f"{option}: the ")
            assert "add_port" not in errors  # gRPC's own words
        free = {"address": "127.0.0.1:0"}
        file = tmp_path / "config.json"
        listeners = {"data": {"address": ready["data"]}, "admin": free, "http": free}
        file.write_text(json.dumps({"listeners": listeners}))
        _, errors = start("serve", "--config", str(file)).communicate()
        assert errors.splitlines()[-1].endswith("with listeners.data.address or --listen [PORT_IN_USE]")
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
        (("--data-directory", "/proc/x"), "the data directory /proc/x cannot be made: "),
        (("--adapters", "nope/adapters"), "--adapters: adapters.serve: nope/adapters is not a folder"),
    ],
)
def test_serve_refuses_a_wrong_configuration(arguments: tuple[str, ...], words: str) -> None:
    """What is wrong with the options is said in one line, and the exit code is 2."""
    process = serve(*arguments)
    _, errors = process.communicate()
    assert process.returncode == 2
    assert words in json.loads(errors.splitlines()[-1])["error"]["message"]


def test_a_file_is_watched_only_if_there_is_one(sidecar: Callable[..., Ended]) -> None:
    ended = sidecar("serve", "--watch-config")
    assert (ended.code, ended.out) == (2, "")
    assert "--watch-config goes with --config" in ended.err
