"""`sidecar adapters list, show, evict, …`: show where adapters' weights are, and move or drop them."""

from __future__ import annotations

from math import inf
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from sidecar.cli import completing, versions
from sidecar.cli.client import Client
from sidecar.cli.durations import positive_seconds_in
from sidecar.cli.endpoint import admin_command
from sidecar.cli.exits import say
from sidecar.cli.show import AsJson, bad, console, duration, facts, print_json, size, table, titled, working
from sidecar.model.reference import Reference
from sidecar.proto import admin_pb2 as pb

Name = Annotated[
    str, typer.Argument(help="The adapter's name.", show_default=False, autocompletion=completing.adapter_names)
]
PLACES_LISTED_MAX = 3
TIERS = {"gpu": "gpu", "engine_host": "host", "loading": "loading"}


@admin_command
def list_adapters(
    client: Client,
    tenant: Annotated[str, typer.Option(help="Only adapters that this tenant may use.", show_default=False)] = "",
    state: Annotated[
        str,
        typer.Option(
            help="Only those that are loaded (an engine has it), stored (only the host store), cold or quarantined.",
            show_default=False,
        ),
    ] = "",
    unused: Annotated[
        str,
        typer.Option(
            "--unused-for",
            help="Only those without a request for that long, as in 7d. After a restart none has had one yet.",
            show_default=False,
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """List the registered adapters: version, shape, and where each is."""
    unused_s = positive_seconds_in(unused, "--unused-for") if unused else 0.0
    adapters = list(client.list_adapters(tenant=tenant, state=state, unused_s=unused_s))
    if as_json:
        print_json(adapters)
    elif not adapters and (state or unused):
        say('no adapter matches; list all with "sidecar adapters list"')
    elif not adapters and tenant:
        say(f'tenant "{tenant}" may use no adapter')
    elif not adapters:
        say('no adapter is registered; register one with "sidecar adapters register NAME PATH"')
    else:
        columns = ("NAME", "VERSION", ">RANK", "MODULES", "STORE", "ON", "NOTES")
        console().print(table(columns, [_row(adapter) for adapter in adapters]))


def _row(adapter: Any) -> tuple[str | Text, ...]:
    version = Reference.of(adapter.version).selector
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
        paused_phrase(adapter.paused_s) if adapter.paused_s else "",
        "pinned" if adapter.pinned else "",
        f"{adapter.canary_version} gets {adapter.canary_weight} %" if adapter.canary_weight else "",
        f"for {', '.join(adapter.allow)}" if adapter.allow else "",
        f"held for {duration(adapter.held_s)}" if adapter.held_s else "",
        f"{adapter.requests} in work" if adapter.requests else "",
        f"unfit for {unfit} of {len(adapter.backends)} backends" if unfit else "",
    ]
    return "; ".join(note for note in notes if note)


@admin_command
def show(client: Client, name: Name, as_json: AsJson = False) -> None:
    """Show one adapter: its facts, its copies in the host store, and its state on each backend with age and source."""
    adapter = client.ask(client.adapters.Get, pb.AdapterRequest(name=name))
    if as_json:
        print_json(adapter)
    else:
        console().print(Group(*shown(adapter)))


def shown(adapter: Any) -> list[Any]:
    head = facts(
        (
            ("adapter", adapter.version or adapter.name),
            ("quarantined", bad(adapter.quarantined) if adapter.quarantined else ""),
            ("paused", bad(paused_phrase(adapter.paused_s)) if adapter.paused_s else ""),
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
    from sidecar.shell.managing import owner_phrase

    return owner_phrase(adapter.managed_by) + (f", held for {duration(adapter.held_s)}" if adapter.held_s else "")


def _belief(place: Any) -> tuple[str, str]:
    return ("-", "-") if place.tier == "absent" else (duration(place.age_s), place.source)


@admin_command
def evict(client: Client, name: Name, as_json: AsJson = False) -> None:
    """Drop an adapter's weights now and keep its name; print what became of them where."""
    _print_places(client.ask(client.adapters.Evict, pb.AdapterRequest(name=name)), as_json)


@admin_command
def prefetch(
    client: Client,
    name: Name,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="A backend to load it on as well; repeatable.", autocompletion=completing.backend_ids),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Load an adapter into the host store, and onto the given backends."""
    request = pb.PrefetchRequest(name=name, backends=backend)
    _print_places(client.ask(client.adapters.Prefetch, request), as_json)


def _print_places(answer: Any, as_json: bool) -> None:
    if as_json:
        print_json(answer)
    else:
        console().print(table(("PLACE", "RESULT"), [(place.place, place.result) for place in answer.places]))


@admin_command
def unregister(client: Client, name: Name, hold: versions.Hold = "", as_json: AsJson = False) -> None:
    """Refuse new requests for a name, wait until its running ones end, then forget it."""
    request = pb.UnregisterRequest(name=name, hold_s=versions.seconds_of(hold))
    with working(f"waiting for requests of {name}"):
        answer = client.ask(client.adapters.Unregister, request, timeout_s=None)
    if as_json:
        print_json(answer)
    else:
        say(f"{name} is forgotten")
        if answer.places:
            _print_places(answer, as_json)


@admin_command
def pin(client: Client, name: Name, as_json: AsJson = False) -> None:
    """Keep an adapter in the host store until it is unpinned."""
    _print_done(client.ask(client.adapters.Pin, pb.AdapterRequest(name=name)), "stays in the host store", as_json)


@admin_command
def unpin(client: Client, name: Name, as_json: AsJson = False) -> None:
    """Undo a pin: the eviction policy may evict the adapter again."""
    _print_done(client.ask(client.adapters.Unpin, pb.AdapterRequest(name=name)), "may be evicted again", as_json)


@admin_command
def release(client: Client, name: Name, as_json: AsJson = False) -> None:
    """Lift a quarantine: the adapter's next load is tried alone in the whole pool."""
    adapter = client.ask(client.adapters.Release, pb.AdapterRequest(name=name))
    if as_json:
        print_json(adapter)
    else:  # in all its versions
        say(f"{adapter.name} is served again")


@admin_command
def pause(
    client: Client,
    name: Name,
    for_time: Annotated[
        str, typer.Option("--for", metavar="TIME", help="How long (30m, 2h). Default: until it is resumed.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Refuse new requests for a name for a while, or until it is resumed; its running ones end as usual."""
    seconds = positive_seconds_in(for_time, "--for") if for_time else 0.0
    adapter = client.ask(client.adapters.Pause, pb.PauseRequest(name=name, for_s=seconds))
    if as_json:
        print_json(adapter)
    else:  # a pause is of the name, in all its versions
        say(f"{adapter.name} is {paused_phrase(adapter.paused_s)}")


@admin_command
def resume(client: Client, name: Name, as_json: AsJson = False) -> None:
    """End a pause: requests for the name are taken again."""
    _print_done(client.ask(client.adapters.Resume, pb.AdapterRequest(name=name)), "takes requests", as_json)


def paused_phrase(paused_s: float) -> str:
    return "paused until it is resumed" if paused_s == inf else f"paused for {duration(paused_s)}"


def _print_done(adapter: Any, done: str, as_json: bool) -> None:
    if as_json:
        print_json(adapter)
    else:
        say(f"{adapter.version or adapter.name} {done}")
