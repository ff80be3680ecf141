"""`sidecar access check`: ask whether somebody may do something, of a running sidecar or of a configuration file.

`sidecar keys`: make, list and revoke API keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from sidecar.cli import completing
from sidecar.cli.client import Client
from sidecar.cli.durations import positive_seconds_in
from sidecar.cli.endpoint import admin_command
from sidecar.cli.exits import CommandError, Exit, say
from sidecar.cli.show import AsJson, bad, console, print_json, record_of, table, with_never
from sidecar.cli.versions import labels_of
from sidecar.model.reference import Reference
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


NOTES = {"unknown": " (no such name here)", "paused": " (paused)"}


@admin_command
def check(
    client: Client,
    name: Annotated[
        str,
        typer.Argument(
            help="An adapter, name@v8, a base model, or a backend to drain; a tenant to cancel, see_queue or manage.",
            show_default=False,
            autocompletion=completing.adapter_versions,
        ),
    ] = "",
    may: Annotated[str, typer.Option("--may", help="The action, such as infer, list, promote or drain.")] = "infer",
    tenant: Annotated[str, typer.Option("--as", help="The tenant that asks; without one, you.")] = "",
    group: Annotated[list[str] | None, typer.Option(help="A group of who asks. Repeatable.")] = None,
    role: Annotated[list[str] | None, typer.Option(help="A role of who asks's credential. Repeatable.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Decide by this configuration file, and ask no sidecar.", show_default=False),
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="With --config: a label of the adapter, as key=value. Repeatable.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Name the rule that decides.")] = False,
    as_json: AsJson = False,
) -> int:
    """Tell whether somebody may do something: exit 0 if allowed, 1 if denied.

    Everybody may ask about itself; who manages access asks about others.
    """
    roles = known_roles(role or [])
    request = pb.CheckRequest(tenant=tenant, groups=group or [], roles=roles, action=may, resource=name)
    if config is None:
        answer = client.ask(client.access.Check, request)
    else:
        answer = _by_file(config, request, labels_of(label))
    if as_json:
        print_json(record_of(answer))
    else:
        note = NOTES.get(answer.name_state, "")
        judged = f"; judged: {Reference.of(name).name}@{answer.version}" if answer.version else ""
        say(f"{'allowed' if answer.allowed else 'denied'}{note}" + (f" by {answer.by}{judged}" if explain else ""))
        if answer.fault:
            say(f"{answer.source} has changed since and does not decide: {answer.fault}")
    return Exit.OK if answer.allowed else Exit.FAILED


def _by_file(path: Path, request: Any, labels: dict[str, str]) -> Any:
    """Return the answer of a sidecar with this configuration, which knows no adapter."""
    from sidecar.access.checking import Known, principal_asked
    from sidecar.access.checking import check as checked
    from sidecar.access.configured import policy_of
    from sidecar.access.principal import Resource, Sort
    from sidecar.access.resources import OWNER
    from sidecar.cli.serving import resolve

    config = resolve(path)
    policy = policy_of(config.access.policies)
    adapter = Reference.of(request.resource).name
    resource = Resource(
        Sort.ADAPTER,
        labels=tuple(labels.items()),
        owner=labels.get(OWNER, ""),
        allow=config.adapters.allow.get(adapter),
    )
    known = Known(lambda name: None, lambda name: name == "base", resource)
    principal = principal_asked(request.tenant, tuple(request.groups), tuple(request.roles))
    answer = checked(policy, known, principal, request.action, request.resource)
    return pb.CheckResponse(allowed=answer.allowed, by=answer.by, source=policy.source)
