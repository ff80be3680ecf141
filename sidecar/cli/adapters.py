"""`sidecar adapters`: what names stand for, where the weights are, and what an operator can do about it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from sidecar.cli import verifying, versions
from sidecar.cli.client import Client, admin_command
from sidecar.cli.pushing import push
from sidecar.cli.show import AsJson, bad, console, duration, facts, print_json, size, table, titled, working
from sidecar.proto import admin_pb2 as pb
from sidecar.shell.managing import in_words

app = typer.Typer(help="Register adapters, see where they are, move and forget them.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The adapter's name.", show_default=False)]
versions.add_to(app)
verifying.add_to(app)
PLACES_LISTED_MAX = 3
TIERS = {"gpu": "gpu", "engine_host": "host", "loading": "loading"}


@admin_command(app, "register")
def register(
    client: Client,
    name: Name,
    path: Annotated[
        str, typer.Argument(help="PEFT folder, as the sidecar sees it, or the URL of one.", show_default=False)
    ],
    allow: Annotated[list[str] | None, typer.Option(help="A tenant that may use it; repeat it. None: all.")] = None,
    pin: Annotated[bool, typer.Option("--pin", help="Keep it in the host store.")] = False,
    pushed: Annotated[
        bool, typer.Option("--push", help="Send the folder of this machine; the sidecar need not see it.")
    ] = False,
    label: Annotated[list[str] | None, typer.Option(help="key=value about this version; repeat it.")] = None,
    stage: Annotated[bool, typer.Option("--stage", help="Add the version without moving the name.")] = False,
    base: Annotated[str, typer.Option(help="The base model's name, if not the one it was trained under.")] = "",
    hold: versions.Hold = "",
    as_json: AsJson = False,
) -> None:
    """Check an adapter's files and let a name stand for them. New content is a new version."""
    here = Path(path).expanduser()
    fields: dict[str, Any] = {"name": name, "allow": allow, "pin": pin, "stage": stage, "base": base}
    fields |= {"labels": versions.labels_of(label), "hold_s": versions.seconds_of(hold)}
    if pushed:
        answer = push(client, here, **fields)
    else:
        place = str(here.resolve()) if here.exists() else path
        request = pb.RegisterRequest(path=place, **fields)
        with working(f"checking {path}"):
            answer = client.ask(client.adapters.Register, request, timeout_s=None)
    if as_json:
        print_json(answer)
        return
    print(_registered(answer))
    for warning in answer.warnings:
        print(f"warning: {warning}")


def _registered(answer: Any) -> str:
    adapter, version = answer.adapter, f"{answer.adapter.name}@{answer.version}"
    digest = next(held.digest for held in adapter.versions if held.version == answer.version)[:12]
    if version != adapter.version:
        return f"{version} staged: {digest}; {adapter.name} stays {adapter.version.rpartition('@')[2]}"
    done = "was registered already" if answer.unchanged else "registered"
    return f"{version} {done}: rank {adapter.rank}, {', '.join(adapter.modules)}, {digest}"


@admin_command(app, "list")
def list_adapters(client: Client, as_json: AsJson = False) -> None:
    """List the registered adapters: version, shape, and where each is."""
    adapters = client.ask(client.adapters.List, pb.ListAdaptersRequest()).adapters
    if as_json:
        print_json(list(adapters))
    elif not adapters:
        print('no adapter is registered; register one with "sidecar adapters register NAME PATH"')
    else:
        columns = ("NAME", "VERSION", ">RANK", "MODULES", "STORE", "ON", "NOTES")
        console().print(table(columns, [_row(adapter) for adapter in adapters]))


def _row(adapter: Any) -> tuple[str | Text, ...]:
    version = adapter.version.rpartition("@")[2]
    rank = str(adapter.rank)
    return adapter.name, version, rank, _modules(adapter.modules), _stored(adapter), _places(adapter), _notes(adapter)


def _modules(modules: Any) -> str:
    return ",".join(modules) if len(modules) <= PLACES_LISTED_MAX else f"{len(modules)} kinds"


def _stored(adapter: Any) -> str:
    if not adapter.store:
        return "-"
    copies = [
        f"{copy.tier} {size(copy.size_bytes)}{'' if copy.state == 'held' else f' {copy.state}'}"
        for copy in adapter.store
    ]
    return ", ".join(copies)


def _places(adapter: Any) -> str:
    places = [f"{place.backend} {TIERS[place.tier]}" for place in adapter.backends if place.tier in TIERS]
    more = len(places) - PLACES_LISTED_MAX
    return ", ".join(places[:PLACES_LISTED_MAX]) + (f" +{more}" if more > 0 else "") or "-"


