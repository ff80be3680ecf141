"""The host store's bytes: the way of an adapter's weights from its origin to an engine.

1. The core emits `Fetch`; `BlobStore.fetch` waits until there is room for the version.
2. `Sources.use` finds the folder with the version's files, downloading them if needed.
3. `adapters.builder.build` reads and packs them in a thread: a blob in (shared) memory. A version that was spilled is
   read from the disk tier instead. For an engine that reads files, `StagedFolders` puts them into shared folders.
4. `Fetched` goes to the core, which emits `Load`; `lease` hands the blob, as `Weights`, to `Backend.load`.
5. The backend sends the blob, or names its shared-memory region or folder, and releases the lease.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic_ns

from sidecar.adapters.buffers import PRIVATE, Blob, NoRoom, Regions
from sidecar.adapters.builder import Built, build
from sidecar.adapters.disk import DiskTier
from sidecar.adapters.packed import PackReport, lora_config
from sidecar.adapters.shared_memory import Mount
from sidecar.adapters.staging import Staging
from sidecar.core.effects import Drop, DropDisk, Fetch, Spill
from sidecar.core.events import Event, Fetched, FetchFailed, Spilled, SpillFailed
from sidecar.core.facts import is_files
from sidecar.errors import Reason, SidecarError
from sidecar.shell.sources import Opener, Sources
from sidecar.shell.staged import StagedFolders, StagedWeights

logger = logging.getLogger(__name__)

SPARES_MAX = 4
"""The regions of dropped blobs that are kept for the next ones, within the store's budget."""
UNLIMITED = 1 << 62


@dataclass(frozen=True)
class PackedWeights:
    """A leased blob, with what a load needs to describe it."""

    blob: Blob
    shape: tuple[int, int]
    dtype: str
    config: bytes
    release_in_thread: Callable[[Callable[[], None]], object]

    @property
    def path(self) -> str:
        return str(self.blob.path)

    @property
    def size_bytes(self) -> int:
        return self.blob.size_bytes

    async def ready(self) -> None:
        """Return at once: the lease keeps the blob."""

    def release(self, settled: bool = False) -> None:
        if not settled:
            self.blob.is_reusable = False
        if self.blob.leases > 1:  # mostly the store has one, too
            self.blob.release()
        else:
            self.release_in_thread(self.blob.release)


