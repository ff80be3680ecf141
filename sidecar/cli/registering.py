"""`sidecar adapters register`: register a folder that the sidecar sees, a URL, or a local folder under a name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from sidecar.cli import versions
from sidecar.cli.adapters import Name
from sidecar.cli.client import Client
from sidecar.cli.endpoint import admin_command
from sidecar.cli.exits import CommandError, Exit, say
from sidecar.cli.show import AsJson, bar, print_json, working
from sidecar.errors import Reason
from sidecar.model.reference import Reference
from sidecar.proto import admin_pb2 as pb


@admin_command
def register(
    client: Client,
    name: Name,
    path: Annotated[
        str, typer.Argument(help="PEFT folder, as the sidecar sees it, or the URL of one.", show_default=False)
    ],
    allow: Annotated[list[str] | None, typer.Option(help="A tenant that may use it; repeatable. Default: all.")] = None,
    pin: Annotated[bool, typer.Option("--pin", help="Keep it in the host store.")] = False,
    pushed: Annotated[
        bool, typer.Option("--push", help="Send a local folder, which the sidecar need not see.")
    ] = False,
    label: Annotated[list[str] | None, typer.Option(help="key=value about this version; repeatable.")] = None,
    stage: Annotated[bool, typer.Option("--stage", help="Add the version without making it current.")] = False,
    base: Annotated[str, typer.Option(help="The base model's name, if the adapter's config names another one.")] = "",
    hold: versions.Hold = "",
    as_json: AsJson = False,
) -> None:
    """Check an adapter's files and register them under a name. New content becomes a new version."""
    here = Path(path).expanduser()
    fields: dict[str, Any] = {"name": name, "allow": allow, "pin": pin, "stage": stage, "base": base}
    fields |= {"labels": versions.labels_of(label), "hold_s": versions.seconds_of(hold)}
    if pushed:
        answer = _push(client, here, **fields)
    else:
        place = str(here.resolve()) if here.exists() else path
        request = pb.RegisterRequest(path=place, **fields)
        with working(f"checking {path}"):
            answer = client.ask(client.adapters.Register, request, timeout_s=None)
    if as_json:
        print_json(answer)
        return
    say(_registered(answer))
    for warning in answer.warnings:
        say(f"warning: {warning}")


def _registered(answer: Any) -> str:
    adapter, version = answer.adapter, f"{answer.adapter.name}@{answer.version}"
    digest = next(held.digest for held in adapter.versions if held.version == answer.version)[:12]
    if version != adapter.version:
        return f"{version} staged: {digest}; {adapter.name} stays {Reference.of(adapter.version).selector}"
    done = "was registered already" if answer.unchanged else "registered"
    return f"{version} {done}: rank {adapter.rank}, {', '.join(adapter.modules)}, {digest}"


# Pushing a local folder.


def _push(client: Client, folder: Path, **fields: Any) -> Any:
    """Send a PEFT folder and return the sidecar's answer; `fields` are those of PushStart. Raises CommandError."""
    paths = _adapter_files(folder)
    with bar(f"hashing {folder}") as progress:
        start = pb.PushStart(files=_announced(paths, progress), **fields)
    with bar(f"sending {folder}") as progress:
        return client.ask(client.adapters.Push, _messages(start, paths, progress), timeout_s=None)


def _adapter_files(folder: Path) -> list[Path]:
    """Return the files of a folder that make an adapter. Raises CommandError for one that is missing."""
    from sidecar.adapters.origins.files import INDEX_FILE_NAME, WEIGHTS_FILE_NAME, files_of

    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "cannot be sent: there is no such folder"
        message = f"{folder} {problem}; give the folder of a PEFT adapter"
        raise CommandError(message, Exit.FAILED, Reason.ORIGIN_UNREADABLE.value)
    paths = files_of(folder)
    for path in paths:
        if not path.is_file():
            name = WEIGHTS_FILE_NAME if path.name == INDEX_FILE_NAME else path.name
            raise CommandError(
                f"{folder} has no {name}; give the folder of a PEFT adapter",
                Exit.FAILED,
                Reason.ORIGIN_UNREADABLE.value,
            )
    return paths


def _announced(paths: list[Path], progress: Callable[[int, int], None] | None) -> list[Any]:
    total, done, files = sum(path.stat().st_size for path in paths), 0, []
    for path in paths:
        sha256, size_bytes = hashlib.sha256(), 0
        for _, data in _pieces(path):
            sha256.update(data)
            size_bytes += len(data)
            done += len(data)
            if progress is not None:
                progress(done, total)
        files.append(pb.PushFile(name=path.name, size_bytes=size_bytes, sha256=sha256.hexdigest()))
    return files


def _messages(start: Any, paths: list[Path], progress: Callable[[int, int], None] | None) -> Iterator[Any]:
    yield pb.PushRequest(start=start)
    total, done = sum(file.size_bytes for file in start.files), 0
    for number, path in enumerate(paths):
        for offset, data in _pieces(path):
            yield pb.PushRequest(chunk=pb.PushChunk(file=number, offset=offset, data=data))
            done += len(data)
            if progress is not None:
                progress(done, total)


def _pieces(path: Path) -> Iterator[tuple[int, bytes]]:
    from sidecar.adapters.pushed import CHUNK_BYTES_MAX

    offset = 0
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES_MAX // 2):
            yield offset, data
            offset += len(data)
