"""Carries out what the core decides about the host store: fetch and pack in threads, keep the blobs, free them."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic_ns

from sidecar.adapters.buffers import Blob, NoRoom
from sidecar.adapters.builder import Built, build
from sidecar.adapters.disk import DiskTier
from sidecar.adapters.packed import PackReport, lora_config
from sidecar.adapters.shared_memory import Mount
from sidecar.adapters.staging import Staging
from sidecar.core.effects import Drop, DropDisk, Fetch, Spill
from sidecar.core.events import Event, Fetched, FetchFailed, Spilled, SpillFailed
from sidecar.core.facts import is_files
from sidecar.errors import Invalid, Reason, SidecarError
from sidecar.shell.sources import Sources
from sidecar.shell.staged import StagedFolders, StagedWeights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackedWeights:
    """A lease of a packed blob, with what a Load says of it."""

    blob: Blob
    shape: tuple[int, int]
    dtype: str
    config: bytes
    let_go: Callable[[Callable[[], None]], object]

    @property
    def path(self) -> str:
        return str(self.blob.path)

    @property
    def size_bytes(self) -> int:
        return self.blob.size_bytes

    async def ready(self) -> None:
        """It is there: the lease keeps it."""

    def release(self) -> None:
        self.let_go(self.blob.release)


class BlobStore:
    """Packed blobs by key, in memory and on disk. Bytes and eviction are the core's; this brings, holds and frees.

    With a `mount` the memory is shared: before a blob is freed, `forget(name)` has the engines let go of it. Until then
    its bytes are not free, and what is to take their place waits, whatever the core's books say.
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
        self._mount = mount
        self._forget = forget
        self._room = Budget(budget_bytes)
        self._leaving: dict[str, asyncio.Task[None]] = {}
        self._built: dict[str, Built] = {}
        self._bringing: dict[str, asyncio.Task[Built | None]] = {}
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="fetch")
        self._staged = StagedFolders(sources, stagings, self._threads)
        self.on_packed: Callable[[str, PackReport], None] = lambda key, report: None

    async def open(self) -> None:
        """Make ready for engines that read files. Raises Misused with what is wrong with a shared folder."""
        await self._staged.open()

    def fetch(self, effect: Fetch) -> None:
        """Bring a blob into memory; Fetched or FetchFailed is posted."""
        task = asyncio.get_running_loop().create_task(self._bring(effect))
        self._bringing[effect.key] = task
        task.add_done_callback(lambda done: self._arrived(effect, done))

    def _arrived(self, effect: Fetch, done: asyncio.Future[Built | None]) -> None:
        del self._bringing[effect.key]
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

    async def _bring(self, effect: Fetch) -> Built | None:
        if effect.key in self._leaving:  # it is brought again before it has gone
            await asyncio.wait([self._leaving[effect.key]])
        await self._room.take(effect.size_bytes)
        try:
            return await self._bring_into(effect)
        except BaseException:
            self._room.give_back(effect.size_bytes)
            raise

    async def _bring_into(self, effect: Fetch) -> Built | None:
        """Make a blob of a version, or stage its files."""
        if effect.layout.files:
            await self._staged.bring(effect)
            return None
        if effect.from_disk:
            return await self._in_thread(self._read, effect)
        begun_ns = monotonic_ns()
        # A download has a thread of its own: those of the store are for what ends soon.
        source = await self._sources.locate(effect.origin, effect.digest)
        located_ns = monotonic_ns() - begun_ns
        try:
            built = await self._in_thread(self._build, source, effect)
        except Invalid:
            # It was sound when it was registered. If it is our copy that has changed, there may be a better one.
            if not await self._sources.mend(effect.origin, effect.digest):
                raise
            source = await self._sources.locate(effect.origin, effect.digest)
            built = await self._in_thread(self._build, source, effect)
        return built._replace(report=replace(built.report, fetch_ns=built.report.fetch_ns + located_ns))

    def _in_thread(self, run: Callable[..., Built], *arguments: object) -> asyncio.Future[Built]:
        return asyncio.get_running_loop().run_in_executor(self._threads, run, *arguments)

    def _read(self, effect: Fetch) -> Built:
        assert self._disk is not None
        disk = self._disk
        return self._in_some_memory(lambda mount: disk.read(effect.key, effect.layout, mount))

    def _build(self, source: Path, effect: Fetch) -> Built:
        return self._in_some_memory(
            lambda mount: build(source, effect.layout, expected_digest=effect.digest, mount=mount)
        )

    def _in_some_memory(self, make: Callable[[Mount | None], Built]) -> Built:
        """Make a blob in shared memory, or, if others have filled that, in memory of our own: then it is sent."""
        if self._mount is None:
            return make(None)
        try:
            return make(self._mount)
        except NoRoom as error:
            logger.warning("%s", error)
            return make(None)

    def spill(self, effect: Spill) -> None:
        """Write a blob to the disk tier in a thread; Spilled or SpillFailed is posted."""
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
        """Delete a blob from the disk tier, in a thread."""
        assert self._disk is not None
        self._threads.submit(self._disk.delete, effect.key)

    def drop(self, effect: Drop) -> None:
        """Give the blob up, engines first; it is unmapped when its last lease ends."""
        key = effect.key
        leaving = self._unstage(key) if is_files(key) else self._leave(self._built.pop(key).blob)
        task = self._leaving[key] = asyncio.get_running_loop().create_task(leaving)
        task.add_done_callback(lambda _: self._leaving.pop(key))

    async def _leave(self, blob: Blob) -> None:
        if self._mount is not None:
            await self._forgotten(blob.path.name)
        # In a thread: for a large one it takes time.
        await asyncio.get_running_loop().run_in_executor(self._threads, blob.release)
        self._room.give_back(blob.size_bytes)

    async def _forgotten(self, name: str) -> None:
        """Return when no engine refers to what goes; a failure of ours must not keep its bytes for ever."""
        if self._forget is None:
            return
        try:
            await self._forget(name)
        except Exception:
            logger.exception("an engine may still refer to %s, which goes", name)

    async def _unstage(self, key: str) -> None:
        await self._forgotten(key)
        self._room.give_back(await self._staged.leave(key))

    def lease(self, key: str) -> PackedWeights | StagedWeights:
        """Return a lease of a blob, or of a staged folder, that the core has pinned."""
        if is_files(key):
            return self._staged.lease(key)
        built = self._built[key]
        built.blob.lease()
        config = lora_config(built.plan).tobytes()
        return PackedWeights(built.blob, built.plan.shape, built.plan.layout.dtype, config, self._threads.submit)

    def close(self) -> None:
        for task in (*self._bringing.values(), *self._leaving.values()):
            task.cancel()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for built in self._built.values():
            built.blob.release()
        self._built.clear()
        self._staged.close()


class Budget:
    """Bytes that are taken and given back; who finds none free waits, first come first served."""

    def __init__(self, size_bytes: int | None) -> None:
        self._free = size_bytes
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, size_bytes: int) -> None:
        if self._free is None:
            return
        if not self._waiting and size_bytes <= self._free:
            self._free -= size_bytes
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size_bytes, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back(size_bytes)
            raise

    def give_back(self, size_bytes: int) -> None:
        if self._free is None:
            return
        self._free += size_bytes
        while self._waiting:
            wanted, turn = self._waiting[0]
            if turn.done():
                self._waiting.popleft()
                continue
            if wanted > self._free:
                return
            self._waiting.popleft()
            self._free -= wanted
            turn.set_result(None)
