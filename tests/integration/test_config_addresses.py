"""`sidecar config check` and addresses that stand for one engine and are several."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kit.cli_runs import Ended, runner
from tests.kit.kubernetes_api import write_kubeconfig
from tests.kit.kubernetes_cluster import cluster


async def test_config_check_says_once_what_is_several_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By DNS, with DNS as the way out, where that tells; else by the cluster, with its EndpointSlices; else nothing."""
    sidecar = runner(capfd)
    addresses = {"headless": ["10.1.0.2", "10.1.0.3"], "triton": ["10.96.0.7"], "one": ["10.1.0.1"]}
    _resolve(monkeypatch, addresses)
    async with cluster() as home:
        monkeypatch.setenv("KUBECONFIG", str(write_kubeconfig(tmp_path / "kubeconfig", home.fake.address)))
        for name in ("headless", "triton"):
            spec = {"ports": [{"name": "grpc", "port": 80}]}
            await home.create("services", {"kind": "Service", "metadata": {"name": name}, "spec": spec})
            await home.add_slice(f"{name}-1", name, ["10.1.0.2", "10.1.0.3"])
        by_dns = await _checked(sidecar, tmp_path, "triton://one:80", "triton://headless:80")
        assert (by_dns.code, by_dns.err.count("reach another engine")) == (2, 1)
        assert "backends.1.url: headless has 2 addresses (10.1.0.2, 10.1.0.3)" in by_dns.err
        assert 'write discover: {dns: "headless:80"} and kind in place of url' in by_dns.err
        by_cluster = await _checked(sidecar, tmp_path, "triton://one:80", "triton://triton:80")
        assert (by_cluster.code, by_cluster.err.count("reach another engine")) == (2, 1)
        assert "backends.1.url: triton is a Service with 2 endpoints (10.1.0.2:8001, 10.1.0.3:8001)" in by_cluster.err
        instead = f"{{endpoint_slices: {{service: triton, namespace: {home.namespace}, port: grpc}}}}"
        assert f"write discover: {instead} and kind in place of url" in by_cluster.err
        monkeypatch.delenv("KUBECONFIG")
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        assert (await _checked(sidecar, tmp_path, "triton://one:80", "triton://triton:80")).code == 0


async def _checked(sidecar: Callable[..., Ended], folder: Path, *urls: str) -> Ended:
    """Check a configuration with these engines, in a thread of its own as the command has a loop of its own."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"backends": [{"url": url} for url in urls]}))
    return await asyncio.to_thread(sidecar, "config", "check", str(path))


def _resolve(monkeypatch: pytest.MonkeyPatch, addresses: dict[str, list[str]]) -> None:
    """Have the system's resolver know these hosts besides its own."""
    others = socket.getaddrinfo

    def getaddrinfo(host: str, *more: Any, **options: Any) -> list[Any]:
        if host not in addresses:
            return others(host, *more, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, 0)) for address in addresses[host]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
