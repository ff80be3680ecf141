"""`sidecar keys`: make, list and revoke API keys."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from sidecar.cli.client import Client
from sidecar.cli.durations import positive_seconds_in
from sidecar.cli.endpoint import admin_command
from sidecar.cli.exits import CommandError, Exit, say
from sidecar.cli.show import AsJson, bad, console, print_json, table, with_never
from sidecar.proto import admin_pb2 as pb

USAGE = """This is the only time that it is shown; keep it in a secret store.
  OpenAI clients: OpenAI(base_url="http://HOST:PORT/v1", api_key=KEY), or OPENAI_API_KEY=KEY
  gRPC clients:   the metadata ("authorization", "Bearer KEY") with each call"""


@admin_command
def create(
    client: Client,
    tenant: Annotated[str, typer.Option(help="The tenant that it stands for.", show_default=False)],
    expires: Annotated[
        str, typer.Option(help="How long it is good for: 12h, 90d; without one it has no end.", show_default=False)
    ] = "",
    role: Annotated[
        list[str] | None, typer.Option(help="viewer, publisher or operator. Repeatable.", show_default=False)
    ] = None,
    group: Annotated[
        list[str] | None, typer.Option(help="A group for policies. Repeatable.", show_default=False)
    ] = None,
    klass: Annotated[
        str, typer.Option("--class", help="The class of its requests; clients choose without one.", show_default=False)
    ] = "",
    note: Annotated[str, typer.Option(help="Your own words, such as who has it.", show_default=False)] = "",
    as_json: AsJson = False,
) -> None:
    """Make an API key and show it, once. The sidecar keeps only its SHA-256."""
    request = pb.CreateKeyRequest(
        tenant=tenant,
        expires_s=positive_seconds_in(expires, "--expires") if expires else 0.0,
        roles=known_roles(role or ()),
        groups=group or (),
        note=note,
        **{"class": klass},
    )
    made = client.ask(client.access.CreateKey, request)
    key = made.key
    if as_json:
        print_json(_record(key) | {"secret": made.secret})
        return
    until = f"good until {_time(key.expires_at)}" if key.expires_at else "without an end"
    say(f"key {key.id} of tenant {key.tenant}, {until}")
    print(f"\n{made.secret}\n\n{USAGE}")


@admin_command
def list_keys(
    client: Client,
    tenant: Annotated[str, typer.Option(help="Only keys of this tenant.", show_default=False)] = "",
    as_json: AsJson = False,
) -> None:
    """List the API keys with their last use, ended and revoked ones included; never their secrets."""
    keys = client.ask(client.access.ListKeys, pb.ListKeysRequest(tenant=tenant)).keys
    if as_json:
        print_json([_record(key) for key in keys])
    elif not keys:
        say("no keys; sidecar keys create --tenant NAME makes one")
    else:
        columns = ("KEY", "TENANT", "STATE", "ROLES", "GROUPS", "CLASS", "CREATED", "UNTIL", "LAST USED", "NOTE")
        console().print(table(columns, [_row(key) for key in keys]))


def known_roles(roles: Sequence[str]) -> Sequence[str]:
    """Return the roles that are given with --role. Raises CommandError for one that does not exist."""
    from sidecar.access.principal import ROLES

    for role in roles:
        if role not in ROLES:
            raise CommandError(f'--role: there is no role "{role}"; there are {", ".join(ROLES)}', Exit.MISUSED)
    return roles


def _record(key: Any) -> dict[str, Any]:
    return with_never(key, "created_at", "expires_at", "revoked_at", "used_at")


def _row(key: Any) -> tuple[Any, ...]:
    return (
        key.id,
        key.tenant,
        key.state if key.state == "active" else bad(key.state),
        ", ".join(key.roles) or "-",
        ", ".join(key.groups) or "-",
        getattr(key, "class") or "-",
        _time(key.created_at),
        _time(key.expires_at),
        _time(key.used_at),
        key.note or "-",
    )


@admin_command
def revoke(
    client: Client,
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As keys list shows it.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Revoke an API key for good, at once and on every replica that answers."""
    key = client.ask(client.access.RevokeKey, pb.RevokeKeyRequest(id=key_id))
    if as_json:
        print_json(_record(key))
    else:
        say(f"key {key.id} of tenant {key.tenant} is revoked; no replica that answers takes it any more")


def _time(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC" if at else "-"
