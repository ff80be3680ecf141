"""The address of a Redis as a URL. Passwords are not allowed in it: URLs are shown, logged and stored."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

SCHEMES: dict[str, tuple[Literal["single", "sentinel", "cluster"], bool]] = {
    "redis": ("single", False),
    "rediss": ("single", True),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}
FORMS = "redis://HOST:PORT/DB, redis+sentinel://HOST:PORT,HOST:PORT/MASTER/DB or redis+cluster://HOST:PORT,HOST:PORT"
PORT, SENTINEL_PORT = 6379, 26379
KEY_PREFIX = "lora-sidecar"
_USER = re.compile(r"://.*@", re.DOTALL)


@dataclass(frozen=True)
class Address:
    """One server, the Sentinels that know the server of `master`, or some nodes of a cluster."""

    kind: Literal["single", "sentinel", "cluster"]
    hosts: tuple[tuple[str, int], ...]
    master: str = ""
    database: int = 0
    user: str = ""
    tls: bool = False

    def __str__(self) -> str:
        """Return the address for people, without user name and password."""
        hosts = ",".join(f"{host}:{port}" for host, port in self.hosts)
        return f'the master "{self.master}" of the Sentinels at {hosts}' if self.kind == "sentinel" else hosts


@dataclass(frozen=True)
class RedisLocation:
    """Where the shared state is. Files are PEM. `password_file` is read for every connection, so it may change."""

    address: Address
    key_prefix: str = KEY_PREFIX
    password_file: Path | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None


def parse_address(url: str) -> Address:
    """Parse a URL; schemes with `rediss` use TLS. Raises ValueError, which does not repeat the URL."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in SCHEMES:
        raise ValueError(f"it must be of the form {FORMS}; with TLS the scheme begins with rediss")
    kind, tls = SCHEMES[scheme]
    if "?" in rest or "#" in rest:
        raise ValueError("what is behind ? or # is not understood; the keys of state are the options")
    user, _, location = rest.rpartition("@")
    if ":" in user:
        raise ValueError("a password has no place in a URL; put it into a file and name that with password_file")
    netloc, *path = location.rstrip("/").split("/")
    hosts = tuple(_host(text, SENTINEL_PORT if kind == "sentinel" else PORT) for text in netloc.split(","))
    if kind == "single" and len(hosts) > 1:
        raise ValueError("redis:// takes one host; redis+sentinel:// and redis+cluster:// take several")
    master = unquote(path.pop(0)) if kind == "sentinel" and path else ""
    if kind == "sentinel" and not master:
        raise ValueError("redis+sentinel:// needs the master's name: redis+sentinel://HOST:PORT,HOST:PORT/MASTER")
    if len(path) > 1 or (path and (kind == "cluster" or not path[0].isdigit())):
        raise ValueError(f"/{'/'.join(path)} is not a database's number, and a cluster has none")
    return Address(kind, hosts, master, int(path[0]) if path else 0, unquote(user), tls)


def _host(text: str, default_port: int) -> tuple[str, int]:
    host, separator, port = text.rpartition(":")
    if not separator or text.endswith("]"):
        host, port = text, str(default_port)
    if not host or not port.isdigit():
        raise ValueError(f"a host must be HOST:PORT; the URL is of the form {FORMS}")
    return host.strip("[]"), int(port)


def without_users(text: str) -> str:
    """Return a text with everything before the @ of a URL hidden: it may be a password, with any characters."""
    return _USER.sub("://(hidden)@", text)
