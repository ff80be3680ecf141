"""`sidecar queue`: show the waiting requests, how long they wait, their bounds, and why."""

from __future__ import annotations

import sys
from time import sleep
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from sidecar.cli import completing
from sidecar.cli.client import Client
from sidecar.cli.endpoint import admin_command
from sidecar.cli.show import AsJson, console, duration, print_json, table
from sidecar.proto import admin_pb2 as pb


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
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Requests listed, oldest first.")] = 20,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until interrupted.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between refreshes.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Show which requests wait, how long, their bounds, and why. The first line is the verdict."""
    request = pb.QueueRequest(adapter=adapter, backend=backend, limit=limit)

    def fetch() -> Any:
        return client.ask(client.queues.Get, request)

    if not watch:
        _print(fetch(), as_json)
    elif as_json or not sys.stdout.isatty():
        while True:
            _print(fetch(), as_json, indent=None)
            sleep(interval)
    else:
        _watch(fetch, interval)


def _print(view: Any, as_json: bool, indent: int | None = 2) -> None:
    if as_json:
        print_json(view, indent)
    else:
        console().print(shown(view), crop=False)


def _watch(fetch: Any, interval_s: float) -> None:
    with Live(shown(fetch()), console=console(), auto_refresh=False, screen=True) as live:
        while True:
            sleep(interval_s)
            live.update(shown(fetch()), refresh=True)


def shown(view: Any) -> RenderableType:
    """Return the queue as text: the verdict, the requests, and the number of further ones."""
    parts: list[RenderableType] = [Text(view.verdict, style="bold")]
    if view.requests:
        columns = (">WAITED", ">BOUND", ">EXPIRES", "ADAPTER", "TENANT", "CLASS", "BACKEND", "WHY", ">REQUEST", "ID")
        parts += ["", table(columns, [_row(request) for request in view.requests])]
    more = view.waiting - len(view.requests)
    if more > 0:
        parts += ["", Text(f"and {more} more: " + ", ".join(f"{item.why} {item.count}" for item in view.why))]
    return Group(*parts)


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
