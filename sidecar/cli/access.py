"""`sidecar access check`: ask whether somebody may do something, of a running sidecar or of a configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sidecar.cli import completing
from sidecar.cli.client import Client
from sidecar.cli.endpoint import admin_command
from sidecar.cli.exits import Exit, say
from sidecar.cli.keys import known_roles
from sidecar.cli.show import AsJson, print_json, record_of
from sidecar.cli.versions import labels_of
from sidecar.model.reference import Reference
from sidecar.proto import admin_pb2 as pb

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
    from sidecar.access.deciding import policy_of
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
