"""Find adapters' files: under a local root, in the spool, or at an origin from which they are downloaded.

Registrations come through `arrival`, and misses through `use`. Downloads of one URL, and of one version, are shared:
later callers wait for the first one's.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, Protocol, TypeVar

from sidecar.adapters.copying import copy_adapter
from sidecar.adapters.folder import Folder
from sidecar.adapters.origins.allowing import AllowList
from sidecar.adapters.origins.failures import Stopped
from sidecar.adapters.origins.fetching import fetch
from sidecar.adapters.origins.limits import Limits, Progress, Surroundings
from sidecar.adapters.origins.origin import PUSHED, Origin, is_url, parse_origin
from sidecar.adapters.refusal import malformed, unreadable
from sidecar.adapters.registration import Registration, read_registration
from sidecar.adapters.spool import Spool, digest_of_folder
from sidecar.errors import Invalid, SidecarError, error_for
from sidecar.shell.background import BackgroundThreads
from sidecar.tasks import undisturbed

T = TypeVar("T")
Opener = Callable[[], Folder]
"""Opens the folder with a version's files; it blocks. Raises Invalid."""

logger = logging.getLogger(__name__)

LOG_EVERY_S = 10.0


@dataclass(frozen=True)
class Arrival:
    """A checked adapter whose files can stay where they are; `origin` goes into the registry."""

    registration: Registration
    origin: str


