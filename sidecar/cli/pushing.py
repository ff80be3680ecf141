"""`sidecar adapters register --push`: send a folder of this machine to a sidecar that cannot see it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sidecar.adapters.origins.files import INDEX_FILE_NAME, WEIGHTS_FILE_NAME, files_of
from sidecar.adapters.pushed import CHUNK_BYTES_MAX
from sidecar.cli.bars import bar
from sidecar.cli.client import Client
from sidecar.cli.exits import CommandError, Exit
from sidecar.errors import Reason
from sidecar.proto import admin_pb2 as pb

CHUNK_BYTES = CHUNK_BYTES_MAX // 2


def push(client: Client, folder: Path, **fields: Any) -> Any:
    """Send a PEFT folder and return the sidecar's answer; `fields` are those of PushStart. Raises CommandError."""
    paths = adapter_files(folder)
    with bar(f"hashing {folder}") as progress:
        start = pb.PushStart(files=_announced(paths, progress), **fields)
    with bar(f"sending {folder}") as progress:
        return client.ask(client.adapters.Push, _messages(start, paths, progress), timeout_s=None)


def adapter_files(folder: Path) -> list[Path]:
    """Return the files of a folder that make an adapter. Raises CommandError for one that is missing."""
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
    offset = 0
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            yield offset, data
            offset += len(data)
