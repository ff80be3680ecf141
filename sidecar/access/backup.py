"""A backup of the shared state in one file: names, keys and limits, and the usage of a data directory.

The file is a zip with a manifest. Each part is a SQLite file, whatever store it came from. Entries are copied as text:
those that this release cannot read are kept too. Weights are not part of it. A key that was revoked after the backup
stays revoked where the place that is restored, or its data directory, has that (see `restoring`).
"""

from __future__ import annotations

import json
import os
import sqlite3
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import asdict, dataclass, replace
from hashlib import file_digest
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from time import time
from typing import Any

from sidecar.access.entries import CODEC, KEY, LIMIT
from sidecar.access.restoring import Keys, Raw, merged
from sidecar.access.store import COPY, FILE, FOLDER, USES
from sidecar.access.usage.keeper import USAGE_FILE
from sidecar.config.redis_address import RedisLocation
from sidecar.errors import Misused, Reason
from sidecar.state.codec import Codec
from sidecar.state.contents import Contents, RegistryStore, SqliteFile
from sidecar.state.registry import REGISTRY_FILE, lock_data_directory
from sidecar.state.sqlite_faults import translated_errors
from sidecar.state.written import ADAPTERS

FORMAT = 1
MANIFEST = "manifest.json"
MANIFEST_BYTES_MAX = 1 << 20
COPIED_BYTES = 1 << 20


def _raw(codec: Codec[Any]) -> Codec[Raw]:
    return replace(
        codec,
        name_of=lambda entry: entry[0],
        to_json=lambda entry: entry[1],
        from_json=lambda name, text: (name, text),
    )


NAMES, ACCESS = "names.sqlite", "access.sqlite"
REGISTRIES = {
    NAMES: (Path(REGISTRY_FILE), _raw(ADAPTERS)),
    ACCESS: (Path(FOLDER) / FILE, _raw(CODEC)),
}
"""The registries by the names of their parts: the file in a data directory, and how entries are copied."""
FILES = {"usage.sqlite": USAGE_FILE, "used.sqlite": Path(FOLDER) / USES}
"""The SQLite files of a data directory that are copied as they are, by the names of their parts."""


@dataclass(frozen=True)
class StateLocation:
    """Where a sidecar keeps its state: a data directory, and with `redis` the registries there."""

    data: Path | None
    redis: RedisLocation | None = None

    def __str__(self) -> str:
        locations = (None if self.redis is None else f"Redis at {self.redis.address}", self.data)
        return " and ".join(str(location) for location in locations if location is not None)

    def store(self, part: str) -> RegistryStore[Raw] | None:
        """Return the store of a registry; None if it is in memory only."""
        path, codec = REGISTRIES[part]
        if self.redis is not None:
            from sidecar.state.redis.contents import RedisRegistryStore
            from sidecar.state.redis.link import Link

            return RedisRegistryStore(Link(self.redis, codec))
        return None if self.data is None else SqliteFile(self.data / path, codec)


