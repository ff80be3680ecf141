"""What one row of `sidecar top` shows when it is opened: the same as the command that shows one thing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.text import Text

from sidecar.cli import adapters, backends
from sidecar.cli.client import Client
from sidecar.cli.exits import harmless
from sidecar.proto import admin_pb2 as pb


def _backend(client: Client, row: Any) -> list[Any]:
    return backends.shown(client.ask(client.backends.Get, pb.BackendRequest(backend=row.backend.id)))


def _adapter(client: Client, row: Any) -> list[Any]:
    return adapters.shown(client.ask(client.adapters.Get, pb.AdapterRequest(name=row.name)))


def _request(client: Client, row: Any) -> list[Any]:
    """Return its story; by its number, for several requests may have an id."""
    story = client.ask(client.queues.Show, pb.ShowRequestRequest(request=str(row.request)))
    return [Text(harmless("\n".join(story.lines)))]


OPENED: dict[str, Callable[[Client, Any], list[Any]]] = {
    "backend": _backend,
    "adapter": _adapter,
    "request": _request,
}
