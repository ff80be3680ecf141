"""`sidecar backends`: how the engines stand, and taking them out of service and back."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from sidecar.cli.client import Client, admin_command
from sidecar.cli.show import AsJson, bad, console, duration, facts, print_json, table, titled
from sidecar.proto import admin_pb2 as pb

app = typer.Typer(help="See backends, drain them and take them back.", no_args_is_help=True)

Identity = Annotated[str, typer.Argument(metavar="BACKEND", help="The backend's id.", show_default=False)]


@admin_command(app, "list")
def list_backends(client: Client, as_json: AsJson = False) -> None:
    """List the backends: state, seats, open adapters."""
    backends = client.ask(client.backends.List, pb.ListBackendsRequest()).backends
    if as_json:
        print_json(list(backends))
    elif not backends:
        print("no backend is configured")
    else:
        columns = ("BACKEND", "STATE", ">SEATS", ">QUEUED", ">PAGES", ">OPEN", ">RESIDENT", ">HEALS", "DETAIL")
        console().print(table(columns, [_row(backend) for backend in backends]))


def _row(backend: Any) -> tuple[str | Text, ...]:
    return (
        backend.id,
        _state(backend),
        f"{backend.running}/{backend.seats}",
        str(backend.queued),
        _pages(backend),
        str(len(backend.open)),
        str(len(backend.resident)),
        str(len(backend.heals)),
        backend.detail,
    )


def _state(backend: Any) -> str | Text:
    return backend.state if backend.state == "up" else bad(backend.state)


def _pages(backend: Any) -> str:
    return f"{sum(version.pages for version in backend.open)}/{backend.page_limit or '?'}"


@admin_command(app, "show")
def show(client: Client, backend: Identity, as_json: AsJson = False) -> None:
    """Show one backend: seats, pages, open adapters, what is pinned by what, and its last heals."""
    _print(client.ask(client.backends.Get, pb.BackendRequest(backend=backend)), as_json)


@admin_command(app, "drain")
def drain(client: Client, backend: Identity, as_json: AsJson = False) -> None:
    """Send nothing new to a backend. What runs there ends there; what waits goes elsewhere."""
    answer = client.ask(client.backends.Drain, pb.BackendRequest(backend=backend))
    if as_json:
        print_json(answer)
    else:
        print(f"{answer.id} is draining, {answer.running} still running")


@admin_command(app, "undrain")
def undrain(client: Client, backend: Identity, as_json: AsJson = False) -> None:
    """Take a drained backend back."""
    answer = client.ask(client.backends.Undrain, pb.BackendRequest(backend=backend))
    if as_json:
        print_json(answer)
    else:
        print(f"{answer.id} takes requests again" if answer.state == "up" else f"{answer.id} is {answer.state}")


def _print(backend: Any, as_json: bool) -> None:
    if as_json:
        print_json(backend)
    else:
        console().print(Group(*_shown(backend)))


def _shown(backend: Any) -> list[Any]:
    head = facts(
        (
            ("backend", backend.id),
            ("state", _state(backend)),
            ("detail", backend.detail),
            ("address", f"{backend.kind}://{backend.address}"),
            ("engine", _engine(backend)),
            ("seats", f"{backend.running} of {backend.seats} taken, {backend.queued} queued"),
            ("pages", _page_facts(backend)),
            ("KV tokens", f"{backend.kv_reserved} of {backend.kv_tokens or '?'} reserved"),
            ("resident", ", ".join(backend.resident) or "nothing"),
        )
    )
    versions = [
        (
            version.name,
            version.digest[:12],
            duration(version.age_s),
            str(version.pages),
            str(version.running),
            str(version.queued),
            version.pinned_by or "-",
        )
        for version in backend.open
    ]
    columns = ("ADAPTER", "DIGEST", ">AGE", ">PAGES", ">RUNNING", ">QUEUED", "PINNED BY")
    heals = [(f"{duration(heal.age_s)} ago", heal.reason, heal.adapter) for heal in backend.heals]
    return [
        head,
        *titled("open adapters", table(columns, versions) if versions else Text("none")),
        *titled("last heals", table(("WHEN", "WHAT", "ADAPTER"), heals) if heals else Text("none")),
    ]


def _engine(backend: Any) -> str:
    parts = (
        backend.base_model or "base model not known",
        backend.dtype,
        f"rank at most {backend.rank_max}" if backend.rank_max else "",
    )
    return ", ".join(part for part in parts if part)


def _page_facts(backend: Any) -> str:
    in_use = sum(version.pages for version in backend.open)
    return (
        f"{in_use} open, at most {backend.page_limit or '?'} at once; the engine has {backend.host_pages or '?'} in "
        f"its host cache and {backend.device_pages or '?'} on the device"
    )
