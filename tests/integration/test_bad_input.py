"""Bad input of every kind to a running sidecar: its own message each, serving goes on, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from sidecar.config import parse
from sidecar.errors import Misused, Reason
from sidecar.proto import admin_pb2
from sidecar.serve.app import Sidecar
from sidecar.serve.peers_only import names_in
from tests.kit.authority import NEEDS_OPENSSL, Authority
from tests.kit.emulated import running_engine
from tests.kit.forked import python
from tests.kit.peft_files import write_adapter, write_raw_safetensors
from tests.kit.serving import PATIENCE_S, Serving, serving, until, write_adapters

DUMMY = {"compute": "none", "shape": "tiny"}


def spoil_header(path: Path) -> None:
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(struct.pack("<Q", 1 << 63) + weights.read_bytes()[8:])


def truncate(path: Path) -> None:
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def lie(path: Path) -> None:
    """Say that the first tensor is twice as large as its bytes."""
    weights = path / "adapter_model.safetensors"
    data = weights.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    name = next(name for name in header if name != "__metadata__")
    header[name]["shape"][0] *= 2
    write_raw_safetensors(weights, json.dumps(header).encode(), data[8 + size :])


def without_fields(path: Path) -> None:
    (path / "adapter_config.json").write_text("{}")


def without_weights(path: Path) -> None:
    (path / "adapter_model.safetensors").unlink()


WRONG: dict[str, tuple[dict[str, Any], Callable[[Path], None] | None, str]] = {
    "another base": ({"base_model_name_or_path": "other/base"}, None, 'trained on "other/base"'),
    "rank above the engine's": ({"rank": 65, "alpha": 65}, None, "its rank is 65"),
    "wrong dims": ({"shape": type("Wide", (), {"hidden": 128, "layers": 2, "heads": 8, "kv_heads": 2, "head_size": 16,
                                               "ffn": 160})}, None, "a model of another shape"),
    "nan": ({"extra_tensors": {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight":
                               np.full((8, 64), np.nan, np.float32)}}, None, "q_proj.lora_A.weight"),
    "truncated": ({}, truncate, "adapter_model.safetensors"),
    "lying header": ({}, lie, "bytes"),
    "header of 2^63 bytes": ({}, spoil_header, "header"),
    "no fields": ({}, without_fields, "adapter_config.json"),
    "no weights": ({}, without_weights, "adapter_model.safetensors"),
    "r disagrees": ({"r": 4}, None, "rank"),
    "dora": ({"use_dora": True}, None, "DoRA"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, None, "modules_to_save"),
    "biases": ({"bias": "all"}, None, "bias"),
    "larger than the store": ({"rank": 64, "alpha": 64, "modules": ("gate_proj", "up_proj", "down_proj")}, None,
                              "the host store holds"),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(WRONG))
async def test_an_adapter_that_cannot_be_right_is_refused(kind: str, tmp_path: Path) -> None:
    """Its message names the adapter and the reason; the name stays unknown and the sidecar serves on."""
    options, spoil, words = WRONG[kind]
    good = tmp_path / "good"
    write_adapters(good, 1)
    bad = write_adapter(tmp_path / "roots" / "bad", **options)
    if spoil is not None:
        spoil(bad)
    async with running_engine(**DUMMY, write_engine_config=tmp_path / "config.json") as engine:
        facts = {"config": str(tmp_path / "config.json")}
        backend = {"engine": facts, "base_model": "tiny-llama"}
        async with serving([engine], good, [tmp_path], backend=backend, store={"memory_bytes": 150_000}) as served:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await served.adapters.Register(admin_pb2.RegisterRequest(name="bad", path=str(bad)))
            details = caught.value.details() or ""
            assert "bad" in details
            assert words in details
            await serves_on(served)
            assert "bad" not in served.state.names
            assert len(served.state.versions) == 1


async def serves_on(served: Serving) -> None:
    assert (await served.ask("a00", 3)).tokens == served.expected("a00", 3)


async def test_names_paths_and_prompts(tmp_path: Path) -> None:
    """Empty, huge and taken names, a path outside the roots, a prompt that is too long, an unknown class."""
    good = tmp_path / "good"
    write_adapters(good, 1)
    inside, outside = write_adapter(tmp_path / "roots" / "x", seed=3), write_adapter(tmp_path / "other" / "y", seed=4)
    async with (
        running_engine(**DUMMY, max_input_tokens=64, write_engine_config=tmp_path / "config.json") as engine,
        serving(
            [engine], good, [tmp_path / "roots"], backend={"engine": {"config": str(tmp_path / "config.json")}}
        ) as served,
    ):
        for name, path, words in (
            ("", inside, "name"),
            ("x" * 1_000_000, inside, "x" * 40),
            ("a00", inside, "a00 is managed by config and would be set back"),
            ("y", outside, "outside the allowed roots"),
            ("z", tmp_path / "roots" / ".." / "other" / "y", "outside the allowed roots"),
            ("z", tmp_path / "roots" / "missing", "missing"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await served.adapters.Register(admin_pb2.RegisterRequest(name=name, path=str(path)))
            assert words in (caught.value.details() or "")
            assert len(caught.value.details() or "") < 2000
        for adapter, fields, words in (
            ("x" * 1_000_000, {}, "has 1000000 characters"),
            ("a00", {"prompt": 65}, "the prompt has 65 tokens and the engine takes at most 64"),
            ("a00", {"class": "gold"}, 'unknown class "gold"; the configuration has default'),
            ("a00@v2", {}, 'has no version "v2"; it has v1'),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await served.ask(adapter, **fields)
            assert words in (caught.value.details() or "")
        await serves_on(served)
        assert list(served.state.names) == ["a00"]


@pytest.mark.parametrize("called", ["trt-0", ""])
async def test_a_backend_that_is_not_there(called: str) -> None:
    """It is said which address does not answer, once: the backend's id is its address unless it has another."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        free = {"address": "127.0.0.1:0"}
        address = f"127.0.0.1:{held.getsockname()[1]}"
        record = {
            "backends": [{"url": f"triton://{address}", "id": called or address}],
            "listeners": {"data": free, "admin": free, "http": free},
        }
        sidecar = await Sidecar.start(parse(record, "the test"))
        try:
            await until(lambda: "does not answer" in sidecar.gateway.backends[called or address].detail())
            told = f"{called or address}: {sidecar.gateway.backends[called or address].detail()}"
            assert (told.count(address), "Connection refused" in told) == (1, True)
        finally:
            await sidecar.stop()