@dataclass
class _Download:
    """A folder shared by the registrations of one URL. `path` is set when the first of them adopts it."""

    task: asyncio.Task[Path]
    stop: threading.Event
    users: int = 0
    path: Path | None = None
    digest: str = ""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Others(Protocol):
    """The other replicas' sources."""

    async def bring(self, digest: str, folder: Path) -> bool:
        """Fill a folder with a version's files; return False if no replica has them. They are not verified."""

    async def spread(self, digest: str) -> None:
        """Return once another replica also has a version's files. Raises Refused if none takes them."""


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
        self._slots = asyncio.Semaphore(downloads_max)
        self._threads = BackgroundThreads()
        self._downloads: dict[str, _Download] = {}
        self._claims: dict[str, int] = {}
        self.doubted = dict.fromkeys(self.spool.digests())
        self._bringing: dict[str, asyncio.Lock] = {}

    def close(self) -> None:
        """Stop downloads; their waiters get Refused(DRAINING)."""
        self._threads.close()
        self.spool.close()

    # Registrations.

    @asynccontextmanager
    async def arrival(self, name: str, path: str, allow: AllowList | None = None) -> AsyncIterator[Arrival]:
        """Yield a checked adapter from a local path, which the caller's allow list may confine further, or a URL.

        What it brought into the spool stays there while the context is open; afterwards `forget_unneeded` decides.
        Raises Invalid for a bad origin or file, Refused for a failure that may pass.
        """
        if not is_url(path):
            folder = (allow or self.allow).open(name, path)
            yield Arrival(await asyncio.to_thread(read_registration, name, folder), str(folder.path))
            return
        with _named(name):
            origin = parse_origin(path)
            self.allow.check(origin)
        download = self._join(origin)
        try:
            with _named(name):
                await asyncio.shield(download.task)
            yield Arrival(await self._checked(name, download), str(origin))
        finally:
            self._leave(origin, download)

    @contextmanager
    def incoming(self) -> Iterator[Path]:
        """Yield a folder of the spool for files that a client sends; what is not adopted is removed."""
        folder = self.spool.make_incoming()
        try:
            yield folder
        finally:
            self._remove(folder)

    @asynccontextmanager
    async def copied(
        self, name: str, path: str, allow: AllowList | None = None
    ) -> AsyncIterator[tuple[Path, Mapping[str, Any]]]:
        """Yield an incoming folder with a copy of the files in a local folder, which may change from then on.

        The fields of its adapter_config.json come with it, unchecked. Raises Invalid if it is outside the roots or
        holds no adapter, Refused for a failure that may pass.
        """
        source = (allow or self.allow).open(name, path)
        with self.incoming() as folder:
            yield folder, await undisturbed(asyncio.to_thread(copy_adapter, name, source, folder, self.limits))

    @asynccontextmanager
    async def pushed(self, name: str, folder: Path) -> AsyncIterator[Arrival]:
        """Yield a checked adapter from an incoming folder that a client has filled; otherwise as `arrival`."""
        registration = await asyncio.to_thread(read_registration, name, folder)
        digest = registration.adapter.digest
        self._claim(digest)
        try:
            await self._adopt(name, folder, digest)
            yield Arrival(registration, f"{PUSHED}://{digest}")
        finally:
            self._unclaim(digest)

    def _join(self, origin: Origin) -> _Download:
        """Return the running download of a URL, or start one."""
        key = f"{origin}?{origin.query}"
        download = self._downloads.get(key)
        if download is None:
            stop = threading.Event()
            download = _Download(asyncio.create_task(self._download_in_turn(origin, stop)), stop)
            self._downloads[key] = download
        download.users += 1
        return download

    async def _download_in_turn(self, origin: Origin, stop: threading.Event) -> Path:
        async with self._slots:
            return await asyncio.wrap_future(self._threads.begin(partial(self._download, origin), stop))

    def _leave(self, origin: Origin, download: _Download) -> None:
        download.users -= 1
        if download.users:
            return
        self._downloads.pop(f"{origin}?{origin.query}", None)
        if download.digest:
            self._unclaim(download.digest)
        download.stop.set()
        download.task.add_done_callback(self._tidy)

    def _tidy(self, task: asyncio.Task[Path]) -> None:
        """Remove what a download brought. If it was adopted, it is no longer there."""
        if not task.cancelled() and task.exception() is None:
            self._remove(task.result())

    async def _checked(self, name: str, download: _Download) -> Registration:
        async with download.lock:  # one after the other: the first moves the folder
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
            async with self._only(digest):  # the same content may arrive from several sources at once
                return await undisturbed(asyncio.to_thread(self.spool.adopt, folder, digest))

    # Contents of the spool.

    def _claim(self, digest: str) -> None:
        """Keep a digest in the spool although it is registered under no name yet."""
        self._claims[digest] = self._claims.get(digest, 0) + 1

    def _unclaim(self, digest: str) -> None:
        self._claims[digest] -= 1
        if not self._claims[digest]:
            del self._claims[digest]
            self.doubt(digest)
            if digest not in self.doubted:
                self._bringing.pop(digest, None)

    def doubt(self, digest: str) -> None:
        """Have it checked whether a digest is still needed; it stays until then."""
        if self.spool.holds(digest):
            self.doubted[digest] = None

    def trust(self, digest: str) -> None:
        """Keep a digest: it is registered under a name."""
        self.doubted.pop(digest, None)

    def forget(self, digest: str) -> None:
        """Drop a digest's source unless it is just arriving; a thread removes the files."""
        if digest in self._claims:
            return
        del self.doubted[digest]
        self._bringing.pop(digest, None)
        try:
            gone = self.spool.take_out(digest)
            if gone is not None:
                self._remove(gone)
        except (OSError, SidecarError) as error:
            logger.warning("the source of %s could not be dropped: %s", digest[:12], error)

    def _remove(self, folder: Path) -> None:
        self._threads.begin(lambda stop: self.spool.remove(folder))

    # Misses.

    async def use(self, origin: str, digest: str, make: Callable[[Opener], Awaitable[T]]) -> T:
        """Return what `make` returns for the folder with a version's files, which it opens in a thread.

        If it raises Invalid, the spool's copy is checked, and `make` is called again with a fresh copy if that may
        help: the files were sound when they were registered. Raises Invalid if the origin now holds other content.
        """
        try:
            return await make(await self.opened(origin, digest))
        except Invalid:
            if not await self.mend(origin, digest):
                raise
        return await make(await self.opened(origin, digest))

    async def opened(self, origin: str, digest: str) -> Opener:
        """Return what opens the folder that `locate` finds: for a thread, which may outlast whoever asks for it."""
        path = await self.locate(origin, digest)
        return (
            partial(self.allow.open_again, digest[:12], path)
            if str(path) == origin
            else partial(Folder, path, digest[:12])
        )

    async def locate(self, origin: str, digest: str) -> Path:
        """Return the folder with a version's files, downloading them again if the spool has lost them.

        Raises Invalid if the origin now holds other content.
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
                self._threads.begin(partial(self._download_again, parse_origin(origin), digest))
            )

    async def _from_another(self, digest: str) -> Path | None:
        """Return the folder with a version's files if another replica had them; else None."""
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
            self._remove(folder)  # if it was adopted, it is no longer there

    async def mend(self, origin: str, digest: str) -> bool:
        """Drop the spool's copy of a version if it is damaged. Return False if there is none to fall back on."""
        if not is_url(origin) and not self.spool.holds(digest):
            return False
        async with self._only(digest):
            folder = self.spool.folder(digest)
            if self.spool.holds(digest) and await asyncio.to_thread(digest_of_folder, folder) != digest:
                logger.warning("the source of %s was damaged on disk and is dropped", digest[:12])
                await undisturbed(asyncio.to_thread(self.spool.discard, digest))
        return True

    def _only(self, digest: str) -> asyncio.Lock:
        """Return the lock for bringing a version: two layouts of it share one download."""
        return self._bringing.setdefault(digest, asyncio.Lock())

    def _download_again(self, origin: Origin, digest: str, stop: threading.Event) -> Path:
        folder = self._download(origin, stop)
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

    def _download(self, origin: Origin, stop: threading.Event) -> Path:
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
    """Put the adapter's name before a download's error: the download itself may serve several adapters."""
    try:
        yield
    except SidecarError as error:
        again = error_for(error.reason, f"{name}: {error.message}", adapter=name)
        again.retry_after_s = error.retry_after_s
        raise again from error


def surroundings_of(stop: threading.Event) -> Surroundings:
    """Return the real surroundings, in which a wait ends when the download is stopped."""

    def wait(seconds: float) -> None:
        if stop.wait(seconds):
            raise Stopped

    return replace(Surroundings(), wait=wait)


def _progress(origin: Origin, stop: threading.Event) -> Progress:
    """Return a callback that ends a stopped download and logs its progress every few seconds."""
    logged_s = monotonic()

    def progress(done_bytes: int, total_bytes: int | None) -> None:
        nonlocal logged_s
        if stop.is_set():
            raise Stopped
        if monotonic() - logged_s >= LOG_EVERY_S:
            logged_s = monotonic()
            logger.info("fetching %s: %d of %s bytes", origin, done_bytes, total_bytes or "unknown")

    return progress
