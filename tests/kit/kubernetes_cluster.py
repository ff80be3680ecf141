"""A cluster for tests: a fake API server's, or a namespace of a real one if KUBECONFIG names it.

The chart's accounts and Roles are there; `Cluster.kubeconfig` is what a process with such an account has.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from secrets import token_hex
from typing import Any

import httpx
import pytest
import yaml

from sidecar.kubernetes.access import Access, from_kubeconfig
from sidecar.kubernetes.api import Collection
from sidecar.kubernetes.declarations import ADAPTERS_LABEL, loras_in
from sidecar.kubernetes.endpoint_slices import SERVICE_LABEL
from tests.kit.kubernetes_api import FakeServer, fake_server, write_kubeconfig
from tests.kit.kubernetes_rules import ACCOUNT, CRD, ROLES, Object

REAL = os.environ.get("KUBECONFIG", "")
"""An administrator's kubeconfig; tests set the variable to that of an account."""


@dataclass
class Cluster:
    """One namespace, written to as kubectl would. `server` is the fake one, for injecting faults."""

    access: Access
    client: httpx.AsyncClient
    server: FakeServer | None = None

    @property
    def namespace(self) -> str:
        return self.access.namespace

    @property
    def fake(self) -> FakeServer:
        assert self.server is not None
        return self.server

    def collection(self, plural: str) -> Collection:
        if plural == "loraadapters":
            return loras_in(self.namespace)
        if plural in ("endpointslices", "events"):
            group = "discovery.k8s.io" if plural == "endpointslices" else "events.k8s.io"
            return Collection(group, "v1", plural, self.namespace)
        return Collection("", "v1", plural, self.namespace)

    async def create(self, plural: str, made: Object) -> Object:
        return await self._ask("POST", self.collection(plural).path, made)

    async def get(self, plural: str, name: str) -> Object:
        return await self._ask("GET", f"{self.collection(plural).path}/{name}")

    async def list(self, plural: str) -> list[Object]:
        found: list[Object] = (await self._ask("GET", self.collection(plural).path))["items"]
        return found

    async def patch(self, plural: str, name: str, patch: Object) -> Object:
        return await self._ask("PATCH", f"{self.collection(plural).path}/{name}", patch)

    async def delete(self, plural: str, name: str) -> None:
        await self._ask("DELETE", f"{self.collection(plural).path}/{name}")

    async def _ask(self, method: str, path: str, body: Object | None = None) -> Object:
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        answer = await self.client.request(method, path, json=body, headers={"content-type": kind})
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
        found: Object = answer.json()
        return found

    async def kubeconfig(self, folder: Path, account: str = ACCOUNT) -> Path:
        """Write the kubeconfig of one of the chart's accounts and return where."""
        path, token, place = folder / "kubeconfig", account, {"server": self.access.url}
        if self.server is None:
            asked = f"/api/v1/namespaces/{self.namespace}/serviceaccounts/{account}/token"
            token = (await self._ask("POST", asked, {"spec": {"expirationSeconds": 3600}}))["status"]["token"]
            place = _place()
        return write_kubeconfig(path, place, self.namespace, token)

    # What is made most.

    async def add_slice(self, name: str, service: str, addresses: list[str], **fields: Any) -> Object:
        """Create an EndpointSlice with a ready endpoint for each address; the default port is `grpc` 8001."""
        made: Object = {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": name, "labels": {SERVICE_LABEL: service}},
            "addressType": "IPv4",
            "ports": [{"name": "grpc", "port": 8001, "protocol": "TCP"}],
            "endpoints": [{"addresses": [address]} for address in addresses],
        }
        return await self.create("endpointslices", made | fields)

    async def declare(self, name: str, source: Path | str, /, **spec: Any) -> Object:
        """Create a LoraAdapter."""
        made = {
            "apiVersion": "lora-sidecar.io/v1alpha1",
            "kind": "LoraAdapter",
            "metadata": {"name": name},
            "spec": {"source": str(source)} | spec,
        }
        return await self.create("loraadapters", made)

    async def declare_in_map(self, name: str, entries: Any) -> Object:
        """Create a ConfigMap with declarations, given as entries or as text."""
        text = entries if isinstance(entries, str) else yaml.safe_dump(entries)
        label, _, value = ADAPTERS_LABEL.partition("=")
        metadata = {"name": name, "labels": {label: value}}
        made = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"adapters.yaml": text}}
        return await self.create("configmaps", made)

    async def reasons(self) -> list[str]:
        """Return the reasons of all events, in the order in which they came."""
        return [event["reason"] for event in sorted(await self.list("events"), key=lambda event: event["eventTime"])]

    async def tells(self, *reasons: str) -> None:
        """Wait until there is an event for each of these reasons; fail if there are others."""
        async with asyncio.timeout(60):
            while len(found := await self.reasons()) < len(reasons):
                await asyncio.sleep(0.02)
        assert sorted(found) == sorted(reasons)


@asynccontextmanager
async def cluster(kind: str = "fake", **fields: Any) -> AsyncIterator[Cluster]:
    """Yield a cluster for the length of a block; `fields` are the fake server's."""
    if kind == "fake":
        async with fake_server(**fields) as server, client_of(server.access) as client:
            yield Cluster(server.access, client, server)
        return
    access = replace(from_kubeconfig(Path(REAL)), namespace=f"lora-sidecar-test-{token_hex(4)}")
    async with client_of(access) as client:
        made = Cluster(access, client)
        await _define(client)
        await made._ask("POST", "/api/v1/namespaces", {"metadata": {"name": made.namespace}})
        for found in yaml.safe_load_all(ROLES.read_text().replace("namespace: ml", f"namespace: {made.namespace}")):
            root = "/api/v1" if found["apiVersion"] == "v1" else f"/apis/{found['apiVersion']}"
            await made._ask("POST", f"{root}/namespaces/{made.namespace}/{found['kind'].lower()}s", found)
        try:
            yield made
        finally:
            await made._ask("DELETE", f"/api/v1/namespaces/{made.namespace}")


def _place() -> Object:
    """Return what the administrator's kubeconfig says of its cluster."""
    place: Object = yaml.safe_load(Path(REAL).read_text())["clusters"][0]["cluster"]
    if "certificate-authority" in place:
        place["certificate-authority"] = str(Path(REAL).parent / place["certificate-authority"])
    return place


async def _define(client: httpx.AsyncClient) -> None:
    """Install LoraAdapter's definition, unless it is there, and wait until its objects are served."""
    definition = yaml.safe_load(CRD.read_text())
    answer = await client.post("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", json=definition)
    assert answer.status_code in (201, 409), answer.text
    async with asyncio.timeout(60):
        while not (await client.get(loras_in("default").path)).is_success:
            await asyncio.sleep(0.2)


def client_of(access: Access) -> httpx.AsyncClient:
    """Return a client that may do what its access permits."""
    token = access.token()
    headers = {"authorization": f"Bearer {token}"} if token else {}
    tls = access.tls or True
    return httpx.AsyncClient(base_url=access.url, headers=headers, verify=tls, trust_env=False, timeout=30.0)


needs_faults = pytest.mark.parametrize("kind", ["fake"])
"""The mark of a test that injects faults into the server."""
_REAL = pytest.param("real", marks=pytest.mark.real_cluster)
on_clusters = pytest.mark.parametrize("kind", ["fake", *([_REAL] if REAL else [])])
"""The mark of a test that also runs against a real cluster, if there is one."""
on_a_real_cluster = pytest.mark.parametrize("kind", [_REAL])
"""The mark of a test that `make e2e-kubernetes` runs."""
