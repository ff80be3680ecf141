"""`sidecar adapters promote, rollback, refresh, watch`: choose a name's current version, and watch changes."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from sidecar.cli import completing
from sidecar.cli.client import Client
from sidecar.cli.durations import seconds_in
from sidecar.cli.endpoint import admin_command
from sidecar.cli.exits import CommandError, Exit, say
from sidecar.cli.show import AsJson, print_json, record_of, table
from sidecar.model.reference import Reference
from sidecar.proto import admin_pb2 as pb

Hold = Annotated[
    str,
    typer.Option(
        help="Keep the change for so long (30m, 2h) although another manages the name; without a time: 1h.",
        metavar="[TIME]",
    ),
]


def seconds_of(time: str, option: str = "--hold") -> int:
    """Return the seconds in "30m" or "2h", or 0 for "". Raises CommandError for anything else."""
    return int(seconds_in(time, option)) if time else 0


def labels_of(labels: list[str] | None) -> dict[str, str]:
    """Return `key=value` options as a dict. Raises CommandError for any other form."""
    found = {}
    for label in labels or []:
        key, equals, value = label.partition("=")
        if not key or not equals:
            raise CommandError(f'--label wants key=value, and "{label}" is not', Exit.MISUSED)
        found[key] = value
    return found


@admin_command
def promote(
    client: Client,
    version: Annotated[
        str,
        typer.Argument(
            help="name@v8 or name@<digest>.", show_default=False, autocompletion=completing.adapter_versions
        ),
    ],
    weight: Annotated[int, typer.Option(min=1, max=100, help="Percent of requests; below 100 it is a canary.")] = 100,
    hold: Hold = "",
    as_json: AsJson = False,
) -> None:
    """Make one of a name's versions current, or give it a share of the requests."""
    name, selector = _selected(version)
    withdrawn = _is_withdrawn(client.ask(client.adapters.Get, pb.AdapterRequest(name=name)), selector)
    request = pb.PromoteRequest(name=name, version=selector, weight=weight, hold_s=seconds_of(hold))
    adapter = client.ask(client.adapters.Promote, request)
    if withdrawn:
        say(f"warning: {name}@{selector} had been rolled back from", error=True)
    if as_json:
        print_json(adapter)
    elif weight < 100:
        say(f"{weight} % of {name} go to {adapter.canary_version}, the rest to {_ordinal(adapter)}")
    else:
        say(f"{name} stands for {_ordinal(adapter)}")


@admin_command
def rollback(
    client: Client,
    name: Annotated[
        str, typer.Argument(help="The adapter's name.", show_default=False, autocompletion=completing.adapter_names)
    ],
    to: Annotated[
        str | None,
        typer.Option(metavar="VERSION", help="Go back to this version instead: v7 or a digest.", show_default=False),
    ] = None,
    hold: Hold = "",
    as_json: AsJson = False,
) -> None:
    """Undo the last promotion: end a canary, or make the previous version current.

    A second rollback does not return to the version that the first one left; --to VERSION goes to any.
    """
    if to is not None and "@" in to:
        to = Reference.of(to).selector
    if to == "":  # an empty variable of a script, say
        raise CommandError("--to names no version; leave it out to go back to the previous one", Exit.MISUSED)
    to = to or ""
    withdrawn = bool(to) and _is_withdrawn(client.ask(client.adapters.Get, pb.AdapterRequest(name=name)), to)
    request = pb.RollbackRequest(name=name, version=to, hold_s=seconds_of(hold))
    adapter = client.ask(client.adapters.Rollback, request)
    if withdrawn:
        say(f"warning: {_ordinal(adapter)} of {name} was itself rolled back from", error=True)
    if as_json:
        print_json(adapter)
    else:
        say(f"{name} stands for {_ordinal(adapter)}")


@admin_command
def refresh(
    client: Client,
    version: Annotated[
        str,
        typer.Argument(
            help="name, name@v8 or name@<digest>.", show_default=False, autocompletion=completing.adapter_versions
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Make every engine load a fresh copy of a version, under a new task id."""
    name, selector = Reference.of(version)
    adapter = client.ask(client.adapters.Refresh, pb.RefreshRequest(name=name, version=selector))
    if as_json:
        print_json(adapter)
    else:
        say(f"{version} is loaded anew on its next request")


@admin_command
def watch(
    client: Client,
    token: Annotated[str, typer.Option(help="Token of the last change seen; without: all names first.")] = "",
    as_json: AsJson = False,
) -> None:
    """Print changes of names as they happen, until interrupted."""
    for change in client.ask(client.adapters.Watch, pb.WatchRequest(token=token), timeout_s=None):
        if as_json:
            print_json(change)
            continue
        what = f"is {_ordinal(change.adapter) or 'there'}" if change.HasField("adapter") else "is forgotten"
        print(f"{change.token:>8}  {change.name} {what}", flush=True)


def versions_table(adapter: Any) -> Any:
    """Return the versions of a name, newest first."""
    rows = [
        (
            version.version,
            version.role + (f" {adapter.canary_weight} %" if version.role == "canary" else ""),
            version.digest[:12],
            str(version.generation) if version.generation else "",
            datetime.fromtimestamp(version.registered_at, UTC).strftime("%Y-%m-%d %H:%M"),
            ", ".join(f"{key}={value}" for key, value in sorted(version.labels.items())),
            version.origin,
        )
        for version in reversed(adapter.versions)
    ]
    return table(("VERSION", "ROLE", "DIGEST", ">REFRESHED", "SINCE (UTC)", "LABELS", "ORIGIN"), rows)


def _is_withdrawn(adapter: Any, selector: str) -> bool:
    return any(
        version.role == "withdrawn" and (version.version == selector or version.digest.startswith(selector))
        for version in adapter.versions
    )


def _selected(version: str) -> tuple[str, str]:
    name, selector = Reference.of(version)
    if not selector:
        raise CommandError(f'name the version too, as in "{version}@v2"', Exit.MISUSED)
    return name, selector


def _ordinal(adapter: Any) -> str:
    return Reference.of(record_of(adapter)["version"]).selector
