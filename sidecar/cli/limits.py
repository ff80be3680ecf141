"""`sidecar limits`: set, list and remove what requests may take."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Annotated, Any

import typer

from sidecar.cli.client import Client
from sidecar.cli.endpoint import admin_command
from sidecar.cli.exits import CommandError, Exit, say
from sidecar.cli.show import AsJson, console, print_json, table
from sidecar.proto import admin_pb2 as pb

Tenant = Annotated[
    str | None,
    typer.Argument(help='The tenant; "*" gives each one its own. Without one all share it.', show_default=False),
]
Class = Annotated[
    str | None, typer.Option("--class", help='Only requests of this class; "*": of each.', show_default=False)
]
Adapter = Annotated[str | None, typer.Option(help='Only requests of this adapter; "*": of each.', show_default=False)]
Count = Annotated[
    str, typer.Option(metavar="COUNT", help="As 500, 20k or 1.5M; none takes it away.", show_default=False)
]
Tokens = Annotated[str, typer.Option(help="The tokens that the limit counts: both, input or output.")]
TOKENS = ("both", "input", "output")
_COUNT = re.compile(r"(\d+(?:\.\d+)?)([kMG]?)")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}


@admin_command
def set_limit(
    client: Client,
    tenant: Tenant = None,
    klass: Class = None,
    adapter: Adapter = None,
    tokens: Tokens = "both",
    tokens_per_minute: Count = "",
    tokens_per_hour: Count = "",
    tokens_per_day: Count = "",
    requests_per_minute: Count = "",
    requests_per_hour: Count = "",
    requests_per_day: Count = "",
    concurrent: Annotated[str, typer.Option(metavar="COUNT", help="Requests at once.", show_default=False)] = "",
    queued_tokens: Annotated[
        str, typer.Option(metavar="COUNT", help="Tokens that wait for an engine at once.", show_default=False)
    ] = "",
    max_tokens: Annotated[
        str, typer.Option(metavar="COUNT", help="The longest answer that may be asked for.", show_default=False)
    ] = "",
    default_max_tokens: Annotated[
        str, typer.Option(metavar="COUNT", help="The longest answer without a max_tokens.", show_default=False)
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Set numbers of a limit, at once and on every replica, and print the whole limit that is then in force.

    The limit's other numbers stay as they are, those of the configuration too; none takes one away. All limits that
    match a request apply to it. What was taken before in this minute, hour or day counts.
    """
    given = {
        "tokens_per_minute": tokens_per_minute,
        "tokens_per_hour": tokens_per_hour,
        "tokens_per_day": tokens_per_day,
        "requests_per_minute": requests_per_minute,
        "requests_per_hour": requests_per_hour,
        "requests_per_day": requests_per_day,
        "concurrent": concurrent,
        "queued_tokens": queued_tokens,
        "max_tokens": max_tokens,
        "default_max_tokens": default_max_tokens,
    }
    numbers: dict[str, Any] = {
        name: _count(text, f"--{name.replace('_', '-')}") for name, text in given.items() if text
    }
    request = pb.Limit(**_words(tenant, klass, adapter), tokens=_known(tokens), **numbers)
    if not numbers:
        raise CommandError("say which number to set, such as --tokens-per-minute 20k", Exit.MISUSED)
    limit = client.ask(client.access.SetLimit, request)
    if adapter not in (None, "*", "base"):
        with suppress(CommandError):  # who sets limits need not see adapters
            if all(adapter != each.name for each in client.list_adapters()):
                say(f"warning: you see no adapter called {adapter}; the limit waits for one", error=True)
    if as_json:
        print_json(limit)
    else:
        say(f"{_whose(limit)}: {', '.join(f'{name} {value:,}' for name, value in _numbers(limit))}")


@admin_command
def list_limits(
    client: Client,
    tenant: Annotated[str, typer.Option(help="Only limits that apply to this tenant.", show_default=False)] = "",
    as_json: AsJson = False,
) -> None:
    """List the limits in force, and what is taken of each now.

    What is taken of a limit for each tenant is shown with --tenant.
    """
    limits = client.ask(client.access.ListLimits, pb.ListLimitsRequest(tenant=tenant)).limits
    if as_json:
        print_json(list(limits))
    elif not limits:
        say("no limits; sidecar limits set TENANT --tokens-per-minute 20k sets one")
    else:
        columns = ("TENANT", "CLASS", "ADAPTER", "NUMBER", "LIMIT", "TAKEN", "SET IN")
        console().print(table(columns, [row for limit in limits for row in _rows(limit)]))


@admin_command
def remove(
    client: Client,
    tenant: Tenant = None,
    klass: Class = None,
    adapter: Adapter = None,
    tokens: Tokens = "both",
    as_json: AsJson = False,
) -> None:
    """Remove a limit that was set with limits set; one of the configuration for the same counts again."""
    request = pb.RemoveLimitRequest(**_words(tenant, klass, adapter), tokens=_known(tokens))
    limit = client.ask(client.access.RemoveLimit, request)
    if as_json:
        print_json(limit)
    else:
        say(f"{_whose(limit)}: the limit is removed")


def _words(tenant: str | None, klass: str | None, adapter: str | None) -> dict[str, Any]:
    """Return whose limit it is.

    Raises CommandError for an empty word, as a shell makes it of an unset variable: it would limit all together.
    """
    words = {"tenant": tenant, "class": klass, "adapter": adapter}
    for name, word in words.items():
        if word == "":
            raise CommandError(f"the {name} is empty; leave it out for a limit of all together", Exit.MISUSED)
    return {name: word for name, word in words.items() if word is not None}


def _known(tokens: str) -> str:
    if tokens not in TOKENS:
        raise CommandError(f'--tokens: "{tokens}" is none of {", ".join(TOKENS)}', Exit.MISUSED)
    return tokens


def _count(text: str, option: str) -> int:
    """Return the number of "500", "20k" or "1.5M", 0 of "none". Raises CommandError for any other text."""
    if text == "none":
        return 0
    found = _COUNT.fullmatch(text)
    count = 0 if found is None else round(float(found[1]) * _UNITS[found[2]])
    if not 0 < count < 1 << 63:
        raise CommandError(
            f'{option} wants a number from 1 on, such as 500, 20k or 1.5M, or none; got "{text}"', Exit.MISUSED
        )
    return count


def _numbers(limit: Any) -> list[tuple[str, int]]:
    counted = [(field, value) for field, value in limit.ListFields() if field.type == field.TYPE_UINT64]
    of = "" if limit.tokens == "both" else f" ({limit.tokens})"
    return [(field.name + (of if "tokens_per" in field.name else ""), value) for field, value in counted]


def _whose(limit: Any) -> str:
    words = (("tenant", limit.tenant), ("class", getattr(limit, "class")), ("adapter", limit.adapter))
    return ", ".join(f"each {noun}" if word == "*" else f"{noun} {word}" for noun, word in words if word) or "all"


def _rows(limit: Any) -> list[tuple[str, ...]]:
    words = (limit.tenant or "-", getattr(limit, "class") or "-", limit.adapter or "-")
    rows: list[tuple[str, ...]] = []
    for name, value in _numbers(limit):
        taken = limit.taken.get(name.partition(" ")[0])
        rows.append((*words, name, f"{value:,}", "-" if taken is None else f"{taken:,}", limit.source))
    return rows
