"""Shell completion of adapters' and backends' names, from the sidecar that the command line names.

A completer gets the options typed so far. Without an answer in time, it offers nothing. Nothing is
printed beside the offers: `main` closes stderr, where gRPC writes its log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import typer

from sidecar.cli.client import Client, connected
from sidecar.cli.commands import imported
from sidecar.cli.exits import CommandError
from sidecar.cli.listener import Endpoint
from sidecar.proto import admin_pb2 as pb

ANSWER_TIMEOUT_S = 1.0
BASE = ("base", "the base model")

Offer = tuple[str, str]
"""A completion, and its description."""


def adapter_names(ctx: typer.Context, incomplete: str) -> list[Offer]:
    """Return the adapters' names."""
    return [(adapter.name, f"rank {adapter.rank}") for adapter in _adapters(ctx)]


def adapter_versions(ctx: typer.Context, incomplete: str) -> list[Offer]:
    """Return the adapters' names, or, after a complete name, its versions: sql@v7."""
    if "@" not in incomplete:
        return adapter_names(ctx, incomplete)
    return [
        (f"{adapter.name}@{version.version}", version.role)
        for adapter in _adapters(ctx)
        for version in adapter.versions
    ]


def models(ctx: typer.Context, incomplete: str) -> list[Offer]:
    """Return the possible targets of a request: adapters, their versions, and the base model."""
    return [*adapter_versions(ctx, incomplete), BASE]


def backend_ids(ctx: typer.Context, incomplete: str) -> list[Offer]:
    """Return the backends' ids."""
    answer = _asked(ctx, lambda client: client.ask(client.backends.List, pb.ListBackendsRequest(), ANSWER_TIMEOUT_S))
    return [] if answer is None else [(backend.id, backend.state) for backend in answer.backends]


def _adapters(ctx: typer.Context) -> Iterable[Any]:
    return _asked(ctx, lambda client: list(client.list_adapters(ANSWER_TIMEOUT_S))) or ()


def _asked(ctx: typer.Context, ask: Callable[[Client], Any]) -> Any:
    """Return the admin listener's answer, or None."""
    try:
        with connected(_endpoint(ctx)) as client:
            return ask(client)
    except (CommandError, OSError, ValueError):
        return None


def _endpoint(ctx: typer.Context) -> Endpoint:
    """Return the admin listener's endpoint, from the options, or from the environment if they name another listener."""
    given = dict(ctx.params)
    if any("--server" in option.opts for option in ctx.command.params):  # `queue` is one for the admin listener
        files = {name: given[name] for name in ("ca", "certificate", "key") if given.get(name)}
        given = imported("queue").make_context("queue", [], resilient_parsing=True).params | files
    connection = {field.name: given[field.name] for field in fields(Endpoint) if field.name in given}
    return Endpoint(listener="admin", option="--admin", **connection)
