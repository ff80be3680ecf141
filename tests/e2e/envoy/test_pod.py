"""A pod with Envoy and a sidecar, as the kubelet probes and ends it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from sidecar.fronts.extproc.bootstrap import bootstrap
from tests.e2e.envoy.house import house
from tests.e2e.envoy.server import EnvoyInstalled, EnvoyServer
from tests.e2e.envoy.variants import Change
from tests.kit.authority import Authority
from tests.kit.ports import free_port
from tests.kit.serving import serving, until, write_adapters
from tests.kit.vllm_emulated import VllmProcess

TOKENS = 200
SLOWNESS = 1.0


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
@pytest.mark.parametrize("address", ["127.0.0.1:9004", "[::]:9004"])
def test_what_the_pods_init_container_writes(tmp_path: Path, host: str, address: str) -> None:
    """Envoy takes the configuration that the chart has the sidecar's image write."""
    file = tmp_path / "config.yaml"
    file.write_text(f"listeners: {{endpoint_picker: {{address: '{address}'}}}}\n")
    options = ["--port", "8080", "--admin-port", "9901", "--ready-port", "9902", "--host", host]
    command = [sys.executable, "-m", "sidecar", "envoy", "config", str(file), *options]
    (tmp_path / "envoy.yaml").write_text(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    envoy = [str(EnvoyInstalled.find().binary), "--mode", "validate", "-c", str(tmp_path / "envoy.yaml")]
    checked = subprocess.run(envoy, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def with_probes(port: int) -> Change:
    """Return what has an Envoy listen for probes."""

    def change(record: dict[str, Any]) -> None:
        admin = record["admin"]["address"]["socket_address"]["port_value"]
        own = bootstrap(1, ["127.0.0.1:1"], admin_port=admin, host="127.0.0.1", ready_port=port)["static_resources"]
        for part, name in (("listeners", "ready"), ("clusters", "admin")):
            record["static_resources"][part] += [each for each in own[part] if each["name"] == name]

    return change


def with_ca(ca: Path) -> Change:
    """Return what has an Envoy ask a picker with TLS."""

    def change(record: dict[str, Any]) -> None:
        own = bootstrap(1, ["127.0.0.1:1"], picker_ca=str(ca))["static_resources"]["clusters"]
        [secured] = [each for each in own if each["name"] == "sidecar"]
        for cluster in record["static_resources"]["clusters"]:
            if cluster["name"] == "sidecar":
                cluster["transport_socket"] = secured["transport_socket"]

    return change


async def test_the_pods_end(tmp_path: Path) -> None:
    """The preStop hook takes Envoy out; answers under way end whole, the drain waits for them, and refuses new ones.

    Envoy itself is stopped once the sidecar has ended.
    """
    [name] = write_adapters(tmp_path / "adapters", 1)
    port = free_port()
    async with house(tmp_path, [name], time_scale=SLOWNESS, changed=with_probes(port)) as running:
        probes, admin = f"http://127.0.0.1:{port}", f"http://{running.envoy.admin}"
        client = running.http
        assert [(await client.get(f"{probes}/{path}")).status_code for path in ("ready", "live", "stats")] == [
            200, 200, 404
        ]  # fmt: skip
        under_way = asyncio.create_task(running.stream(name, TOKENS))
        await until(lambda: any(backend.running for backend in running.served.state.backends.values()))

        assert (await client.post(f"{admin}/healthcheck/fail")).status_code == 200
        assert [(await client.get(f"{probes}/{path}")).status_code for path in ("ready", "live")] == [503, 200]
        late = await client.get("/v1/models")
        assert (late.status_code, late.headers["connection"]) == (200, "close")

        draining = asyncio.create_task(running.served.sidecar.drain())
        await until(lambda: running.served.state.draining)
        refused = await running.stream(name, 4)
        assert refused.status == 503, refused.raw
        assert not draining.done()
        assert not under_way.done()

        answer = await under_way
        assert (answer.status, answer.is_complete) == (200, True)
        assert answer.token_ids == running.tokens_of(name, TOKENS)
        await draining
        assert not running.served.state.requests


async def test_a_picker_with_tls(tmp_path: Path) -> None:
    """Envoy in the pod knows a picker by the CA that gateways know it by, though it asks at 127.0.0.1."""
    authority = Authority(tmp_path)
    stranger = Authority(tmp_path / "stranger")
    stranger.folder.mkdir()
    await authority.found()
    await stranger.found()
    key, certificate = await authority.sign("picker", "DNS:pool-lora-sidecar-picker.models.svc.cluster.local")
    free = {"address": "127.0.0.1:0"}
    tls = {"certificate": str(certificate), "key": str(key)}
    listeners = {"data": free, "admin": free, "http": free, "endpoint_picker": {**free, "tls": tls}}
    async with VllmProcess("--compute", "none") as engine:
        backend = {"adapters_dir": str(tmp_path)}
        async with serving([engine], listeners=listeners, backend=backend) as served:
            address = served.sidecar.endpoint_picker_address
            for ca, status in ((authority.ca, 200), (stranger.ca, 503)):
                envoy = EnvoyServer(tmp_path / f"envoy-{status}", address, changed=with_ca(ca))
                async with envoy, httpx.AsyncClient(trust_env=False) as http:
                    assert (await http.get(f"http://{envoy.address}/v1/models")).status_code == status
