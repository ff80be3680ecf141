"""`sidecar audit`: who changed what, and who was denied what."""

from __future__ import annotations

import json
from collections.abc import Iterator
from time import time
from typing import Annotated, Any, Literal

import typer
from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from sidecar.cli import completing
from sidecar.cli.client import Client
from sidecar.cli.durations import seconds_in
from sidecar.cli.endpoint import admin_command
from sidecar.cli.exits import say
from sidecar.cli.show import GAP, AsJson, bad, console
from sidecar.proto import admin_pb2 as pb


@admin_command
def audit(
    client: Client,
    since: Annotated[str, typer.Option(help="How far back: 30m, 12h, 7d.")] = "1h",
    adapter: Annotated[
        str, typer.Option(help="Only what concerns it.", show_default=False, autocompletion=completing.adapter_names)
    ] = "",
    tenant: Annotated[str, typer.Option(help="Only what it did, or was done to it.", show_default=False)] = "",
    kind: Annotated[Literal["change", "denial"] | None, typer.Option(help="Only changes, or only denials.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show who changed what and who was denied what, as the asked replica recorded it; the newest come last.

    With --json it prints the lines as they are in the audit's file.
    """
    request = pb.AuditRequest(
        since=time() - seconds_in(since, "--since"), adapter=adapter, tenant=tenant, kind=kind or ""
    )
    shown = console()
    found = False
    for line in client.ask(client.access.ReadAudit, request, timeout_s=None):
        found = True
        if as_json:
            print(line.json, flush=True)
        else:
            for part in parts_of(json.loads(line.json)):
                shown.print(part)
    if not (found or as_json):
        say(f"nothing was changed or denied in the last {since}")


def parts_of(line: dict[str, Any]) -> Iterator[RenderableType]:
    """Yield one change or denial in two lines: when, the result, who, what; then the details."""
    result = line["result"] + (f" x{line['count']}" if "count" in line else "")
    when = line["time"].replace("T", " ")[:19]
    about = line["resource"]
    version = f"@v{about['version']}" if "version" in about else ""
    name = about["name"] or ("" if about["sort"] == "system" else about["sort"])
    said = Text.assemble(
        f"{when}  ",
        result if line["result"] == "ok" else bad(result),
        f"  {_who(line)}  {line['verb'] or line['action']}",
        f"  {name}{version}" if name else "",
    )
    yield _folded(said, 0)
    details = "; ".join(_details(line))
    if details:
        yield _folded(Text(details), 2 * GAP)


def _folded(text: Text, indent: int) -> RenderableType:
    text.overflow = "fold"
    return Padding(text, (0, 0, 0, indent), expand=False)


def _who(line: dict[str, Any]) -> str:
    who = line["who"]
    named = "/".join(part for part in (who["tenant"], who["subject"]) if part)
    return named or (line["peer"] if line["proof"] == "none" else line["proof"])


def _details(line: dict[str, Any]) -> Iterator[str]:
    if line["why"]:
        yield line["why"]
    before, after = line.get("before", {}), line.get("after", {})
    if "key" in before and before["key"] == after.get("key"):
        yield f"key {before['key']}"
    for name in dict.fromkeys((*before, *after)):
        was, now = (_value(name, facts[name]) if name in facts else "none" for facts in (before, after))
        if was != now:
            yield f"{name} {was} -> {now}" if name in before else f"{name} {now}"
    if "since" in line:
        yield f"since {line['since'].replace('T', ' ')[:19]}"
    yield f"from {line['peer']} by {line['proof']}" if line["peer"] else f"by {line['proof']}"
    if ids := line.get("request_ids", [line["request_id"]] if line["request_id"] else []):
        yield f"id {', '.join(ids)}"


def _value(name: str, value: Any) -> str:
    if value is None:
        return "until resumed" if name == "paused_s" else "none"
    return value if value and isinstance(value, str) else json.dumps(value, ensure_ascii=False)
