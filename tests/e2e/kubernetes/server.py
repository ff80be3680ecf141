"""A real Kubernetes API server in front of an etcd of its own; nothing else of a cluster runs."""

from __future__ import annotations

import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import yaml

from sidecar.kubernetes.access import from_kubeconfig
from tests.e2e.installed import Installed, NotInstalled
from tests.e2e.kubernetes import guard
from tests.e2e.server import Server
from tests.kit.authority import Authority, openssl
from tests.kit.kubernetes_cluster import client_of

SLICES_GROUP = "discovery.k8s.io"
SLICES = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {
        "name": f"endpointslices.{SLICES_GROUP}",
        "annotations": {"api-approved.kubernetes.io": "https://github.com/kubernetes/enhancements/pull/752"},
    },
    "spec": {
        "group": SLICES_GROUP,
        "scope": "Namespaced",
        "names": {"kind": "EndpointSlice", "plural": "endpointslices"},
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
            }
        ],
    },
}
"""What this server is too old to have: slices of v1. They are not checked."""


class KubernetesInstalled(Installed):
    """The folder that holds kube-apiserver and etcd."""

    FOLDER, VARIABLE = ".venv-kubernetes", "KUBERNETES_VENV"

    def binary(self, name: str) -> str:
        return str(self.venv / "bin" / name)

    def _check(self) -> None:
        missing = [name for name in ("etcd", "kube-apiserver") if not Path(self.binary(name)).exists()]
        if missing:
            raise NotInstalled(
                f"no {' and no '.join(missing)} in {self.venv}: make {self.FOLDER}, or set {self.VARIABLE}"
            )


class _Part(Server):
    NOISE = re.compile(r"^I|\bI \|")
    START_S = 120.0
    GUARD = guard

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, None)
        self.installed = KubernetesInstalled.find()

    @property
    def _mark(self) -> str:
        return str(self.folder / "data")

    def _prepare(self) -> Path:
        return self.folder

    def _environment(self) -> dict[str, str]:
        return self.installed.environment()


class Etcd(_Part):
    """One etcd; its data goes with it."""

    NAME, PORTS = "etcd", 2

    @property
    def url(self) -> str:
        return f"http://{self._address(0)}"

    @property
    def _ready_url(self) -> str:
        return f"{self.url}/health"

    def _command(self) -> list[str]:
        peers = f"http://{self._address(1)}"
        listening = {
            "listen-client-urls": self.url, "advertise-client-urls": self.url, "listen-peer-urls": peers,
            "initial-advertise-peer-urls": peers, "initial-cluster": f"default={peers}", "data-dir": self._mark,
        }  # fmt: skip
        return [self.installed.binary("etcd"), *(f"--{name}={value}" for name, value in listening.items())]


class ApiServer(_Part):
    """One API server with RBAC. Whoever has the client certificate of its authority may do everything."""

    NAME, PORTS = "kube-apiserver", 1

    def __init__(self, folder: Path, etcd: Etcd) -> None:
        super().__init__(folder)
        self._etcd = etcd
        self._authority = Authority(folder)

    @property
    def url(self) -> str:
        return f"https://{self._address(0)}"

    @property
    def kubeconfig(self) -> Path:
        """The kubeconfig of an administrator."""
        return self.folder / "kubeconfig"

    async def make_certificates(self) -> None:
        """Make the server's certificate, an administrator's, and the key that signs tokens of service accounts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        await self._authority.found()
        await self._authority.sign("server", "IP:127.0.0.1")
        await self._authority.sign("admin", subject="/O=system:masters/CN=admin")
        await openssl(self.folder, "genrsa", "-out", "accounts.key", "2048")

    def write_kubeconfig(self) -> None:
        files = {"client-certificate": "admin.pem", "client-key": "admin.key"}
        record = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
            "clusters": [{"name": "test", "cluster": {"server": self.url, "certificate-authority": "ca.pem"}}],
            "users": [{"name": "admin", "user": files}],
        }
        self.kubeconfig.write_text(yaml.safe_dump(record))

    @property
    def _ready_url(self) -> str:
        return f"{self.url}/readyz"

    async def _says_ready(self, client: httpx.AsyncClient) -> bool:
        known = ssl.create_default_context(cafile=str(self._authority.ca))
        async with httpx.AsyncClient(verify=known, trust_env=False, timeout=5.0) as trusting:
            return await super()._says_ready(trusting)

    def _command(self) -> list[str]:
        assert self._ports is not None
        folder = self.folder
        options = {
            "etcd-servers": self._etcd.url,
            "etcd-compaction-interval": "20s",
            "bind-address": "127.0.0.1",
            "secure-port": str(self._ports[0]),
            "insecure-port": "0",
            "service-cluster-ip-range": "10.0.0.0/24",
            "cert-dir": self._mark,
            "tls-cert-file": folder / "server.pem",
            "tls-private-key-file": folder / "server.key",
            "client-ca-file": self._authority.ca,
            "service-account-issuer": "https://kubernetes.default.svc",
            "service-account-key-file": folder / "accounts.key",
            "service-account-signing-key-file": folder / "accounts.key",
            "authorization-mode": "RBAC",
            "disable-admission-plugins": "ServiceAccount",
            "endpoint-reconciler-type": "none",
            "runtime-config": f"{SLICES_GROUP}/v1beta1=false",
        }
        return [self.installed.binary("kube-apiserver"), *(f"--{name}={value}" for name, value in options.items())]


@asynccontextmanager
async def api_server(folder: Path) -> AsyncIterator[ApiServer]:
    """Run both in a folder for the length of a block."""
    async with Etcd(folder / "etcd") as etcd:
        server = ApiServer(folder / "api", etcd)
        await server.make_certificates()
        async with server:
            server.write_kubeconfig()
            async with client_of(from_kubeconfig(server.kubeconfig)) as client:
                answer = await client.post("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", json=SLICES)
                assert answer.is_success, answer.text
            yield server
