"""`sidecar backends`: show the engines' states, check them, and drain or restore them."""

from __future__ import annotations

import os
from pathlib import Path
from time import monotonic, sleep
from typing import Annotated, Any, Literal

import typer
from rich.console import Group
from rich.text import Text

from sidecar.backends.triton.entry import usual_metrics_url
from sidecar.backends.triton.kind import TRITON
from sidecar.cli import completing
from sidecar.cli.client import Client, connected
from sidecar.cli.endpoint import ENGINES, PANEL, AllowCleartext, admin_command
from sidecar.cli.exits import CommandError, Exit, say
from sidecar.cli.listener import ADMIN_DEFAULT, ADMIN_VARIABLE, CA_VARIABLE, TOKEN_FILE_VARIABLE, Endpoint
from sidecar.cli.show import AsJson, bad, console, duration, facts, print_json, table, titled
from sidecar.proto import admin_pb2 as pb

ENGINE = "Engine"
COLUMNS = ("BACKEND", "STATE", ">SEATS", ">QUEUED", ">PAGES", ">OPEN", ">RESIDENT", ">HEALS", "DETAIL")
POLL_S = 0.5
SAID_EVERY_S = 10.0
"""So often a wait says that it goes on, though nothing has changed."""
GOOD = ("up", "joining")
"""The states of a backend that serves, or is about to."""
DRAINED = ("draining", "drained")

ONE_PAGE_EACH = "each adapter is counted as one page; backends[].engine.config would tell its pages"
PACES = {
    "calibrated": "calibrated from its cost file",
    "learned": "learned from its runs",
    "guess": "a guess until its runs have said more, or backends[].engine.cost names a cost file",
}
"""What is known of an engine's step time."""

Identity = Annotated[
    str,
    typer.Argument(
        metavar="BACKEND", help="The backend's id.", show_default=False, autocompletion=completing.backend_ids
    ),
]


@admin_command
def list_backends(client: Client, as_json: AsJson = False) -> None:
    """List the backends: state, seats, open adapters."""
    backends = client.ask(client.backends.List, pb.ListBackendsRequest()).backends
    if as_json:
        print_json(list(backends))
    elif not backends:
        say("there is no backend: none is configured, or none has been found yet")
    else:
        console().print(table(COLUMNS, [_row(backend) for backend in backends]))


def _row(backend: Any) -> tuple[str | Text, ...]:
    return (
        backend.id,
        _state(backend),
        f"{backend.running}/{seats_of(backend)}",
        str(backend.queued),
        _pages(backend),
        str(len(backend.open)),
        str(len(backend.resident)),
        str(len(backend.heals)),
        "; ".join(filter(None, (_past_limit(backend), backend.detail))),
    )


def state_of(backend: Any) -> str:
    """Return a backend's state, and that it is drained where the state does not say so."""
    is_told = not backend.draining or backend.state in DRAINED
    return str(backend.state) if is_told else f"{backend.state}, drained"


def seats_of(shown: Any) -> str:
    """Return the seats of a backend or a pool, with "~" if they are assumed."""
    return f"{'~' if shown.seats_assumed else ''}{shown.seats}"


def drained(backend: Any) -> str:
    """Return what came of a drain, with how to avoid that waiting requests are refused."""
    if not backend.refused:
        return f"{backend.id} drains"
    requests = "1 waiting request was" if backend.refused == 1 else f"{backend.refused} waiting requests were"
    return (
        f"{requests} refused, for nothing else can serve such; to avoid that, undrain {backend.id}, or drain it once "
        "another engine that serves them is up"
    )


def undrained(backend: Any) -> str:
    """Return what came of ending a drain."""
    if backend.state in GOOD:
        return f"{backend.id} takes requests again"
    return f"{backend.id} is no longer drained; it is {backend.state}"


def _state(backend: Any) -> str | Text:
    return state_of(backend) if backend.state in GOOD else bad(state_of(backend))


def _pages(backend: Any) -> str:
    """Return the pages of open versions and their limit, with "~" for what is assumed, or learned from loads."""
    learned = "" if backend.device_pages or not backend.page_limit else "~"
    return f"{'~' if _guesses_pages(backend) else ''}{_open_pages(backend)}/{learned}{backend.page_limit or '?'}"


def _guesses_pages(backend: Any) -> bool:
    """Return True if pages are declared, but not what tells how many of them an adapter takes."""
    return bool(backend.pages_assumed and (backend.device_pages or backend.host_pages))


def _open_pages(backend: Any) -> int:
    return sum(version.pages for version in backend.open)


def _past_limit(backend: Any) -> str:
    """Return why more is open than fits at once, pages or adapters; "" if that is not so."""
    more = _open_pages(backend) - backend.page_limit
    if more <= 0 or not backend.page_limit:
        return ""
    return f"{more} more open than is believed to fit: some close before another adapter opens"


