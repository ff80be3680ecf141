"""Carries out what the core decides about the host store: fetch and pack in threads, keep the blobs, free them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic_ns

from sidecar.adapters.buffers import Blob
from sidecar.adapters.builder import Built, build
from sidecar.adapters.disk import DiskTier
from sidecar.adapters.packed import PackReport, lora_config
from sidecar.core.effects import Drop, DropDisk, Fetch, Spill
from sidecar.core.events import Event, Fetched, FetchFailed, Spilled, SpillFailed
from sidecar.errors import Invalid, Reason, SidecarError
from sidecar.shell.sources import Sources

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

    def release(self) -> None:
        self.let_go(self.blob.release)


class BlobStore:
    """Packed blobs by key, in memory and on disk. Bytes and eviction are the core's; this brings, holds and frees."""

    def __init__(
        self, post: Callable[[Event], None], sources: Sources, disk: DiskTier | None = None, threads: int = 4
    ) -> None:
        self._post = post
        self._sources = sources
        self._disk = disk
        self._built: dict[str, Built] = {}
        self._bringing: dict[str, asyncio.Task[Built]] = {}
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="fetch")
        self.on_packed: Callable[[str, PackReport], None] = lambda key, report: None

    def fetch(self, effect: Fetch) -> None:
        """Bring a blob into memory; Fetched or FetchFailed is posted."""
        task = asyncio.get_running_loop().create_task(self._bring(effect))
        self._bringing[effect.key] = task
        task.add_done_callback(lambda done: self._arrived(effect, done))

    def _arrived(self, effect: Fetch, done: asyncio.Future[Built]) -> None:
        del self._bringing[effect.key]
        if done.cancelled():
            return
        error = done.exception()
        if error is None:
            built = done.result()
            self._built[effect.key] = built
            if not effect.from_disk:
                self.on_packed(effect.key, built.report)
            self._post(Fetched(effect.key))
        elif isinstance(error, SidecarError):
            self._post(FetchFailed(effect.key, error.reason, error.message))
        else:
            logger.error("packing %s failed", effect.key, exc_info=error)
            self._post(FetchFailed(effect.key, Reason.ADAPTER_UNAVAILABLE, f"packing it failed: {error}"))

    async def _bring(self, effect: Fetch) -> Built:
        if effect.from_disk:
            return await self._in_thread(self._read, effect)
        begun_ns = monotonic_ns()
        # A download has a thread of its own: those of the store are for what ends soon.
        source = await self._sources.locate(effect.origin, effect.digest)
        located_ns = monotonic_ns() - begun_ns
        try:
            built = await self._in_thread(_build, source, effect)
        except Invalid:
            # It was sound when it was registered. If it is our copy that has changed, there may be a better one.
            if not await self._sources.mend(effect.origin, effect.digest):
                raise
            built = await self._in_thread(_build, await self._sources.locate(effect.origin, effect.digest), effect)
        return built._replace(report=replace(built.report, fetch_ns=built.report.fetch_ns + located_ns))

    def _in_thread(self, run: Callable[..., Built], *arguments: object) -> asyncio.Future[Built]:
        return asyncio.get_running_loop().run_in_executor(self._threads, run, *arguments)

    def _read(self, effect: Fetch) -> Built:
        assert self._disk is not None
        return self._disk.read(effect.key, effect.layout)

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
        """Give the blob up; it is unmapped when its last lease ends. In a thread: that takes time for a large one."""
        self._threads.submit(self._built.pop(effect.key).blob.release)

    def lease(self, key: str) -> PackedWeights:
        """Return a lease of a blob that the core has pinned."""
        built = self._built[key]
        built.blob.lease()
        config = lora_config(built.plan).tobytes()
        return PackedWeights(built.blob, built.plan.shape, built.plan.layout.dtype, config, self._threads.submit)

    def close(self) -> None:
        for task in self._bringing.values():
            task.cancel()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for built in self._built.values():
            built.blob.release()
        self._built.clear()


def _build(source: Path, effect: Fetch) -> Built:
    return build(source, effect.layout, expected_digest=effect.digest)
