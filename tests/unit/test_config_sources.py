"""A file, the environment and options are read as data, merged and checked once; messages name where a fault is."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sidecar import files
from sidecar.cli.serving import resolve
from sidecar.config import parse
from sidecar.errors import Misused

Option = tuple[str, str, Any]
BASE: Option = ("--set base_requests", "base_requests", "allow")
FETCHES: Option = ("--set store.fetches_max", "store.fetches_max", 7)
ANYWHERE = "0.0.0.0:1"
BACKEND = "backends: [{url: 'triton://a:1'}]"


def refusal(file: Path, text: str | bytes, *options: Option) -> str:
    """Return why a configuration is not taken, with FILE for its path."""
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(Misused) as refused:
        resolve(file, options)
    return refused.value.message.replace(str(file), "FILE")


def test_a_pipe_is_read_as_a_file_and_without_a_writer_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(Misused, match="pipe: it is a pipe to which nobody writes"):
        resolve(pipe, ())
    reading, writing = os.pipe()  # as a shell does for <(…)
    os.write(writing, BACKEND.encode())
    os.close(writing)
    assert len(resolve(Path(f"/dev/fd/{reading}"), ()).backends) == 1
    assert len(resolve(Path(f"/dev/fd/{reading}"), ()).backends) == 1, "a pipe gives once what several parts want"
    os.close(reading)


def test_a_pipe_is_waited_for_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell's command may be slow. One that never writes keeps no process from saying why it does not start."""
    slow = subprocess.Popen(["sh", "-c", "sleep 0.2; printf sec; sleep 0.2; printf ret"], stdout=subprocess.PIPE)
    with slow:
        assert slow.stdout is not None
        assert files.read_regular_or_piped(Path(f"/dev/fd/{slow.stdout.fileno()}")) == b"secret"
    monkeypatch.setattr(files, "PIPED_S", 0.05)
    reading, writing = os.pipe()
    with pytest.raises(OSError, match="has no end"):
        files.read_regular_or_piped(Path(f"/dev/fd/{reading}"))
    os.close(reading)
    os.close(writing)


def test_nothing_is_read_without_end(tmp_path: Path) -> None:
    """Neither a device nor a file or pipe that is too large fills the memory."""
    large = tmp_path / "large"
    large.touch()
    os.truncate(large, 1 << 40)
    with subprocess.Popen(["cat", "/dev/zero"], stdout=subprocess.PIPE) as endless:
        assert endless.stdout is not None
        flooded = Path(f"/dev/fd/{endless.stdout.fileno()}")
        for path in (Path("/dev/zero"), large, flooded):
            with pytest.raises(OSError, match="it is larger than 1 MiB"):
                files.read_regular_or_piped(path)
        endless.kill()
    for path in (Path("/dev/zero"), large):
        with pytest.raises(Misused, match=f"configuration {path}: it is larger than 16 MiB"):
            resolve(path, ())