async def test_a_port_in_use_names_the_port_and_the_key() -> None:
    """Nothing is left behind: the next start on a free port works."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        address = f"127.0.0.1:{held.getsockname()[1]}"
        free = {"address": "127.0.0.1:0"}
        for listener in ("data", "admin", "http"):
            listeners = {"data": free, "admin": free, "http": free} | {listener: {"address": address}}
            with pytest.raises(Misused) as caught:
                await Sidecar.start(parse({"listeners": listeners}, "the test"))
            assert caught.value.reason is Reason.PORT_IN_USE
            assert address in caught.value.message
            assert f"listeners.{listener}.address" in caught.value.message


async def test_a_data_directory_in_use_names_the_process(tmp_path: Path) -> None:
    """Exit 3, the pid and the path."""
    free = {"address": "127.0.0.1:0"}
    record = {"listeners": {"data": free, "admin": free, "http": free}, "data_directory": str(tmp_path)}
    sidecar = await Sidecar.start(parse(record, "the test"))
    try:
        process = await python(
            "-m", "sidecar", "serve", "--data-directory", str(tmp_path), "--listen", "127.0.0.1:0", "--admin",
            "127.0.0.1:0", "--http", "127.0.0.1:0", stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        _, error = await process.communicate()
        assert process.returncode == 3
        (holder,) = (tmp_path / "lock").read_text().split()
        assert holder in error.decode()
        assert tmp_path.name in error.decode()
    finally:
        await sidecar.stop()


async def test_an_open_admin_listener_is_refused() -> None:
    """Reachable from other machines and unprotected: it says the three ways out."""
    listeners = {"admin": {"address": "0.0.0.0:0"}, "data": {"address": "127.0.0.1:0"}}
    with pytest.raises(Misused, match="token_file"):
        await Sidecar.start(parse({"listeners": listeners}, "the test"))


LOCAL: dict[str, Any] = {"address": "127.0.0.1:0"}
UNREACHED = "127.0.0.1:1"
PLACES = (
    *(f"listeners.{name}" for name in ("data", "admin", "http", "probes")),
    *(f"backends.{kind}" for kind in ("triton", "vllm")),
    "state.redis",
)
"""What has PEM files."""


def secured(place: str, tls: dict[str, str]) -> dict[str, Any]:
    """Return a configuration with these PEM files in a place."""
    section, name = place.split(".")
    if section == "listeners":
        return {"listeners": {name: LOCAL | {"tls": tls}}}
    if section == "backends":
        return {"backends": [{"url": f"{name}://{UNREACHED}", "tls": tls}]}
    return {"state": {"url": f"rediss://{UNREACHED}", "tls": tls}}


FILES: dict[str, Callable[[str], dict[str, Any]]] = {
    "state.password_file": lambda path: {"state": {"url": f"redis://{UNREACHED}", "password_file": path}},
    "listeners.admin.token_file": lambda path: {"listeners": {"admin": LOCAL | {"token_file": path}}},
    "backends.api_key_file": lambda path: {"backends": [{"url": f"vllm://{UNREACHED}", "api_key_file": path}]},
    "backends.engine.config": lambda path: {"backends": [{"url": f"triton://{UNREACHED}", "engine": {"config": path}}]},
    "backends.base_model.config": lambda path: {
        "backends": [{"url": f"triton://{UNREACHED}", "base_model": {"name": "base", "config": path}}]
    },
    "backends.base_model.tokenizer": lambda path: {
        "backends": [{"url": f"triton://{UNREACHED}", "base_model": {"name": "base", "tokenizer": path}}]
    },
}


async def _refused(record: dict[str, Any], path: str) -> None:
    """Check that a start fails, within a time, because of a file."""
    record["listeners"] = dict.fromkeys(("data", "admin", "http"), LOCAL) | record.get("listeners", {})
    with (
        pytest.raises(Misused, match=f"{path}.*it is (no file|a pipe to which nobody writes|larger than)") as refused,
        alarm(),
    ):
        await Sidecar.start(parse(record, "the test"))
    assert refused.value.reason is Reason.CONFIG_INVALID


@contextmanager
def alarm() -> Iterator[None]:
    """Fail after a time, also while a call holds the event loop."""

    def end(*_: object) -> None:
        pytest.fail("the start waits for a file")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@NEEDS_OPENSSL
@pytest.mark.parametrize("pem", ["certificate", "key", "ca"])
@pytest.mark.parametrize("place", PLACES)
async def test_a_pipe_in_place_of_a_pem_file_ends_the_start(place: str, pem: str, tmp_path: Path) -> None:
    """Nobody writes to it: a start that waits for that tells nobody what is wrong."""
    authority = Authority(tmp_path)
    await authority.found()
    key, certificate = await authority.sign("sidecar")
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    files = {"certificate": str(certificate), "key": str(key), "ca": str(authority.ca)}
    await _refused(secured(place, files | {pem: pipe}), pipe)


@pytest.mark.parametrize("key", FILES)
@pytest.mark.parametrize("kind", ["pipe", "device"])
async def test_a_pipe_or_a_device_in_place_of_another_file_ends_the_start(key: str, kind: str, tmp_path: Path) -> None:
    """At once, also while what it is for cannot be reached."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    await _refused(
        FILES[key](str(path) if kind == "pipe" else "/dev/zero"), str(path) if kind == "pipe" else "/dev/zero"
    )


def test_a_pipe_in_place_of_the_replicas_certificate(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Misused, match=r"replicas\.tls\.certificate: .*pipe: it is no file"), alarm():
        names_in(tmp_path / "pipe")
