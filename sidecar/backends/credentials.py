"""Open gRPC channels and HTTP clients to engines, with credentials from files."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path

import grpc
import grpc.aio

from sidecar.backends import wire
from sidecar.backends.http_client import HttpClient
from sidecar.errors import Misused, Reason
from sidecar.files import file_for_ssl, read_regular, read_regular_or_piped


def channel_credentials(tls: Mapping[str, str]) -> grpc.ChannelCredentials:
    """Return credentials from the PEM files `ca`, `certificate` and `key`; each is optional."""
    return grpc.ssl_channel_credentials(*(read_pem(tls.get(name)) for name in ("ca", "key", "certificate")))


def read_pem(path: str | None) -> bytes | None:
    """Return a PEM file's bytes; None without a path. Raises Misused naming the path and the cause."""
    if path is None:
        return None
    try:
        return read_regular(Path(path))
    except OSError as error:
        raise Misused(Reason.CONFIG_INVALID, f"TLS file {path}: {error.strerror}") from error


def open_channel(address: str, tls: Mapping[str, str] | None) -> grpc.aio.Channel:
    """Return a channel to a backend, with TLS if files are given."""
    if tls is None:
        return grpc.aio.insecure_channel(address, options=wire.CHANNEL_OPTIONS)
    return grpc.aio.secure_channel(address, channel_credentials(tls), options=wire.CHANNEL_OPTIONS)


def tls_context(tls: Mapping[str, str], protocol: str) -> ssl.SSLContext:
    """Return a client's TLS context from PEM files. Raises Misused naming the files if one cannot be used."""
    try:
        files = {name: file_for_ssl(path) for name, path in tls.items()}
        context = ssl.create_default_context(cafile=files.get("ca"))
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # like gRPC: accept the server's own certificate as CA
        if "certificate" in files:
            context.load_cert_chain(files["certificate"], files.get("key"))
    except (OSError, ssl.SSLError) as error:
        names = ", ".join(f"{name} {path}" for name, path in sorted(tls.items()))
        raise Misused(Reason.CONFIG_INVALID, f"the TLS files cannot be used ({names}): {error}") from error
    context.set_alpn_protocols([protocol])
    return context


def open_http_client(
    address: str, tls: Mapping[str, str] | None, api_key_file: str | None, kept_s: float, connect_s: float
) -> HttpClient:
    """Return a client of an HTTP/1.1 server. Raises Misused for a file that cannot be used."""
    context = None if tls is None else tls_context(tls, "http/1.1")
    return HttpClient(address, context, _authorization(api_key_file), kept_s, connect_s)


def _authorization(file: str | None) -> dict[str, str]:
    if file is None:
        return {}
    try:
        return {"authorization": f"Bearer {read_regular_or_piped(Path(file).expanduser()).decode().strip()}"}
    except OSError as error:
        raise Misused(Reason.CONFIG_INVALID, f"api_key_file {file}: {error.strerror}") from error
