"""Thousands of connections that said one byte each took the clients' port, and with it liveness: the pod was killed."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from sidecar.cli.serving import open_files_for
from sidecar.config import parse
from sidecar.errors import Misused
from sidecar.fronts.http.connection import SPARE_CONNECTIONS
from sidecar.serve.app import Sidecar
from tests.integration.test_incident import command
from tests.kit.authority import NEEDS_OPENSSL, Authority
from tests.kit.emulated import running_engine
from tests.kit.serving import Serving, serving, write_adapters

FREE: dict[str, Any] = {"address": "127.0.0.1:0"}
CLIENTS, PROBES = 8, 2
PATHS = ("/livez", "/readyz", "/metrics", "/metrics/model-server")


@asynccontextmanager
async def served_here(folder: Path, http: dict[str, Any], probes: dict[str, Any]) -> AsyncIterator[Serving]:
    write_adapters(folder / "adapters", 1)
    listeners = {"data": FREE, "admin": FREE, "http": FREE | http, "probes": FREE | probes}
    async with (
        running_engine(compute="none", shape="tiny") as engine,
        serving([engine], folder / "adapters", listeners=listeners) as served,
    ):
        yield served


async def drip(stack: AsyncExitStack, address: str, count: int) -> list[asyncio.StreamReader]:
    """Open connections that say a byte each and stay; return them once the last has been taken or closed."""
    host, _, port = address.rpartition(":")
    readers = []
    for _ in range(count):
        reader, writer = await asyncio.open_connection(host, int(port))
        stack.callback(writer.close)
        writer.write(b"G")
        readers.append(reader)
    return readers


async def get(address: str, path: str) -> httpx.Response:
    """Ask on a connection of its own, as the kubelet does."""
    async with httpx.AsyncClient(base_url=f"http://{address}", trust_env=False, timeout=60) as client:
        return await client.get(path)


async def test_as_many_connections_of_clients_as_there_may_be(tmp_path: Path) -> None:
    """At the clients' listener who comes takes the place of the oldest; the process is alive, ready and measured."""
    async with (
        served_here(tmp_path, {"connections_max": CLIENTS}, {}) as served,
        AsyncExitStack() as stack,
    ):
        http = served.sidecar.http_address
        readers = await drip(stack, http, CLIENTS + SPARE_CONNECTIONS)
        assert (await get(http, "/livez")).status_code == 200
        assert await readers[0].read() == b""
        assert not any(reader.at_eof() for reader in readers[1:])
        answers = {path: await get(served.sidecar.listening.probes, path) for path in PATHS}
    assert {path: answer.status_code for path, answer in answers.items()} == dict.fromkeys(PATHS, 200)
    assert "lora_sidecar_open_calls" in answers["/metrics"].text
    assert {answer.headers["connection"] for answer in answers.values()} == {"close"}


async def test_as_many_connections_as_there_may_be_of_probes(tmp_path: Path) -> None:
    """Whoever comes takes the place of who has been silent for longest, and keeps no connection after its answer."""
    async with served_here(tmp_path, {}, {"connections_max": PROBES}) as served, AsyncExitStack() as stack:
        address = served.sidecar.listening.probes
        readers = await drip(stack, address, PROBES + SPARE_CONNECTIONS)
        assert (await get(address, "/livez")).status_code == 200
        assert await readers[0].read() == b""
        assert not any(reader.at_eof() for reader in readers[1:])


async def test_what_is_not_a_probe(tmp_path: Path) -> None:
    """No other path, no other method, no body: whoever is let in for these gets these."""
    async with (
        served_here(tmp_path, {}, {}) as served,
        httpx.AsyncClient(base_url=f"http://{served.sidecar.listening.probes}", trust_env=False) as client,
    ):
        for path in ("/v1/models", "/v1/completions", "/drain", "/"):
            assert (await client.get(path)).status_code == 404
        for path in PATHS:
            assert (await client.post(path)).status_code == 405


async def test_the_old_paths(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They stay for one release, the log says so once, and `probes: false` takes them from where clients are."""
    caplog.set_level(logging.WARNING)
    async with served_here(tmp_path, {}, {}) as served:
        for path in PATHS * 2:
            assert (await get(served.sidecar.http_address, path)).status_code == 200
        await get(served.sidecar.listening.probes, "/livez")
    assert sum("listeners.probes.address" in record.getMessage() for record in caplog.records) == 1
    async with served_here(tmp_path / "without", {"probes": False}, {}) as served:
        for path in PATHS:
            answer = await get(served.sidecar.http_address, path)
            assert answer.status_code == 404
            assert answer.json()["error"]["message"] == f"{path} has moved to the address of listeners.probes"
            assert (await get(served.sidecar.listening.probes, path)).status_code == 200


@NEEDS_OPENSSL
async def test_probes_by_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    await authority.found()
    key, certificate = await authority.sign("server", "IP:127.0.0.1")
    tls = {"certificate": str(certificate), "key": str(key)}
    async with served_here(tmp_path, {}, {"tls": tls}) as served:
        context = ssl.create_default_context(cafile=str(authority.ca))
        async with httpx.AsyncClient(verify=context, trust_env=False) as client:
            assert (await client.get(f"https://{served.sidecar.listening.probes}/livez")).text == "ok\n"


async def test_a_port_that_is_taken(tmp_path: Path) -> None:
    """Says which listener and which setting."""
    async with served_here(tmp_path, {}, {}) as served:
        taken = {"address": served.sidecar.listening.probes}
        listeners = {"data": FREE, "admin": FREE, "http": FREE, "probes": taken}
        with pytest.raises(Misused, match=r"the probes listener cannot have .*listeners\.probes\.address"):
            await Sidecar.start(parse({"listeners": listeners}, "the test"))


async def test_an_incident_finds_them(tmp_path: Path) -> None:
    """What captures one asks the listener that the configuration names for metrics, not the clients'."""
    async with served_here(tmp_path, {"probes": False}, {}) as served:
        listeners = {"http": {"address": served.sidecar.http_address}}
        listeners["probes"] = {"address": served.sidecar.listening.probes}
        (tmp_path / "config.yaml").write_text(json.dumps({"listeners": listeners}))
        out = tmp_path / "incident.tgz"
        manifest = await command("debug", "capture", "--config", str(tmp_path / "config.yaml"), "-o", str(out))
    assert {"metrics.txt", "readiness.txt"} <= {each["file"] for each in manifest["files"]}


async def test_more_connections_than_a_shell_lets_a_process_open(tmp_path: Path) -> None:
    """A soft limit of 128 files, as systems set it low, is no limit for liveness: the process raises it by itself."""
    free = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--http", "127.0.0.1:0", "--probes", "127.0.0.1:0")
    serve = (sys.executable, "-m", "sidecar", "serve", "--json", *free)
    process = await asyncio.create_subprocess_exec(
        "sh", "-c", 'ulimit -Sn 128; exec "$@"', "sh", *serve,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        ready = json.loads(await process.stdout.readline())
        async with AsyncExitStack() as stack:
            await drip(stack, ready["http"], 300)
            assert (await get(ready["probes"], "/livez")).status_code == 200
    finally:
        process.kill()
        await process.wait()
        process._transport.close()  # type: ignore[attr-defined]


def test_too_few_files_for_the_connections(caplog: pytest.LogCaptureFixture) -> None:
    """Where the hard limit is below what the listeners may take, the log says which numbers."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        open_files_for(parse({"listeners": {"http": {"connections_max": hard}}}, "the test"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    [record] = caplog.records
    assert f"may open {hard} files" in record.getMessage()
    assert "connections_max" in record.getMessage()
