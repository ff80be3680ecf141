"""`sidecar queue`: show who waits and who runs, by adapter, tenant and backend, and why.

`sidecar requests`: list the open requests, tell the story of one, and cancel some.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from time import sleep
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from sidecar.cli import completing
from sidecar.cli.client import Client
from sidecar.cli.endpoint import admin_command
from sidecar.cli.exits import CommandError, Exit, harmless, say
from sidecar.cli.show import WHICH, AsJson, console, count, duration, print_json, table
from sidecar.proto import admin_pb2 as pb

Adapter = Annotated[
    str,
    typer.Option(help="Only requests for this adapter.", show_default=False, autocompletion=completing.adapter_names),
]
Tenant = Annotated[str, typer.Option(help="Only this tenant's requests.", show_default=False)]
Backend = Annotated[
    str, typer.Option(help="Only requests at this backend.", show_default=False, autocompletion=completing.backend_ids)
]

OPEN = ("ID", "STATE", ">AGE", "ADAPTER", "TENANT", "CLASS", "BACKEND", ">MAX TOKENS", ">REQUEST")


@admin_command
def list_requests(
    client: Client,
    adapter: Adapter = "",
    tenant: Tenant = "",
    backend: Backend = "",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Requests listed, oldest first.")] = 100,
    as_json: AsJson = False,
) -> None:
    """List the requests that wait and run, the oldest first."""
    request = pb.ListRequestsRequest(adapter=adapter, tenant=tenant, backend=backend, limit=limit)
    answer = client.ask(client.queues.List, request)
    if as_json:
        print_json(answer)
        return
    if not answer.requests:
        asked = {"adapter": adapter, "tenant": tenant, "backend": backend}
        said = ", ".join(f'{what} "{name}"' for what, name in asked.items() if name)
        say(f"no request of {said} is open" if said else "no request is open")
        return
    console().print(table(OPEN, [open_row(each) for each in answer.requests]))
    if answer.total > len(answer.requests):
        say(f"and {answer.total - len(answer.requests)} more")


@admin_command
def show(
    client: Client,
    request: Annotated[
        str,
        typer.Argument(metavar="ID", help=WHICH),
    ],
    as_json: AsJson = False,
) -> None:
    """Tell what a request waits for, or waited for, moment by moment: an open one, or one that ended lately."""
    answer = client.ask(client.queues.Show, pb.ShowRequestRequest(request=request))
    if as_json:
        print_json(json.loads(answer.record))
    else:
        say(harmless("\n".join(answer.lines)))


def open_row(request: Any) -> tuple[str, ...]:
    version = f"{request.adapter}@{request.version}" if request.version else request.adapter
    return (
        request.request_id or "-",
        request.state,
        duration(request.age_s),
        version or "base",
        request.tenant or "-",
        getattr(request, "class"),
        request.backend or "-",
        f"{request.input_tokens}+{request.output_tokens_max}",
        str(request.request),
    )


@admin_command
def cancel(
    client: Client,
    request_id: Annotated[
        str, typer.Argument(metavar="ID", help="The request's id, as its client knows it.", show_default=False)
    ] = "",
    adapter: Adapter = "",
    tenant: Tenant = "",
    backend: Backend = "",
    as_json: AsJson = False,
) -> None:
    """Cancel a request by its id, or all of an adapter, tenant or backend; clients are told that an operator did."""
    if not (request_id or adapter or tenant or backend):
        raise CommandError("say which requests: an ID, --adapter, --tenant or --backend", Exit.MISUSED)
    request = pb.CancelRequest(request_id=request_id, adapter=adapter, tenant=tenant)
    if backend:
        request.only.backend = backend
    answer = client.ask(client.queues.Cancel, request)
    if not answer.cancelled:
        asked = " ".join(filter(None, (request_id, adapter, tenant, backend)))
        raise CommandError(f"no open request matches {asked}; it may have ended already (sidecar requests list)")
    if as_json:
        print_json(answer)
    else:
        say(f"{count(answer.cancelled, 'request')} cancelled")


ROWS = 20
ROWS_MAX = 1000
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
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=ROWS_MAX,
            help="Groups or requests listed, oldest first. Default: 20, and what fits on a terminal.",
            show_default=False,
        ),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until interrupted.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between refreshes.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Show who waits and runs, by adapter, tenant and backend, and why. The first line is the verdict.

    A row is a group of requests: how many wait and run, the longest wait and its bound, the tokens that the waiting
    ones ask for, and why the oldest waits.
    """
    request = pb.QueueRequest(adapter=adapter, backend=backend, limit=limit or ROWS)

    def fetch() -> Any:
        return client.ask(client.queues.Get, request)

    def look() -> RenderableType:
        return fitted(fetch(), by_request, console()) if limit is None else shown(fetch(), by_request)

    if as_json:
        print_json(fetch(), None if watch else 2)
        while watch:
            sleep(interval)
            print_json(fetch(), None)
    elif watch and sys.stdout.isatty():
        _watch(look, interval)
    else:
        console().print(look())
        while watch:
            sleep(interval)
            console().print(look())


def _watch(look: Callable[[], RenderableType], interval_s: float) -> None:
    with Live(look(), console=console(), auto_refresh=False, screen=True) as live:
        while True:
            sleep(interval_s)
            live.update(look(), refresh=True)


def fitted(view: Any, by_request: bool, terminal: Console) -> RenderableType:
    """Return the queue with as many rows as leave the verdict on a terminal, the shell's next prompt below."""
    found = shown(view, by_request)
    if not terminal.is_terminal:
        return found
    for rows in range(ROWS, 0, -1):
        found = shown(view, by_request, rows)
        if len(terminal.render_lines(found)) < terminal.height:
            break
    return found


def shown(view: Any, by_request: bool, rows: int = ROWS_MAX) -> RenderableType:
    """Return the queue as text: the verdict, then the groups or the requests, each with the number of further ones."""
    parts: list[RenderableType] = [Text(view.verdict, style="bold")]
    if not by_request:
        parts += _listed(GROUPS, map(_group_row, view.groups[:rows]), view.groups_total, "groups")
        return Group(*parts)
    why = ", ".join(f"{item.why} {item.count}" for item in view.why)
    parts += _listed(REQUESTS, map(_row, view.requests[:rows]), view.waiting, "waiting", f"; in all: {why}")
    parts += _listed(OPEN, map(open_row, view.runs[:rows]), view.running, "running")
    return Group(*parts)


def _listed(
    columns: Sequence[str], rows: Iterable[tuple[str, ...]], total: int, what: str, note: str = ""
) -> list[RenderableType]:
    """Return a table, if it has rows, and a line that counts those that it leaves out."""
    listed = list(rows)
    parts: list[RenderableType] = ["", table(columns, listed)] if listed else []
    if total <= len(listed):
        return parts
    return [*parts, "", Text(f"and {total - len(listed)} more {what} (--limit {min(total, ROWS_MAX)}){note}")]


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
