"""Find the address and credentials of a Kubernetes API server: a pod's service account, or a kubeconfig."""

from __future__ import annotations

import base64
import binascii
import os
import ssl
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sidecar.errors import Misused, Reason

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
KUBECONFIG = "KUBECONFIG"
HOST, PORT = "KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"


@dataclass(frozen=True)
class Access:
    """One API server and one user of it. `namespace` is the default namespace.

    `token` returns the current bearer token, or "" if there is none. A service account's token changes about hourly.
    """

    url: str
    namespace: str
    tls: ssl.SSLContext | None = None
    token: Callable[[], str] = field(default=lambda: "", repr=False)


def find_access(environment: Mapping[str, str] = os.environ, account: Path = SERVICE_ACCOUNT) -> Access:
    """Return the access of this process: from KUBECONFIG if that is set, else from the pod that it runs in.

    Raises Misused if there is neither, or if it cannot be used.
    """
    if environment.get(KUBECONFIG):
        return from_kubeconfig(Path(environment[KUBECONFIG].split(os.pathsep)[0]).expanduser())
    if environment.get(HOST):
        return _from_pod(environment, account)
    raise _misused(
        f"this process runs in no pod ({HOST} is not set); run it in one, or name a kubeconfig with {KUBECONFIG}"
    )


def _from_pod(environment: Mapping[str, str], account: Path) -> Access:
    token_file, ca = account / "token", account / "ca.crt"
    if not token_file.is_file():
        raise _misused(
            f"there is no {token_file}: the pod has no service account token; set automountServiceAccountToken: true"
        )
    host = environment[HOST]
    host = f"[{host}]" if ":" in host else host
    try:
        namespace = (account / "namespace").read_text().strip()
        tls = ssl.create_default_context(cafile=str(ca))
    except OSError as error:
        raise _misused(f"the service account in {account} cannot be used: {error}") from error
    return Access(f"https://{host}:{environment.get(PORT, '443')}", namespace, tls, _TokenFile(token_file))


def from_kubeconfig(path: Path) -> Access:
    """Return the access of a kubeconfig's current context. Raises Misused naming the missing field."""
    try:
        record = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise _misused(f"the kubeconfig {path} cannot be read: {error}") from error
    if not isinstance(record, dict) or not record.get("current-context"):
        raise _misused(f"{path} names no current-context; choose one with kubectl config use-context")
    context = _named(record, "context", record["current-context"], path)
    cluster = _named(record, "cluster", context.get("cluster"), path)
    user = _named(record, "user", context["user"], path) if context.get("user") else {}
    if "exec" in user or "auth-provider" in user:
        raise _misused(
            f"{path}: the user {context['user']} is authenticated by another program, which is not run; name a context "
            "with a token or a client certificate"
        )
    url = str(cluster.get("server", "")).rstrip("/")
    tls = _tls(cluster, user, path.parent) if url.startswith("https://") else None
    token = _TokenFile(path.parent / user["tokenFile"]) if user.get("tokenFile") else _constant(user.get("token") or "")
    return Access(url, context.get("namespace") or "default", tls, token)


def _named(record: dict[str, Any], kind: str, name: Any, path: Path) -> dict[str, Any]:
    for entry in record.get(f"{kind}s") or []:
        if entry.get("name") == name:
            found = entry.get(kind)
            return found if isinstance(found, dict) else {}
    raise _misused(f"{path} has no {kind} called {name}")


def _tls(cluster: dict[str, Any], user: dict[str, Any], folder: Path) -> ssl.SSLContext:
    """Return the TLS context that verifies the server and carries the client's certificate, if any."""
    ca = _pem(cluster, "certificate-authority", folder)
    certificate, key = _pem(user, "client-certificate", folder), _pem(user, "client-key", folder)
    try:
        context = ssl.create_default_context(cadata=ca.decode() if ca else None)
        if cluster.get("insecure-skip-tls-verify"):
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if certificate and key:
            with tempfile.NamedTemporaryFile() as file:  # readable by this user only; ssl reads both only from a file
                file.write(certificate + b"\n" + key)
                file.flush()
                context.load_cert_chain(file.name)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise _misused(f"the certificates of the kubeconfig in {folder} cannot be used: {error}") from error
    return context


def _pem(record: dict[str, Any], key: str, folder: Path) -> bytes:
    """Return a certificate or key given inline as `KEY-data` or as a file, or b"" if it is neither."""
    try:
        if record.get(f"{key}-data"):
            return base64.b64decode(record[f"{key}-data"], validate=True)
        return (folder / record[key]).read_bytes() if record.get(key) else b""
    except (OSError, binascii.Error) as error:
        raise _misused(f"{key} of the kubeconfig in {folder} cannot be read: {error}") from error


class _TokenFile:
    """A token in a file that is replaced from time to time; it is read again after each change."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_at = 0
        self._token = ""

    def __call__(self) -> str:
        try:
            written_at = self._path.stat().st_mtime_ns
            if written_at != self._read_at:
                self._token, self._read_at = self._path.read_text().strip(), written_at
        except OSError as error:
            if not self._token:
                raise _misused(f"the token {self._path} cannot be read: {error.strerror}") from error
        return self._token


def _constant(token: str) -> Callable[[], str]:
    return lambda: token


def _misused(message: str) -> Misused:
    return Misused(Reason.CONFIG_INVALID, f"Kubernetes: {message}")
