"""What one row of `sidecar top` shows when it is opened: the same as the command that shows one thing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sidecar.cli import adapters, backends
from sidecar.cli.client import Client
from sidecar.cli.requests import OPEN, open_row
from sidecar.cli.show import facts
from sidecar.proto import admin_pb2 as pb


def _backend(client: Client, row: Any) -> list[Any]:
    return backends.shown(client.ask(client.backends.Get, pb.BackendRequest(backend=row.backend.id)))


def _adapter(client: Client, row: Any) -> list[Any]:
    return adapters.shown(client.ask(client.adapters.Get, pb.AdapterRequest(name=row.name)))


def _request(client: Client, row: Any) -> list[Any]:
    names = (column.removeprefix(">").lower() for column in OPEN)
    return [facts(zip(names, open_row(row), strict=True))]


OPENED: dict[str, Callable[[Client, Any], list[Any]]] = {
    "backend": _backend,
    "adapter": _adapter,
    "request": _request,
}