def _notes(adapter: Any) -> str | Text:
    if adapter.quarantined:
        return bad("quarantined")
    unfit = sum(bool(place.unfit) for place in adapter.backends)
    notes = [
        "pinned" if adapter.pinned else "",
        f"for {', '.join(adapter.allow)}" if adapter.allow else "",
        f"held for {duration(adapter.held_s)}" if adapter.held_s else "",
        f"{adapter.requests} in work" if adapter.requests else "",
        f"unfit for {unfit} of {len(adapter.backends)} backends" if unfit else "",
    ]
    return "; ".join(note for note in notes if note)


@admin_command(app, "show")
def show(client: Client, name: Name, as_json: AsJson = False) -> None:
    """Show one adapter: its facts, its copies in the host store, and each backend's belief with age and source."""
    adapter = client.ask(client.adapters.Get, pb.AdapterRequest(name=name))
    if as_json:
        print_json(adapter)
    else:
        console().print(Group(*_shown(adapter)))


def _shown(adapter: Any) -> list[Any]:
    head = facts(
        (
            ("adapter", adapter.version),
            ("quarantined", bad(adapter.quarantined) if adapter.quarantined else ""),
            ("digest", adapter.digest),
            ("base model", adapter.base_model),
            ("path", adapter.path),
            ("shape", f"rank {adapter.rank}, {adapter.dtype}, {', '.join(adapter.modules)}"),
            ("pinned", "yes" if adapter.pinned else "no"),
            ("allowed", ", ".join(adapter.allow) or "all tenants"),
            ("managed by", _manager(adapter)),
            ("requests", f"{adapter.requests} waiting or running"),
        )
    )
    copies = [
        (copy.tier, copy.dtype, copy.state, size(copy.size_bytes), str(copy.pins), copy.task_id)
        for copy in adapter.store
    ]
    store = table(("TIER", "DTYPE", "STATE", ">SIZE", ">PINS", "TASK ID"), copies) if copies else Text("not held")
    places = [
        (place.backend, place.tier, *_belief(place), bad(place.unfit) if place.unfit else "")
        for place in adapter.backends
    ]
    backends = table(("BACKEND", "TIER", ">AGE", "SOURCE", "CANNOT SERVE IT"), places) if places else Text("none")
    return [
        head,
        *titled("versions", versions.versions_table(adapter)),
        *titled("host store", store),
        *titled("backends", backends),
    ]


def _manager(adapter: Any) -> str:
    return in_words(adapter.managed_by) + (f", held for {duration(adapter.held_s)}" if adapter.held_s else "")


def _belief(place: Any) -> tuple[str, str]:
    return ("-", "-") if place.tier == "absent" else (duration(place.age_s), place.source)


@admin_command(app, "evict")
def evict(client: Client, name: Name, as_json: AsJson = False) -> None:
    """Drop an adapter's weights now. The name stays; the answer says what could not be done where."""
    _print_places(client.ask(client.adapters.Evict, pb.AdapterRequest(name=name)), as_json)


@admin_command(app, "prefetch")
def prefetch(
    client: Client,
    name: Name,
    backend: Annotated[list[str] | None, typer.Option(help="A backend to load it on as well; repeat it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Bring an adapter into the host store, and onto the backends that are named."""
    request = pb.PrefetchRequest(name=name, backends=backend)
    _print_places(client.ask(client.adapters.Prefetch, request), as_json)


def _print_places(answer: Any, as_json: bool) -> None:
    if as_json:
        print_json(answer)
    else:
        console().print(table(("PLACE", "RESULT"), [(place.place, place.result) for place in answer.places]))


@admin_command(app, "unregister")
def unregister(client: Client, name: Name, hold: versions.Hold = "", as_json: AsJson = False) -> None:
    """Take nothing new for a name, wait until what is under way is answered, then forget it."""
    request = pb.UnregisterRequest(name=name, hold_s=versions.seconds_of(hold))
    with working(f"waiting for requests of {name}"):
        answer = client.ask(client.adapters.Unregister, request, timeout_s=None)
    if as_json:
        print_json(answer)
    else:
        print(f"{name} is forgotten")


@admin_command(app, "pin")
def pin(client: Client, name: Name, as_json: AsJson = False) -> None:
    """Keep an adapter in the host store until it is unpinned."""
    _print_done(client.ask(client.adapters.Pin, pb.AdapterRequest(name=name)), "stays in the host store", as_json)


@admin_command(app, "unpin")
def unpin(client: Client, name: Name, as_json: AsJson = False) -> None:
    """Let the eviction policy have an adapter again."""
    _print_done(client.ask(client.adapters.Unpin, pb.AdapterRequest(name=name)), "may be evicted again", as_json)


@admin_command(app, "release")
def release(client: Client, name: Name, as_json: AsJson = False) -> None:
    """Lift a quarantine: the adapter's next load is its first, alone in the whole pool."""
    _print_done(client.ask(client.adapters.Release, pb.AdapterRequest(name=name)), "is served again", as_json)


def _print_done(adapter: Any, done: str, as_json: bool) -> None:
    if as_json:
        print_json(adapter)
    else:
        print(f"{adapter.version} {done}")
