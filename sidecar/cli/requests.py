"""`sidecar requests`: list the open requests, tell the story of one, and cancel some."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

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
        raise CommandError("no open request matches; it may have ended already (sidecar requests list)")
    if as_json:
        print_json(answer)
    else:
        say(f"{count(answer.cancelled, 'request')} cancelled")
