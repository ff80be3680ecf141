"""As much of a Kubernetes API server as Helm asks before it renders: its version, its kinds, and single objects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import yaml

VERSION = {"major": "1", "minor": "33", "gitVersion": "v1.33.0"}
RESOURCES = {
    "v1": ["Secret", "ConfigMap", "Service", "ServiceAccount", "Pod"],
    "apps/v1": ["StatefulSet", "Deployment"],
    "networking.k8s.io/v1": ["NetworkPolicy"],
    "policy/v1": ["PodDisruptionBudget"],
}
"""By group and version: the kinds that are made without any further option."""
Answer = tuple[int, dict[str, Any]]


@contextmanager
def api_server(folder: Path, objects: dict[str, Any]) -> Iterator[str]:
    """Serve objects by their paths; give the kubeconfig that names the server."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = _answer(self.path.partition("?")[0], objects)
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield str(_kubeconfig(folder, server.server_address[1]))
        finally:
            server.shutdown()
            thread.join()


def _answer(path: str, objects: dict[str, Any]) -> Answer:
    if path in objects:
        return 200, objects[path]
    if path == "/version":
        return 200, VERSION
    if path == "/api":
        return 200, {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        return 200, {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group(v) for v in RESOURCES if "/" in v]}
    version = path.removeprefix("/apis/").removeprefix("/api/")
    if version in RESOURCES:
        kinds = [_resource(kind) for kind in RESOURCES[version]]
        return 200, {"kind": "APIResourceList", "groupVersion": version, "resources": kinds}
    if path.endswith("/secrets"):
        return 200, {"kind": "SecretList", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": []}
    return 404, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}


def _group(version: str) -> dict[str, Any]:
    known = {"groupVersion": version, "version": version.rpartition("/")[2]}
    return {"name": version.partition("/")[0], "versions": [known], "preferredVersion": known}


def _resource(kind: str) -> dict[str, Any]:
    name = kind.lower().removesuffix("y") + "ies" if kind.endswith("y") else f"{kind.lower()}s"
    return {"name": name, "singularName": "", "namespaced": True, "kind": kind, "verbs": ["get", "list"]}


def _kubeconfig(folder: Path, port: int) -> Path:
    path = folder / "kubeconfig"
    named = {"name": "fake", "cluster": {"server": f"http://127.0.0.1:{port}"}}
    context = {"name": "fake", "context": {"cluster": "fake", "user": "fake"}}
    whole = {"apiVersion": "v1", "kind": "Config", "current-context": "fake", "clusters": [named]}
    whole |= {"contexts": [context], "users": [{"name": "fake", "user": {}}]}
    path.write_text(yaml.safe_dump(whole))
    return path
