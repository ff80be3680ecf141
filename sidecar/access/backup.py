"""Copy a sidecar's state: into one file and back, or from a data directory to a Redis and back.

The file is a zip with a manifest. Each part is a SQLite file, whatever store it came from. Entries are copied as text:
those that this release cannot read are kept too. Weights are not part of it. A key that was revoked after the backup
stays revoked where the place that is restored, or its data directory, has that (see `restoring`).

`HOLDINGS` has everything that is kept in a data directory or a Redis, and why what a move leaves behind stays.
"""

from __future__ import annotations

import json
import os
import sqlite3
import zipfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from hashlib import file_digest
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from time import time
from typing import TYPE_CHECKING, Any

from sidecar.access.budgets import kept
from sidecar.access.entries import CODEC, KEY, LIMIT
from sidecar.access.restoring import Keys, Raw, merged
from sidecar.access.store import BUDGETS, COPY, FILE, FOLDER, USED_IN_REDIS, USES
from sidecar.access.usage.keeper import USAGE_FILE
from sidecar.access.uses import UsesInFile
from sidecar.adapters.origins.origin import PUSHED
from sidecar.config.redis_address import RedisLocation
from sidecar.errors import Misused, Reason
from sidecar.state.codec import Codec
from sidecar.state.contents import Contents, RegistryStore, SqliteFile
from sidecar.state.registry import FORMAT_FILE, LOCK_FILE, REGISTRY_FILE, lock_data_directory
from sidecar.state.sqlite_faults import translated_errors
from sidecar.state.written import ADAPTERS

if TYPE_CHECKING:
    from sidecar.state.redis.link import Link

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
USED, TAKEN = "used.sqlite", "budgets.sqlite"
FILES = {"usage.sqlite": USAGE_FILE, USED: Path(FOLDER) / USES}
"""The SQLite files of a data directory that are copied as they are, by the names of their parts."""
MOVED = FILES | {TAKEN: Path(FOLDER) / BUDGETS}
"""Those that a move copies. A backup would give back what was taken since."""


@dataclass(frozen=True)
class Holding:
    """What is kept under some paths of a data directory and keys of a Redis (patterns), and why a move leaves it.

    `why` is "" for what is moved, or counts between a data directory and a Redis only.
    """

    what: str
    places: tuple[str, ...]
    why: str = ""

    def has(self, place: str) -> bool:
        return any(fnmatchcase(place, pattern) for pattern in self.places)


