"""gRPC credentials from files, for channels to engines."""

from __future__ import annotations

from pathlib import Path

import grpc

from sidecar.errors import Misused, Reason


def channel_credentials(tls: dict[str, str]) -> grpc.ChannelCredentials:
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