def test_the_null_device_is_an_empty_configuration() -> None:
    assert resolve(Path("/dev/null"), ()) == resolve(None, ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"id: \xff", r"FILE: it cannot be read as YAML: .* invalid start byte"),
        ("[" * 2000, "FILE: it is nested too deeply"),
        ("store: {\n", "FILE: it cannot be read as YAML: line 2, column 1: .*"),
        (f"{BACKEND}\n{BACKEND}", "FILE: .* line 2, column 1: the key backends is written twice, first in line 1"),
        ("backends:\n- url: triton://a:1\n  url: triton://b:1", "FILE: .* line 3, .* the key url is written twice.*"),
        ("legacy_task_ids: {1: a, 0x1: b}", "FILE: .* the key 1 is written twice, first in line 1"),
        ("drain_timeout_s: !!int x", "FILE: it cannot be read as YAML: line 1, column 18: this is no int"),
        ("data_directory: !!binary //8=", "FILE: .* could not determine a constructor for the tag .*binary'"),
        ("store:\n", "FILE: store: it must be keys with their values .it is null."),
        (
            "listeners: {data: '0.0.0.0:9000'}",
            'FILE: listeners.data: it must be keys with their values .it is "0.0.0.0:9000".; '
            'write data: {address: "0.0.0.0:9000"}',
        ),
        ("adapters: ./loras", r'FILE: adapters: .* .it is "./loras".; write adapters: {serve: "./loras"}'),
        ("state: redis://me:pw@r", r'FILE: state: .*; write state: {url: "redis://[^p]*@r"}'),
        ("backends: ['triton://a:1']", r'FILE: backends.0: .*; write - {url: "triton://a:1"}'),
        ("store: much", r'FILE: store: it must be keys with their values \(it is "much"\)'),
        ("store: {memory_bytes: much}", r'FILE: store.memory_bytes: it must be a whole number \(it is "much"\)'),
        ("data_directory: 5", r"FILE: data_directory: it must be text; put it into quotes \(it is 5\)"),
        ("adapters: {roots: ./loras}", r'FILE: adapters.roots: it must be a list \(it is "./loras"\)'),
        ("legacy_task_ids: {x: a}", r'FILE: legacy_task_ids.x as a key: it must be a whole number \(it is "x"\)'),
        ("drain_timeout_s: 0", r"FILE: drain_timeout_s: it must be greater than 0 \(it is 0\)"),
        ("drain_timeout_s: 30s", r'FILE: drain_timeout_s: it must be a number of seconds \(it is "30s"\)'),
        (
            "queue: {classes: {a: {queue_wait_s_max: 5m}}}",
            r"FILE: .*_s_max: it must be a number of seconds.*",
        ),
        ("drain_timeout_s: .inf", r"FILE: drain_timeout_s: it must be a finite number.*"),
        ("queue: {tenant_weights: {a: .nan}}", r"FILE: queue.tenant_weights.a: it must be a finite number.*"),
        ("backends: [{url: 'triton://a:1', progress_timeout_s: .inf}]", "FILE: backends.0.progress_timeout_s: .*"),
        ("backends: [{url: 'triton://a:1', modle: x}]", r"FILE: unknown key backends.0.modle; did you mean model\?"),
        ("backends: [{url: 'triton://a:1', kv_heds: 8}]", r"FILE: unknown key .*; did you mean engine.kv_heads\?"),
        ("memory_byte: 1", r"FILE: unknown key memory_byte; did you mean store.memory_bytes\?"),
        (
            "queue: {classes: {chat: {weight: 3}}}",
            r"FILE: unknown key .*.weight; queue.classes.chat has queue_wait_s_max, patience_s, max_tokens",
        ),
        ("backends: [{url: 'triton://a:1', base_model: {}}]", "FILE: backends.0.base_model.name: Field required"),
        ("1: x", "FILE: unknown key 1"),
        ("tenant_from: certificate", 'FILE: tenant_from: certificate needs listeners.data.tls .* "certificate".'),
    ],
)
@pytest.mark.parametrize("options", [(), (BASE,)])
def test_a_fault_in_the_file_is_blamed_on_the_file(
    text: str | bytes, message: str, options: tuple[Option, ...], tmp_path: Path
) -> None:
    """With options or without: `serve` refuses what `config check` refuses, in the same words."""
    assert re.fullmatch(message, refusal(tmp_path / "f", text, *options))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"BACKENDS__0__URL": "x"}, "LORA_SIDECAR_BACKENDS__0__URL: backends has no keys .* set as a whole"),
        ({"BACKENDS": "triton://a:1"}, 'LORA_SIDECAR_BACKENDS: backends: it must be a list .it is "triton://a:1".'),
        ({"BACKENDS": "[{url: 'x://a:1'}]"}, r"LORA_SIDECAR_BACKENDS: backends.0.url: it must be of the form .*"),
        ({"STORE": "5", "STORE__MEMORY_BYTES": "5"}, "LORA_SIDECAR_STORE__MEMORY_BYTES: store has no keys of its own"),
        ({"LOG_FORMAT": "{"}, "LORA_SIDECAR_LOG_FORMAT: it cannot be read as YAML: line 1, .*"),
        ({"LOG_FORMAT": "@x"}, "LORA_SIDECAR_LOG_FORMAT: it cannot be read as YAML: line 1, .*"),
        ({"LOG_FORMAT": "x"}, "LORA_SIDECAR_LOG_FORMAT: log_format: it must be 'text' or 'json' .*"),
        ({"": "4"}, "LORA_SIDECAR_: it names no key"),
        ({"STORE__": "4"}, "LORA_SIDECAR_STORE__: it names no key"),
    ],
)
def test_a_fault_in_a_variable_is_blamed_on_the_variable(
    variables: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in variables.items():
        monkeypatch.setenv(f"LORA_SIDECAR_{name}", text)
    assert re.fullmatch(message, refusal(tmp_path / "f", BACKEND))


@pytest.mark.parametrize(
    ("text", "option", "message"),
    [
        ("", ("--set .", ".", 4), "--set .: it names no key"),
        ("", ("--set a", "log_format.a", 4), "--set a: log_format: it must be 'text' or 'json' .its keys are a."),
        ("log_format: text", ("--set a", "log_format.a", 4), "--set a: log_format has no keys of its own"),
        ("backends: [{url: 'triton://a:1', id: 5}]", FETCHES, "FILE: backends.0.id: it must be text; .*"),
        ("backends: [{modle: 5}]", ("--backend", "backends", [{"url": "x"}]), "--backend: backends.0.url: .*"),
        ("listeners: {admin: {idle_s: 5}}", ("--admin", "listeners.admin.address", ANYWHERE), "FILE and --admin: .*"),
        ("listeners: {data: {idle_s: 5}}", ("--admin", "listeners.admin.address", ANYWHERE), "--admin: listeners.*"),
        ("stor: {}", ("--set x", "store.x", 1), r"--set x: unknown key store.x; FILE: unknown key stor; .*"),
    ],
)  # fmt: skip
def test_a_fault_is_blamed_on_who_wrote_it(text: str, option: Option, message: str, tmp_path: Path) -> None:
    """One in a section as a whole on all who wrote in it."""
    assert re.fullmatch(message, refusal(tmp_path / "f", text, option))


def test_the_last_that_sets_a_key_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a section that the file leaves empty. A section that two keys share by an alias is set for one."""
    file = tmp_path / "f"
    file.write_text("store:\nlisteners: {data: {tls: &tls {certificate: c, key: k}}, http: {tls: *tls}}\n")
    monkeypatch.setenv("LORA_SIDECAR_STORE__FETCHES_MAX", "5")
    monkeypatch.setenv("LORA_SIDECAR_STORE__MEMORY_BYTES", "5")
    config = resolve(file, [FETCHES, ("--set", "listeners.http.tls.key", "other")])
    assert (config.store.fetches_max, config.store.memory_bytes) == (7, 5)
    assert (config.listeners.data.tls, config.listeners.http.tls) == (
        parse({"state": {"url": "rediss://h", "tls": {"certificate": "c", "key": "k"}}}, "").state.tls,
        parse({"state": {"url": "rediss://h", "tls": {"certificate": "c", "key": "other"}}}, "").state.tls,
    )


@pytest.mark.parametrize("options", [(), (FETCHES,)])
def test_dates_are_text_and_merged_keys_are_no_duplicates(options: tuple[Option, ...], tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_text(
        "backends:\n- &a {url: 'triton://a:1', id: 2020-01-01, load_timeout_s: 5}\n"
        "- &b {<<: *a, url: 'triton://b:1', id: b}\n- {<<: *b, url: 'triton://c:1', id: c}\n"
    )
    ids = [(entry["id"], entry["load_timeout_s"]) for entry in resolve(file, options).backends]
    assert ids == [("2020-01-01", 5), ("b", 5), ("c", 5)]


@pytest.mark.parametrize(
    ("record", "shown"),
    [
        ({"listeners": {"data": {"tls": ["hunter2"]}}}, ""),
        ({"listeners": {"data": {"tls": "-----BEGIN PRIVATE KEY-----hunter2" * 5}}}, ""),
        ({"listeners": {"data": {"tls": {"key": 2222, "ca": "hunter2"}}}}, ""),
        ({"listeners": {"admin": {"token_file": 2222}}}, ""),
        ({"state": {"tls": {"key": "hunter2"}}}, "(its keys are tls)"),
        ({"state": {"url": "redis://hunter2@", "password": "hunter2"}}, 'it is "redis://(hidden)@"'),
        ({"log_format": {"hidden": "hunter2"}}, "(its keys are hidden)"),
        ({"log_format": "jsn"}, '(it is "jsn")'),
    ],
)
def test_messages_show_no_secrets(record: dict[str, Any], shown: str) -> None:
    """Of sections the keys only, and no value of a key that holds a secret."""
    with pytest.raises(Misused) as refused:
        parse(record, "the test")
    assert shown in refused.value.message
    assert "hunter2" not in refused.value.message
    assert "2222" not in refused.value.message


@pytest.mark.parametrize("listener", ["data", "admin", "http", "probes", "drain"])
@pytest.mark.parametrize(
    "address", ["127.0.0.1", "9000", ":9000", "127.0.0.1:99999", "127.0.0.1:-1", "http://a:1", "::1:9000"]
)
def test_addresses_of_listeners_that_are_none(listener: str, address: str) -> None:
    """gRPC would take them and listen elsewhere: at 443, at a port of 65,536 less, at all addresses."""
    with pytest.raises(Misused, match=rf"listeners\.{listener}\.address: it must be HOST:PORT"):
        parse({"listeners": {listener: {"address": address}}}, "the test")


@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:9000", "localhost:9000"])
def test_addresses_of_listeners(address: str) -> None:
    assert parse({"listeners": {"admin": {"address": address}}}, "the test").listeners.admin.address == address


def test_a_policy_that_is_unknown_is_told_with_its_key() -> None:
    with pytest.raises(Misused, match=r'the test: queue\.ordering: no ordering policy is called "fifoo"; there are '):
        parse({"queue": {"ordering": "fifoo"}}, "the test")


def test_only_this_machine_comes_in_unless_the_configuration_says_more() -> None:
    listeners = parse({}, "the test").listeners
    addresses = {name: getattr(listeners, name).address for name in ("data", "admin", "http", "probes", "drain")}
    assert addresses == {
        "data": "127.0.0.1:9000", "admin": "127.0.0.1:9001", "http": "127.0.0.1:9002", "probes": None, "drain": None,
    }  # fmt: skip
    assert listeners.endpoint_picker.address is None
