"""gRPC channels to engines, and their credentials from files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import grpc
import grpc.aio

from sidecar.backends import wire
from sidecar.errors import Misused, Reason


def channel_credentials(tls: Mapping[str, str]) -> grpc.ChannelCredentials:
    """Return credentials from the PEM files `ca`, `certificate` and `key`; each may be absent."""
    return grpc.ssl_channel_credentials(*(read_pem(tls.get(name)) for name in ("ca", "key", "certificate")))


def read_pem(path: str | None) -> bytes | None:
    """Return a PEM file's bytes, None for no path. Raises Misused with the path and the cause."""
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise Misused(Reason.CONFIG_INVALID, f"TLS file {path}: {error.strerror}") from error


def open_channel(address: str, tls: Mapping[str, str] | None) -> grpc.aio.Channel:
    """Return a channel to a backend, with TLS if files are named."""
    if tls is None:
        return grpc.aio.insecure_channel(address, options=wire.CHANNEL_OPTIONS)
    return grpc.aio.secure_channel(address, channel_credentials(tls), options=wire.CHANNEL_OPTIONS)
