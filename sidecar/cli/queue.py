"""`sidecar queue`: show who waits and who runs, by adapter, tenant and backend, and why."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from time import sleep
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from sidecar.cli import completing
from sidecar.cli.client import Client
from sidecar.cli.endpoint import admin_command
from sidecar.cli.requests import OPEN, open_row
from sidecar.cli.show import AsJson, console, duration, print_json, table
from sidecar.proto import admin_pb2 as pb

GROUPS = ("ADAPTER", "TENANT", "BACKEND", ">WAITING", ">RUNNING", ">OLDEST", ">BOUND", ">TOKENS", "WHY")
REQUESTS = (">WAITED", ">BOUND", ">EXPIRES", "ADAPTER", "TENANT", "CLASS", "BACKEND", "WHY", ">REQUEST", "ID")


@admin_command
def queue(
    client: Client,
    adapter: Annotated[
        str,
        typer.Option(
            help="Only requests for this adapter.", show_default=False, autocompletion=completing.adapter_names
        ),
    ] = "",
    backend: Annotated[
        str,
        typer.Option(help="Only requests on this backend.", show_default=False, autocompletion=completing.backend_ids),
    ] = "",
    by_request: Annotated[
        bool, typer.Option("--requests", help="List the requests that wait and run instead of the groups.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Groups or requests listed, oldest first.")] = 20,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until interrupted.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between refreshes.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Show who waits and runs, by adapter, tenant and backend, and why. The first line is the verdict.

    A row is a group of requests: how many wait and run, the longest wait and its bound, the tokens that the waiting
    ones ask for, and why the oldest waits.
    """
    request = pb.QueueRequest(adapter=adapter, backend=backend, limit=limit)

    def fetch() -> Any:
        return client.ask(client.queues.Get, request)

    if not watch:
        _print(fetch(), by_request, as_json)
    elif as_json or not sys.stdout.isatty():
        while True:
            _print(fetch(), by_request, as_json, indent=None)
            sleep(interval)
    else:
        _watch(lambda: shown(fetch(), by_request), interval)


def _print(view: Any, by_request: bool, as_json: bool, indent: int | None = 2) -> None:
    if as_json:
        print_json(view, indent)
    else:
        console().print(shown(view, by_request), crop=False)


def _watch(look: Callable[[], RenderableType], interval_s: float) -> None:
    with Live(look(), console=console(), auto_refresh=False, screen=True) as live:
        while True:
            sleep(interval_s)
            live.update(look(), refresh=True)


def shown(view: Any, by_request: bool) -> RenderableType:
    """Return the queue as text: the verdict, then the groups or the requests, each with the number of further ones."""
    parts: list[RenderableType] = [Text(view.verdict, style="bold")]
    if not by_request:
        parts += _listed(GROUPS, map(_group_row, view.groups), view.groups_total, "groups")
        return Group(*parts)
    why = ", ".join(f"{item.why} {item.count}" for item in view.why)
    parts += _listed(REQUESTS, map(_row, view.requests), view.waiting, f"waiting: {why}")
    parts += _listed(OPEN, map(open_row, view.runs), view.running, "running")
    return Group(*parts)


def _listed(columns: Sequence[str], rows: Iterable[tuple[str, ...]], total: int, what: str) -> list[RenderableType]:
    """Return a table, if it has rows, and a line that counts those that it leaves out."""
    listed = list(rows)
    parts: list[RenderableType] = ["", table(columns, listed)] if listed else []
    return [*parts, "", Text(f"and {total - len(listed)} more {what}")] if total > len(listed) else parts


def _group_row(group: Any) -> tuple[str, ...]:
    oldest = group.oldest if group.HasField("oldest") else None
    return (
        group.adapter or "base model",
        group.tenant or "-",
        group.backend or "-",
        str(group.waiting),
        str(group.running),
        duration(oldest.waited_s) if oldest else "-",
        _bound(oldest) if oldest else "-",
        str(group.tokens) if oldest else "-",
        oldest.why if oldest else "running",
    )


def _row(request: Any) -> tuple[str, ...]:
    return (
        duration(request.waited_s),
        _bound(request),
        duration(request.expires_s),
        request.adapter or "base model",
        request.tenant or "-",
        getattr(request, "class"),
        request.backend or "-",
        request.why,
        str(request.request),
        request.request_id or "-",
    )


def _bound(request: Any) -> str:
    if request.voided:
        return f"void: {request.voided}"
    return duration(request.bound_s) if request.bound_s else "-"
