"""Where adapters' files are: under a local root, in the spool, or at an origin from where they are brought.

Registrations arrive through `arrival`, requests that miss through `locate`. Downloads of one URL, and of one version,
are shared: whoever comes second waits for the first one's.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Protocol

from sidecar.adapters.origins.allowing import AllowList
from sidecar.adapters.origins.failures import Stopped
from sidecar.adapters.origins.fetching import fetch
from sidecar.adapters.origins.limits import Limits, Progress, Surroundings
from sidecar.adapters.origins.origin import PUSHED, Origin, is_url, parse_origin
from sidecar.adapters.refusal import malformed, unreadable
from sidecar.adapters.registration import Registration, read_registration
from sidecar.adapters.spool import Spool, digest_of_folder
from sidecar.errors import SidecarError, error_for
from sidecar.shell.background import BackgroundThreads, undisturbed

logger = logging.getLogger(__name__)

TOLD_EVERY_S = 10.0


@dataclass(frozen=True)
class Arrival:
    """A checked adapter whose files are where they can stay; `origin` is what the registry writes down."""

    registration: Registration
    origin: str


@dataclass
class _Download:
    """A folder that several registrations of one URL share. `path` moves when the first of them adopts it."""

    task: asyncio.Task[Path]
    stop: threading.Event
    users: int = 0
    path: Path | None = None
    digest: str = ""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Others(Protocol):
    """What other replicas have, and what they are to have."""

    async def bring(self, digest: str, folder: Path) -> bool:
        """Fill a folder with a version's files; False if nobody has them. Whether they are right is not looked at."""

    async def spread(self, digest: str) -> None:
        """Return when another replica has the files of a version too. Raises Refused if none takes them."""