HOLDINGS = (
    Holding("names", (REGISTRY_FILE, "meta", "adapters", "changes", "tombstones")),
    Holding(
        "keys and limits",
        ("access/access.sqlite", "access-meta", "access-entries", "access-changes", "access-tombstones"),
    ),
    Holding("last uses of keys", ("access/used.sqlite", USED_IN_REDIS)),
    Holding("what is taken of budgets", ("access/budgets.sqlite", "budgets", "budgets:in_use", "budget:*")),
    Holding("usage", ("access/usage.sqlite",), "each process counts in its own data directory, also with a Redis"),
    Holding("the audit", ("audit",), "it stays where it was written; keep the files, or let a process go on there"),
    Holding("the journal", ("journal",), "it is of the process that ran there; sidecar replay reads it there"),
    Holding("files of adapters", ("sources",), "they are fetched again from their origins"),
    Holding("packed weights", ("blobs",), "they are packed again from the files of adapters"),
    Holding(
        "what a running process needs for itself",
        (
            "incoming", "registry-copy.sqlite", "access/copy.sqlite", "access/replicas", "access/jwks-*.json",
            "members", "applied", "access-applied", "beats", "leases", "ownership",
        ),
        "each process makes its own",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class StateLocation:
    """Where a sidecar keeps its state: a data directory, and with `redis` the registries there."""

    data: Path | None
    redis: RedisLocation | None = None

    def __str__(self) -> str:
        locations = (None if self.redis is None else f"Redis at {self.redis.address}", self.data)
        return " and ".join(str(location) for location in locations if location is not None)

    @asynccontextmanager
    async def opened(self, part: str) -> AsyncIterator[RegistryStore[Raw]]:
        """Open the store of a registry without asking who else works on it."""
        path, codec = REGISTRIES[part]
        if self.redis is None:
            assert self.data is not None
            yield SqliteFile(self.data / path, codec)
            return
        from sidecar.state.redis.contents import RedisRegistryStore
        from sidecar.state.redis.link import Link

        link = Link(self.redis, codec)
        try:
            yield RedisRegistryStore(link)
        finally:
            await link.close()


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
        await _gather(location, folder, FILES)
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
            contents, keys = await _contents(location, folder, "the backup", force, with_keys)
            await _put_all(location, folder, contents)
    return Restored(summary, keys)


async def migrate(
    source: StateLocation, target: StateLocation, force: bool = False, dry_run: bool = False
) -> dict[str, Any]:
    """Copy all that the target can hold; numbers of changes go on from the source's, which stays as it is.

    Return the record that `--json` prints; `left` has what stays. Raises Misused if there are no names in the source,
    and else as `restore`.
    """
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        async with _nobody_works_on(source), _nobody_works_on(target):
            async with source.opened(NAMES) as store:
                names = await store.read()
            await _gather(source, folder, MOVED)
            places = [each for each in await _places(source) if target.data is None or Path(each) not in MOVED.values()]
            contents, keys = await _contents(target, folder, "the copy", force)
            if not dry_run:
                await _put_all(target, folder, contents)
        entries = [entry for _, entry in contents[ACCESS].records] if ACCESS in contents else []
        records = {entry[0]: ADAPTERS.read_or_forget(*entry) for _, entry in names.records}
        read = records | {entry[0]: CODEC.read_or_forget(*entry) for entry in entries}
        return {
            "adapters": len(records),
            "versions": sum(len(record.versions) for record in records.values() if record is not None),
            "changes": len(names.changes),
            "last_change": names.last_change,
            "keys": sum(name.startswith(KEY) for name, _ in entries),
            "limits": sum(name.startswith(LIMIT) for name, _ in entries),
            "uses": len(_column(folder / USED, "SELECT id FROM used")),
            "budgets": len(_column(folder / TAKEN, "SELECT key FROM budgets")),
            "stay_revoked": [*(key.id for key in keys.stay_revoked), *keys.stay_unread],
            "unread": [name for name, record in read.items() if record is None],
            "left": [asdict(holding) for holding in _left(places, names)],
        }


async def _places(location: StateLocation) -> list[str]:
    """Return the paths in a data directory but our lock there, or the keys of a Redis, without our prefix."""
    if location.data is None:
        async with _linked(location) as link:
            return await link.keys()
    folder = location.data / FOLDER
    own = {folder, location.data / LOCK_FILE, location.data / FORMAT_FILE}
    there = {*location.data.iterdir(), *folder.glob("*")} - own
    paths = {str(path.relative_to(location.data)) for path in there if path.is_file() or any(path.iterdir())}
    return sorted({path.removesuffix("-wal").removesuffix("-shm") for path in paths})


def _left(places: Sequence[str], names: Contents[Raw]) -> Iterator[Holding]:
    for holding in HOLDINGS:
        if holding.why and (found := tuple(filter(holding.has, places))):
            yield replace(holding, places=found)
    if pushed := tuple(sorted(name for _, (name, text) in names.records if f'"{PUSHED}://' in text)):
        why = "their files are in data directories only: push them again, or let a process go on with its directory"
        yield Holding("weights that were pushed", pushed, why)
    if unknown := tuple(place for place in places if not any(holding.has(place) for holding in HOLDINGS)):
        yield Holding("unknown", unknown, "this release does not know what it is; ask the one that wrote it")


async def _contents(
    location: StateLocation, folder: Path, what: str, force: bool, with_keys: bool = True
) -> tuple[dict[str, Contents[Raw]], Keys]:
    """Return the registries of a folder as they are to be written, and what becomes of the keys.

    Raises Misused(STATE_NOT_EMPTY) if there is state already, unless `force` is set.
    """
    parts = [part for part in (*REGISTRIES, *MOVED) if (folder / part).exists()]
    if not force:
        await _check_empty(location, parts, what)
    contents = {part: await _file(folder / part, part).read() for part in parts if part in REGISTRIES}
    if ACCESS not in contents:
        return contents, Keys()
    there, elsewhere = await _known_entries(location)
    contents[ACCESS], keys = merged(contents[ACCESS], there, elsewhere, time(), with_keys)
    return contents, keys


async def _put_all(location: StateLocation, folder: Path, contents: Mapping[str, Contents[Raw]]) -> None:
    for part in contents:
        if location.data is not None and location.redis is None:
            (location.data / REGISTRIES[part][0]).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        async with location.opened(part) as store:
            await store.write(contents[part])
    for part in MOVED:
        if location.data is not None and (folder / part).exists():
            _copy(folder / part, location.data / MOVED[part])
    if location.redis is not None:
        from sidecar.access.budgets.leases import write_taken

        uses = await UsesInFile(folder / USED).read()
        async with _linked(location) as link:
            if uses:
                await link.raise_times(USED_IN_REDIS, uses)
            if (folder / TAKEN).exists():
                await write_taken(link, kept.read_taken(folder / TAKEN, time()))


async def _gather(location: StateLocation, folder: Path, files: dict[str, Path]) -> None:
    """Copy the registries and what `files` names into a folder, each as a SQLite file, wherever it is kept."""
    if location.redis is None:
        files = {part: path for part, (path, _) in REGISTRIES.items()} | files
    for part, path in files.items():
        if location.data is not None and (location.data / path).exists():
            _copy(location.data / path, folder / part)
    if location.redis is not None:
        from sidecar.access.budgets.leases import read_taken

        for part in REGISTRIES:
            async with location.opened(part) as store:
                if not await store.is_empty():
                    await _file(folder / part, part).write(await store.read())
        async with _linked(location) as link:
            if uses := await link.times(USED_IN_REDIS):
                await UsesInFile(folder / USED).write(uses)
            if TAKEN in files:
                kept.write_taken(folder / TAKEN, [taken async for taken, _ in read_taken(link) if taken[2]])


async def _known_entries(location: StateLocation) -> tuple[list[Raw], list[Raw]]:
    """Return the entries of the place, and those that its data directory has of another place or of its Redis."""
    async with location.opened(ACCESS) as store:
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


async def _check_empty(location: StateLocation, parts: Sequence[str], what: str) -> None:
    paths = [location.data / path for part, path in MOVED.items() if location.data is not None and part in parts]
    taken = [str(path) for path in paths if path.exists()]
    for part in REGISTRIES.keys() & parts:
        async with location.opened(part) as store:
            if not await store.is_empty():
                taken.append(str(store))
    if taken:
        where = ", ".join(dict.fromkeys(taken))
        raise Misused(Reason.STATE_NOT_EMPTY, f"{where}: there is state already; --force puts {what} in its place")


def _check_free(out: Path, force: bool) -> None:
    if out.exists() and not force:
        raise Misused(Reason.CONFIG_INVALID, f"{out} exists already; name another file, or say --force to replace it")


def _packed(location: StateLocation, folder: Path, out: Path) -> Summary:
    """Write the parts in the folder to a file."""
    parts = [name for name in (*REGISTRIES, *FILES) if (folder / name).exists()]
    if not parts:
        raise Misused(Reason.CONFIG_INVALID, f"there is no state in {location}; name the sidecar's configuration")
    names = _column(folder / NAMES, "SELECT name FROM adapters")
    entries = _column(folder / ACCESS, "SELECT name FROM entries")
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
async def _nobody_works_on(location: StateLocation) -> AsyncIterator[None]:
    """Hold the data directory. Raises Misused if a sidecar does, or if live replicas use the Redis."""
    lock = None if location.data is None else lock_data_directory(location.data)
    try:
        if location.redis is not None:
            from sidecar.state.redis.contents import RedisRegistryStore

            async with _linked(location) as link:
                await RedisRegistryStore(link).check_unused()
        yield
    finally:
        if lock is not None:
            lock.close()


def _file(path: Path, part: str) -> SqliteFile[Raw]:
    return SqliteFile(path, REGISTRIES[part][1])


def _column(path: Path, query: str) -> list[str]:
    if not path.exists():
        return []
    with closing(sqlite3.connect(path)) as database:
        return [value for (value,) in database.execute(query)]


@asynccontextmanager
async def _linked(location: StateLocation) -> AsyncIterator[Link]:
    """Connect to the Redis. Raises Refused(STATE_UNAVAILABLE) if it does not answer."""
    from sidecar.state.redis.link import FAULTS, Link

    assert location.redis is not None
    link = Link(location.redis)
    try:
        yield link
    except FAULTS as error:
        raise link.refused(error) from error
    finally:
        await link.close()


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