@admin_command
def show(client: Client, backend: Identity, as_json: AsJson = False) -> None:
    """Show one backend: seats, pages, open adapters, what pins them, and its last heals."""
    _print(client.ask(client.backends.Get, pb.BackendRequest(backend=backend)), as_json)


def check(
    url: Annotated[
        str | None,
        typer.Argument(
            metavar="URL",
            help=f"{ENGINES}, or the id of a backend of --config.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A sidecar's configuration with this backend.", rich_help_panel=ENGINE)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The core model.", rich_help_panel=ENGINE, show_default="tensorrt_llm")
    ] = None,
    metrics: Annotated[str | None, typer.Option(help="URL of the metrics.", rich_help_panel=ENGINE)] = None,
    engine_config: Annotated[
        Path | None, typer.Option(help="TensorRT-LLM's config.json of the engine.", rich_help_panel=ENGINE)
    ] = None,
    dtype: Annotated[
        Literal["float16", "bfloat16"] | None, typer.Option(help="The engine's dtype.", rich_help_panel=ENGINE)
    ] = None,
    base_model: Annotated[
        Path | None, typer.Option("--base", help="The base model's config.json or folder.", rich_help_panel=ENGINE)
    ] = None,
    adapters: Annotated[
        Path | None, typer.Option(help="Folder of the PEFT adapters that it must serve.", rich_help_panel=ENGINE)
    ] = None,
    adapters_dir: Annotated[
        str | None,
        typer.Option(
            help="Folder from which the engine reads adapters: PATH, or PATH:ENGINE_PATH.", rich_help_panel=ENGINE
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the API key of a vLLM or an SGLang.", rich_help_panel=ENGINE)
    ] = None,
    ca: Annotated[
        Path | None, typer.Option(help="PEM file of the CA of the server's certificate.", rich_help_panel=PANEL)
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option("--certificate", help="PEM file of our own certificate.", rich_help_panel=PANEL)
    ] = None,
    key: Annotated[Path | None, typer.Option(help="PEM file of our own key.", rich_help_panel=PANEL)] = None,
    admin: Annotated[
        str,
        typer.Option(envvar=ADMIN_VARIABLE, help="Address of the admin listener, without URL.", rich_help_panel=PANEL),
    ] = ADMIN_DEFAULT,
    token_file: Annotated[
        Path | None,
        typer.Option(envvar=TOKEN_FILE_VARIABLE, help="File with a key or a token to send.", rich_help_panel=PANEL),
    ] = None,
    allow_cleartext: AllowCleartext = False,
    as_json: AsJson = False,
) -> int:
    """Check a live engine step by step and say what to change; exit 1 if a check fails.

    No sidecar need run. A serving engine is not disturbed: it gets a few one-token requests and two tiny adapters.

    Without URL, ask a running sidecar whether each of its backends serves.
    """
    if url is None:
        variable = os.environ.get(CA_VARIABLE)
        its_ca = ca or (Path(variable) if variable else None)
        endpoint = Endpoint(admin, "admin", "--admin", token_file, its_ca, certificate, key, allow_cleartext)
        with connected(endpoint) as client:
            return _seen_by_a_sidecar(client, as_json)
    from sidecar.cli.probing import Wanted, check_url

    files = (("ca", ca), ("certificate", certificate), ("key", key))
    tls = {name: str(path) for name, path in files if path is not None}
    wanted = Wanted(config, model, metrics, engine_config, dtype, base_model, adapters, tls, adapters_dir, api_key_file)
    return check_url(url, wanted, as_json)


def _seen_by_a_sidecar(client: Client, as_json: bool) -> int:
    """Print for each backend whether it serves, and which of its facts are known."""
    backends = client.ask(client.backends.List, pb.ListBackendsRequest()).backends
    if as_json:
        print_json(list(backends))
    else:
        columns = ("BACKEND", "STATE", "PACE", ">WAIT", "DETAIL")
        rows = [(b.id, _state(b), PACES.get(b.pace, b.pace), _predicted(b), b.detail) for b in backends]
        console().print(table(columns, rows))
    down = [backend.id for backend in backends if backend.state not in GOOD]
    if down:
        raise CommandError(f"{', '.join(down)}: not up")
    return Exit.OK


@admin_command
def drain(
    client: Client,
    backend: Identity,
    wait: Annotated[bool, typer.Option("--wait", help="Return only when nothing runs there any more.")] = False,
    as_json: AsJson = False,
) -> None:
    """Stop sending requests to a backend. Running ones end there; waiting ones go elsewhere.

    Waiting ones that nothing else can serve are refused. To avoid that, drain it once another engine that serves them
    is up.
    """
    answer = client.ask(client.backends.Drain, pb.BackendRequest(backend=backend))
    refused = answer.refused
    if refused and not as_json:
        say(drained(answer))
    if wait:
        answer = _emptied(client, answer)
        answer.refused = refused
    if as_json:
        print_json(answer)
    elif answer.state == "draining":
        say(f"{answer.id} is draining, {answer.running} still running")
    else:
        say(f"{answer.id} is {state_of(answer)}: nothing runs there")


def _emptied(client: Client, answer: Any) -> Any:
    """Wait until a drained backend runs nothing; print how much it still runs when that changes, and now and then."""
    running, said_s = None, 0.0
    while answer.state == "draining":
        if answer.running != running or monotonic() - said_s >= SAID_EVERY_S:
            running, said_s = answer.running, monotonic()
            say(f"{answer.id} is draining, {running} still running", error=True)
        sleep(POLL_S)
        answer = client.ask(client.backends.Get, pb.BackendRequest(backend=answer.id))
    if answer.state not in ("drained", "down"):  # it was undrained meanwhile
        raise CommandError(f"{answer.id} is {answer.state}, so it does not become empty: somebody ended the drain")
    return answer


@admin_command
def undrain(client: Client, backend: Identity, as_json: AsJson = False) -> None:
    """Return a drained backend to service."""
    answer = client.ask(client.backends.Undrain, pb.BackendRequest(backend=backend))
    if as_json:
        print_json(answer)
    else:
        say(undrained(answer))


@admin_command
def add(
    client: Client,
    backend: Annotated[str, typer.Argument(metavar="BACKEND", help="Its id.", show_default=False)],
    url: Annotated[
        str,
        typer.Option("--address", help=f"{ENGINES}.", show_default=False),
    ],
    like: Annotated[
        str,
        typer.Option(
            metavar="BACKEND",
            help="A backend whose settings it gets, but for url and metrics.",
            show_default=False,
            autocompletion=completing.backend_ids,
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Add a backend to a running sidecar, until its configuration is read again or it ends: the file wins.

    To keep it, write it into the configuration file, under the same id and with the same settings.
    """
    _print(client.ask(client.backends.Add, pb.AddBackendRequest(backend=backend, url=url, like=like)), as_json)
    scheme, _, address = url.partition("://")
    if scheme == TRITON.name and usual_metrics_url(address) is None:
        say(
            f"no metrics: they are at no usual place of {address}, so a stall is noticed after twice its "
            "progress_timeout_s; the configuration file names their URL by backends[].metrics",
            error=True,
        )


@admin_command
def remove(client: Client, backend: Identity, as_json: AsJson = False) -> None:
    """Take a backend out of a running sidecar, until its configuration is read again or it ends: the file wins.

    It gets nothing new. What runs there, and what waits there and no other backend takes, ends there first.
    """
    answer = client.ask(client.backends.Remove, pb.BackendRequest(backend=backend))
    if as_json:
        print_json(answer)
    elif answer.state == "removed":
        print(f"{answer.id} is taken out")
    else:
        print(f"{answer.id} is being taken out, {answer.running} still running")


def _print(backend: Any, as_json: bool) -> None:
    if as_json:
        print_json(backend)
    else:
        console().print(Group(*shown(backend)))


def shown(backend: Any) -> list[Any]:
    from sidecar.backends.registry import model_kind, url_of

    kind = model_kind(backend.kind)
    head = facts(
        (
            ("backend", backend.id),
            ("state", _state(backend)),
            ("detail", backend.detail),
            ("address", url_of(backend.kind, backend.address)),
            ("engine", _engine(backend)),
            ("pace", f"{PACES.get(backend.pace, backend.pace)}; {_wait(backend)}"),
            ("seats", f"{backend.running} of {seats_of(backend)} taken, {backend.queued} queued"),
            ("adapters" if kind.page_is_adapter else "pages", _page_facts(backend, kind)),
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


def _predicted(backend: Any) -> str:
    return duration(backend.predicted_wait_s) if backend.HasField("predicted_wait_s") else "?"


def _wait(backend: Any) -> str:
    if backend.state not in GOOD:
        return f"no new request is sent there: it is {state_of(backend)}"
    told, wait_s = backend.HasField("predicted_wait_s"), backend.predicted_wait_s
    wait = f"wait {duration(wait_s)}" if wait_s else "not wait" if told else "wait for an unknown time"
    behind = " behind all that is queued" if wait_s else ""
    return f"a request that came now would {wait}{behind}"


def _page_facts(backend: Any, kind: Any) -> str:
    """Return the number of pages, and of pages in use."""
    host = str(backend.host_pages or "?")
    if backend.host_pages and backend.host_pages_assumed:
        host += " (assumed; declare backends[].engine.host_pages)"
    places = kind.pages.format(host=host, device=backend.device_pages or "?")
    learned = "" if backend.device_pages or not backend.page_limit else ", as learned from loads"
    parts = (f"{_open_pages(backend)} open, at most {backend.page_limit or '?'} at once{learned}", _past_limit(backend))
    return "; ".join(filter(None, (*parts, places, ONE_PAGE_EACH if _guesses_pages(backend) else "")))