@dataclass(frozen=True)
class Part:
    """A part as the manifest lists it."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Summary:
    """What a backup holds; `made_at` is in Unix seconds."""

    release: str
    made_at: float
    adapters: int
    keys: int
    limits: int
    parts: tuple[Part, ...]

    @property
    def has_usage(self) -> bool:
        return any(part.file == "usage.sqlite" for part in self.parts)


async def backup(location: StateLocation, out: Path, force: bool = False) -> Summary:
    """Write a backup. A sidecar may work there meanwhile.

    Raises Misused if there is nothing to back up or, unless `force` is set, if the file exists already, and
    Refused(STATE_UNAVAILABLE) if a store cannot be read.
    """
    _check_free(out, force)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder = Path(scratch)
        for part in REGISTRIES:
            await _take(location, part, folder / part)
        return _packed(location, folder, out)


@dataclass(frozen=True)
class Restored:
    """What the backup holds, and what became of its keys."""

    backup: Summary
    keys: Keys


async def restore(location: StateLocation, path: Path, force: bool = False, with_keys: bool = True) -> Restored:
    """Put a backup in place of what is there. No sidecar may work on it.

    Keys that were revoked stay revoked. Without `with_keys` all keys stay as they are.

    Raises Misused if the file is no sound backup, Misused(STATE_NOT_EMPTY) if there is state already, unless `force` is
    set, or live replicas use it, and Misused(DATA_DIRECTORY_IN_USE) while a sidecar runs. Nothing is changed then.
    """
    if location.data is None and location.redis is None:
        raise Misused(
            Reason.CONFIG_INVALID,
            "there is no state directory or Redis to restore into; name the sidecar's configuration",
        )
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        summary, keys = _unpacked(path, folder), Keys()
        async with _nobody_works_on(location):
            registries = [part for part in REGISTRIES if (folder / part).exists()]
            files = [part for part in FILES if (folder / part).exists() and location.data is not None]
            if not force:
                await _check_empty(location, registries, files)
            contents = {part: await _file(folder / part, part).read() for part in registries}
            if ACCESS in contents:
                there, elsewhere = await _known_entries(location)
                contents[ACCESS], keys = merged(contents[ACCESS], there, elsewhere, time(), with_keys)
            for part in registries:
                await _put(location, part, contents[part])
            for part in files:
                assert location.data is not None
                _copy(folder / part, location.data / FILES[part])
    return Restored(summary, keys)


async def _known_entries(location: StateLocation) -> tuple[list[Raw], list[Raw]]:
    """Return the entries of the place, and those that its data directory has of another place or of its Redis."""
    async with _opened(location, ACCESS) as store:
        there = await store.records()
    elsewhere: list[Raw] = []
    if location.data is not None:
        path, codec = REGISTRIES[ACCESS]
        if location.redis is not None:
            elsewhere += await SqliteFile(location.data / path, codec).records()
        if (location.data / FOLDER / COPY).exists():
            from sidecar.state.redis.kept import copied_records

            elsewhere += copied_records(location.data / FOLDER / COPY, codec)
    return there, elsewhere


async def _take(location: StateLocation, part: str, into: Path) -> None:
    """Copy a registry, if there is one, into a file."""
    if location.redis is None:
        if location.data is not None and (location.data / REGISTRIES[part][0]).exists():
            _copy(location.data / REGISTRIES[part][0], into)
        return
    async with _opened(location, part) as store:
        if not await store.is_empty():
            await _file(into, part).write(await store.read(), _silent)


async def _put(location: StateLocation, part: str, contents: Contents[Raw]) -> None:
    if location.data is not None and location.redis is None:
        (location.data / REGISTRIES[part][0]).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    async with _opened(location, part) as store:
        await store.write(contents, _silent)


async def _check_empty(location: StateLocation, registries: list[str], files: list[str]) -> None:
    taken = [
        str(location.data / FILES[part]) for part in files if location.data and (location.data / FILES[part]).exists()
    ]
    for part in registries:
        async with _opened(location, part) as store:
            if not await store.is_empty():
                taken.append(str(store))
    if taken:
        where = ", ".join(dict.fromkeys(taken))
        raise Misused(Reason.STATE_NOT_EMPTY, f"{where}: there is state already; --force puts the backup in its place")


def _check_free(out: Path, force: bool) -> None:
    if out.exists() and not force:
        raise Misused(Reason.CONFIG_INVALID, f"{out} exists already; name another file, or say --force to replace it")


def _packed(location: StateLocation, folder: Path, out: Path) -> Summary:
    """Add the data directory's files to the parts in the folder, and write all to a file."""
    for part, path in FILES.items():
        if location.data is not None and (location.data / path).exists():
            _copy(location.data / path, folder / part)
    parts = [name for name in (*REGISTRIES, *FILES) if (folder / name).exists()]
    if not parts:
        raise Misused(Reason.CONFIG_INVALID, f"there is no state in {location}; name the sidecar's configuration")
    names, entries = _names(folder, NAMES), _names(folder, ACCESS)
    keys = sum(name.startswith(KEY) for name in entries)
    listed = tuple(_listed(folder / name) for name in parts)
    limits = sum(name.startswith(LIMIT) for name in entries)
    summary = Summary(version("lora-sidecar"), time(), len(names), keys, limits, listed)
    unfinished = folder / out.name
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MANIFEST, json.dumps({"format": FORMAT, **asdict(summary)}, indent=2))
        for name in parts:
            archive.write(folder / name, name)
    unfinished.replace(out)
    return summary


@asynccontextmanager
async def _opened(location: StateLocation, part: str) -> AsyncIterator[RegistryStore[Raw]]:
    """Open a store without asking who else works on it."""
    store = location.store(part)
    assert store is not None
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def _nobody_works_on(location: StateLocation) -> AsyncIterator[None]:
    """Hold the data directory. Raises Misused if a sidecar does, or if live replicas use the Redis."""
    lock = None if location.data is None else lock_data_directory(location.data)
    try:
        if location.redis is not None:
            store = location.store(NAMES)
            assert store is not None
            async with store:
                pass
        yield
    finally:
        if lock is not None:
            lock.close()


def _file(path: Path, part: str) -> SqliteFile[Raw]:
    return SqliteFile(path, REGISTRIES[part][1])


def _names(folder: Path, part: str) -> list[str]:
    if not (folder / part).exists():
        return []
    with closing(sqlite3.connect(folder / part)) as database:
        return [name for (name,) in database.execute(f"SELECT name FROM {REGISTRIES[part][1].table}")]


def _copy(source: Path, target: Path) -> None:
    """Copy a SQLite file as of one moment, though another process writes to it; what was in the target is lost."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (
        translated_errors(source),
        closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True)) as here,
        closing(sqlite3.connect(target)) as there,
    ):
        here.backup(there)


def _listed(path: Path) -> Part:
    with path.open("rb") as file:
        return Part(path.name, path.stat().st_size, file_digest(file, "sha256").hexdigest())


def _unpacked(path: Path, folder: Path) -> Summary:
    """Unpack the parts, and check each. Raises Misused(CONFIG_INVALID)."""
    try:
        with zipfile.ZipFile(path) as archive:
            with archive.open(MANIFEST) as file:
                fields = json.loads(file.read(MANIFEST_BYTES_MAX))
            if fields.pop("format") != FORMAT:
                raise Misused(
                    Reason.STATE_INCOMPATIBLE, f"{path} is a backup of a newer release; restore it with that one"
                )
            parts = tuple(Part(**part) for part in fields.pop("parts"))
            for part in parts:
                if part.file in (*REGISTRIES, *FILES):
                    _unpack(archive, part, folder / part.file)
            return Summary(**fields, parts=parts)
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Misused(Reason.CONFIG_INVALID, f"{path} is no sound backup: {error}") from error


def _unpack(archive: zipfile.ZipFile, part: Part, into: Path) -> None:
    with archive.open(part.file) as source, into.open("wb") as target:
        left = part.bytes
        while left > 0 and (some := source.read(min(left, COPIED_BYTES))):
            target.write(some)
            left -= len(some)
    if _listed(into) != part:
        raise ValueError(f"{part.file} is not as it was written")


def _silent(done: int, total: int) -> None:
    """Show no progress."""