class Sources:
    """The sources of one process's adapters."""

    def __init__(
        self,
        allow: AllowList,
        spool: Spool | None = None,
        limits: Limits = Limits(),  # noqa: B008 — frozen
        downloads_max: int = 4,
        surroundings: Callable[[threading.Event], Surroundings] | None = None,
    ) -> None:
        self.allow = allow
        self.spool = spool or Spool(None)
        self.limits = limits
        self.others: Others | None = None
        """The other replicas, if there are any."""
        self._surroundings = surroundings or surroundings_of
        self._turns = asyncio.Semaphore(downloads_max)
        self._flights = BackgroundThreads()
        self._downloads: dict[str, _Download] = {}
        self._claims: dict[str, int] = {}
        self.doubted = dict.fromkeys(self.spool.digests())
        self._bringing: dict[str, asyncio.Lock] = {}

    def close(self) -> None:
        """Stop downloads; those who wait for them are told that this process leaves."""
        self._flights.close()
        self.spool.close()

    # Registrations.

    @asynccontextmanager
    async def arrival(self, name: str, path: str) -> AsyncIterator[Arrival]:
        """Give a checked adapter from a local path or a URL.

        What it brought into the spool stays there while this context is open; after it, `forget_unneeded` decides.
        Raises Invalid for what is wrong with the origin or the files, Refused for what may be right later.
        """
        if not is_url(path):
            directory = self.allow.check_path(name, path)
            registration = await asyncio.to_thread(read_registration, name, directory)
            if self.allow.check_path(name, path) != directory:  # a link has taken its place, or a part of its path's
                raise unreadable(name, f"{path} was replaced while it was read; register it again")
            yield Arrival(registration, str(directory))
            return
        with _named(name):
            origin = parse_origin(path)
            self.allow.check(origin)
        download = self._joined(origin)
        try:
            with _named(name):
                await asyncio.shield(download.task)
            yield Arrival(await self._checked(name, download), str(origin))
        finally:
            self._left(origin, download)

    @contextmanager
    def incoming(self) -> Iterator[Path]:
        """Give a folder of the spool for files that a client sends; what was not adopted is removed."""
        folder = self.spool.make_incoming()
        try:
            yield folder
        finally:
            self._remove(folder)

    @asynccontextmanager
    async def pushed(self, name: str, folder: Path) -> AsyncIterator[Arrival]:
        """Give a checked adapter from an incoming folder that a client filled; as `arrival` otherwise."""
        registration = await asyncio.to_thread(read_registration, name, folder)
        digest = registration.adapter.digest
        self._claim(digest)
        try:
            await self._adopt(name, folder, digest)
            yield Arrival(registration, f"{PUSHED}://{digest}")
        finally:
            self._unclaim(digest)

    def _joined(self, origin: Origin) -> _Download:
        """Return the download of a URL that is under way, or begin one."""
        key = f"{origin}?{origin.query}"
        download = self._downloads.get(key)
        if download is None:
            stop = threading.Event()
            download = _Download(asyncio.create_task(self._bring_in_turn(origin, stop)), stop)
            self._downloads[key] = download
        download.users += 1
        return download

    async def _bring_in_turn(self, origin: Origin, stop: threading.Event) -> Path:
        async with self._turns:
            return await asyncio.wrap_future(self._flights.begin(partial(self._bring, origin), stop))

    def _left(self, origin: Origin, download: _Download) -> None:
        download.users -= 1
        if download.users:
            return
        self._downloads.pop(f"{origin}?{origin.query}", None)
        if download.digest:
            self._unclaim(download.digest)
        download.stop.set()
        download.task.add_done_callback(self._tidy)

    def _tidy(self, task: asyncio.Task[Path]) -> None:
        """Remove what a download brought, unless it was adopted: then it is not there any more."""
        if not task.cancelled() and task.exception() is None:
            self._remove(task.result())

    async def _checked(self, name: str, download: _Download) -> Registration:
        async with download.lock:  # one after the other: the first one moves the folder
            folder = download.path or download.task.result()
            registration = await asyncio.to_thread(read_registration, name, folder)
            if not download.digest:
                download.digest = registration.adapter.digest
                self._claim(download.digest)
            if download.path is None:
                download.path = await self._adopt(name, folder, download.digest)
            return registration

    async def _adopt(self, name: str, folder: Path, digest: str) -> Path:
        with _named(name):
            async with self._only(digest):  # the same content may arrive from several places at once
                return await undisturbed(asyncio.to_thread(self.spool.adopt, folder, digest))

    # What the spool keeps.

    def _claim(self, digest: str) -> None:
        """Keep a digest in the spool although no name stands for it yet."""
        self._claims[digest] = self._claims.get(digest, 0) + 1

    def _unclaim(self, digest: str) -> None:
        self._claims[digest] -= 1
        if not self._claims[digest]:
            del self._claims[digest]
            self.doubt(digest)
            if digest not in self.doubted:
                self._bringing.pop(digest, None)

    def doubt(self, digest: str) -> None:
        """Have it looked at whether anybody needs a digest; until then it stays."""
        if self.spool.holds(digest):
            self.doubted[digest] = None

    def trust(self, digest: str) -> None:
        """Keep a digest: a name stands for it."""
        self.doubted.pop(digest, None)

    def forget(self, digest: str) -> None:
        """Drop a digest's source, unless it is only just arriving; removing the files is left to a thread."""
        if digest in self._claims:
            return
        del self.doubted[digest]
        self._bringing.pop(digest, None)
        try:
            self._remove(self.spool.take_out(digest))
        except (OSError, SidecarError) as error:
            logger.warning("the source of %s could not be dropped: %s", digest[:12], error)

    def _remove(self, folder: Path) -> None:
        self._flights.begin(lambda stop: self.spool.remove(folder))

    # Misses.

    async def locate(self, origin: str, digest: str) -> Path:
        """Return the folder with a version's files, fetching them again if the spool has them no more.

        Raises Invalid when the origin holds other content by now.
        """
        if self.spool.holds(digest):
            return self.spool.folder(digest)
        is_local = not is_url(origin)
        if is_local and (self.others is None or await asyncio.to_thread(Path(origin).is_dir)):
            return Path(origin)
        async with self._only(digest):
            if self.spool.holds(digest):
                return self.spool.folder(digest)
            found = await self._from_another(digest)
            if found is not None or is_local:
                return found or Path(origin)
            if origin.startswith(f"{PUSHED}://"):
                raise unreadable(digest[:12], "it was pushed and its files are gone; push it again")
            return await asyncio.wrap_future(
                self._flights.begin(partial(self._bring_again, parse_origin(origin), digest))
            )

    async def _from_another(self, digest: str) -> Path | None:
        """Return the folder with a version's files if another replica had them."""
        if self.others is None:
            return None
        folder = await asyncio.to_thread(self.spool.make_incoming)
        try:
            if not await self.others.bring(digest, folder):
                return None
            if await asyncio.to_thread(digest_of_folder, folder) != digest:
                logger.warning("another replica sent other content than %s; it is not used", digest[:12])
                return None
            return await undisturbed(asyncio.to_thread(self.spool.adopt, folder, digest))
        finally:
            self._remove(folder)  # what was adopted is not there any more

    async def mend(self, origin: str, digest: str) -> bool:
        """Drop the spool's copy of a version if it is damaged; return whether building from it may go better now."""
        if not is_url(origin) and not self.spool.holds(digest):
            return False
        async with self._only(digest):
            folder = self.spool.folder(digest)
            if self.spool.holds(digest) and await asyncio.to_thread(digest_of_folder, folder) != digest:
                logger.warning("the source of %s was damaged on disk and is dropped", digest[:12])
                await undisturbed(asyncio.to_thread(self.spool.discard, digest))
        return True

    def _only(self, digest: str) -> asyncio.Lock:
        """Return what lets one at a time bring a version: two layouts of it share one download."""
        return self._bringing.setdefault(digest, asyncio.Lock())

    def _bring_again(self, origin: Origin, digest: str, stop: threading.Event) -> Path:
        folder = self._bring(origin, stop)
        try:
            found = digest_of_folder(folder)
            if found != digest:
                raise malformed(
                    digest[:12],
                    f"{origin} now holds other content ({found[:12] or 'not an adapter'}) than the registered version "
                    f"({digest[:12]}); register it as a new version",
                )
            return self.spool.adopt(folder, digest)
        except BaseException:
            self.spool.remove(folder)
            raise

    def _bring(self, origin: Origin, stop: threading.Event) -> Path:
        """Download an origin into a new incoming folder."""
        folder = self.spool.make_incoming()
        begun_s = monotonic()
        try:
            size_bytes = fetch(
                origin,
                folder,
                self.limits,
                _progress(origin, stop),
                allow=self.allow,
                surroundings=self._surroundings(stop),
            )
        except BaseException:
            self.spool.remove(folder)
            raise
        logger.info("fetched %s: %d bytes in %.1f s", origin, size_bytes, monotonic() - begun_s)
        return folder


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Put the adapter's name in front of what a download failed with: the download itself may be several ones'."""
    try:
        yield
    except SidecarError as error:
        again = error_for(error.reason, f"{name}: {error.message}", adapter=name)
        again.retry_after_s = error.retry_after_s
        raise again from error


def surroundings_of(stop: threading.Event) -> Surroundings:
    """Return the real world, in which a wait ends when the download is stopped."""

    def wait(seconds: float) -> None:
        if stop.wait(seconds):
            raise Stopped

    return replace(Surroundings(), wait=wait)


def _progress(origin: Origin, stop: threading.Event) -> Progress:
    """Return a callback that ends a stopped download and writes a log line every few seconds."""
    told_s = monotonic()

    def progress(done_bytes: int, total_bytes: int | None) -> None:
        nonlocal told_s
        if stop.is_set():
            raise Stopped
        if monotonic() - told_s >= TOLD_EVERY_S:
            told_s = monotonic()
            logger.info("fetching %s: %d of %s bytes", origin, done_bytes, total_bytes or "unknown")

    return progress