class BlobStore:
    """Packed blobs by key, in memory and on disk. The core counts bytes and evicts; this brings, holds and frees.

    With a `mount` the memory is shared: before a blob is freed, `forget(name)` makes the engines let go of it. Its
    bytes are occupied until then, and a blob that is to replace it waits, whatever the core has counted.
    """

    def __init__(
        self,
        post: Callable[[Event], None],
        sources: Sources,
        disk: DiskTier | None = None,
        threads: int = 4,
        mount: Mount | None = None,
        forget: Callable[[str], Awaitable[None]] | None = None,
        budget_bytes: int | None = None,
        stagings: Sequence[Staging] = (),
    ) -> None:
        self._post = post
        self._sources = sources
        self._disk = disk
        self._is_shared = mount is not None
        self._forget = forget
        self._room = Budget(budget_bytes)
        self._regions = Regions(mount, SPARES_MAX, lambda: self._room.free)
        self._leaving: dict[str, asyncio.Task[None]] = {}
        self._built: dict[str, Built] = {}
        self._fetching: dict[str, asyncio.Task[Built | None]] = {}
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="fetch")
        self._staged = StagedFolders(sources, stagings, self._threads)
        self.on_packed: Callable[[str, PackReport], None] = lambda key, report: None

    async def open(self) -> None:
        """Prepare the folders for engines that read files. Raises Misused naming one that cannot be used."""
        await self._staged.open()

    @property
    def folders(self) -> list[Path]:
        """The folders from which engines read adapters' files."""
        return self._staged.folders

    def add_folders(self, stagings: Sequence[Staging]) -> None:
        """Use more folders from which engines read files; they are open."""
        self._staged.add(stagings)

    def fetch(self, effect: Fetch) -> None:
        """Bring a blob into memory; posts Fetched or FetchFailed."""
        task = asyncio.get_running_loop().create_task(self._fetch(effect))
        self._fetching[effect.key] = task
        task.add_done_callback(lambda done: self._fetch_ended(effect, done))

    def _fetch_ended(self, effect: Fetch, done: asyncio.Future[Built | None]) -> None:
        del self._fetching[effect.key]
        if done.cancelled():
            return
        error = done.exception()
        if error is None:
            built = done.result()
            if built is not None:
                self._built[effect.key] = built
                if not effect.from_disk:
                    self.on_packed(effect.key, built.report)
            self._post(Fetched(effect.key))
        elif isinstance(error, SidecarError):
            self._post(FetchFailed(effect.key, error.reason, error.message))
        else:
            logger.error("packing %s failed", effect.key, exc_info=error)
            self._post(FetchFailed(effect.key, Reason.ADAPTER_UNAVAILABLE, f"packing it failed: {error}"))

    async def _fetch(self, effect: Fetch) -> Built | None:
        if effect.key in self._leaving:  # it is fetched again before it has gone
            await asyncio.wait([self._leaving[effect.key]])
        await self._room.take(effect.size_bytes)
        try:
            if effect.layout.files:
                await self._staged.bring(effect)
                return None
            return await (self._in_thread(self._read, effect) if effect.from_disk else self._pack(effect))
        except BaseException:
            self._room.give_back(effect.size_bytes)
            raise

    async def _pack(self, effect: Fetch) -> Built:
        """Build a blob from the version's files. The time until they were found counts as fetching."""
        begun_ns = monotonic_ns()
        found_ns: list[int] = []

        def build_from(open_folder: Opener) -> asyncio.Future[Built]:
            found_ns.append(monotonic_ns() - begun_ns)
            return self._in_thread(self._build, open_folder, effect)

        # A download has a thread of its own: the store's threads are for short work.
        built = await self._sources.use(effect.origin, effect.digest, build_from)
        return built._replace(report=replace(built.report, fetch_ns=built.report.fetch_ns + found_ns[0]))

    def _in_thread(self, run: Callable[..., Built], *arguments: object) -> asyncio.Future[Built]:
        return asyncio.get_running_loop().run_in_executor(self._threads, run, *arguments)

    def _read(self, effect: Fetch) -> Built:
        assert self._disk is not None
        disk = self._disk
        return self._make_blob(lambda regions: disk.read(effect.key, effect.layout, regions))

    def _build(self, open_folder: Opener, effect: Fetch) -> Built:
        folder = open_folder()
        return self._make_blob(
            lambda regions: build(folder, effect.layout, expected_digest=effect.digest, regions=regions)
        )

    def _make_blob(self, make: Callable[[Regions], Built]) -> Built:
        """Make a blob in shared memory, or in private memory if that is full: then it is sent over the wire."""
        try:
            return make(self._regions)
        except NoRoom as error:
            if not self._is_shared:
                raise
            logger.warning("%s", error)
            return make(PRIVATE)

    def spill(self, effect: Spill) -> None:
        """Write a blob to the disk tier in a thread; posts Spilled or SpillFailed."""
        assert self._disk is not None
        built = self._built[effect.key]
        built.blob.lease()
        future = asyncio.get_running_loop().run_in_executor(self._threads, self._write, self._disk, effect.key, built)
        future.add_done_callback(lambda done: self._spilled(effect, done))

    def _write(self, disk: DiskTier, key: str, built: Built) -> None:
        try:
            disk.write(key, built)
        finally:
            built.blob.release()

    def _spilled(self, effect: Spill, done: asyncio.Future[None]) -> None:
        if done.cancelled():
            return
        error = done.exception()
        if error is None:
            self._post(Spilled(effect.key))
        else:
            logger.warning("%s is not kept on disk: %s", effect.key, error)
            self._post(SpillFailed(effect.key, str(error)))

    def drop_disk(self, effect: DropDisk) -> None:
        """Delete a blob from the disk tier in a thread."""
        assert self._disk is not None
        future = asyncio.get_running_loop().run_in_executor(self._threads, self._disk.delete, effect.key)
        future.add_done_callback(lambda done: self._deleted(effect, done))

    def _deleted(self, effect: DropDisk, done: asyncio.Future[None]) -> None:
        if not done.cancelled() and (error := done.exception()) is not None:
            logger.warning("%s stays on disk until the sidecar is started again: %s", effect.key, error)

    def drop(self, effect: Drop) -> None:
        """Give up a blob, engines first; it is unmapped when its last lease ends."""
        key = effect.key
        leaving = self._unstage(key) if is_files(key) else self._leave(self._built.pop(key).blob)
        task = self._leaving[key] = asyncio.get_running_loop().create_task(leaving)
        task.add_done_callback(lambda _: self._leaving.pop(key))

    async def _leave(self, blob: Blob) -> None:
        if self._is_shared and not await self._forgotten(blob.path.name):
            blob.is_reusable = False
        # In a thread: unmapping a large blob takes time.
        await asyncio.get_running_loop().run_in_executor(self._threads, blob.release)
        self._room.give_back(blob.size_bytes)

    async def _forgotten(self, name: str) -> bool:
        """Return True when no engine refers to a blob, False if one may; an error must not keep its bytes for ever."""
        if self._forget is not None:
            try:
                await self._forget(name)
            except Exception:
                logger.exception("an engine may still refer to %s, which is being removed", name)
                return False
        return True

    async def _unstage(self, key: str) -> None:
        await self._forgotten(key)
        self._room.give_back(await self._staged.leave(key))

    def lease(self, key: str) -> PackedWeights | StagedWeights:
        """Lease a blob, or a staged folder, that the core has pinned."""
        if is_files(key):
            return self._staged.lease(key)
        built = self._built[key]
        built.blob.lease()
        config = lora_config(built.plan).tobytes()
        return PackedWeights(built.blob, built.plan.shape, built.plan.layout.dtype, config, self._threads.submit)

    async def sweep_folders(self) -> None:
        """Remove files that earlier processes left for engines."""
        await self._staged.sweep()

    def close(self, as_dead: bool = False) -> None:
        """Close; with `as_dead` the files for engines stay, which a later process removes."""
        for task in (*self._fetching.values(), *self._leaving.values()):
            task.cancel()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for built in self._built.values():
            built.blob.release()
        self._built.clear()
        self._regions.close()
        self._staged.close(as_dead)


class Budget:
    """A budget of bytes. Takers wait, in order, until there are enough; None is unlimited."""

    def __init__(self, size_bytes: int | None) -> None:
        self._free = size_bytes
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def free(self) -> int:
        """The bytes that nobody has taken."""
        return UNLIMITED if self._free is None else self._free

    async def take(self, size_bytes: int) -> None:
        if self._free is None:
            return
        if not self._waiting and size_bytes <= self._free:
            self._free -= size_bytes
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size_bytes, granted))
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self.give_back(size_bytes)
            raise

    def give_back(self, size_bytes: int) -> None:
        if self._free is None:
            return
        self._free += size_bytes
        while self._waiting:
            wanted, granted = self._waiting[0]
            if granted.done():
                self._waiting.popleft()
                continue
            if wanted > self._free:
                return
            self._waiting.popleft()
            self._free -= wanted
            granted.set_result(None)
