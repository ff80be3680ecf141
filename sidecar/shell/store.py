"""Carries out what the core decides about the host store: fetch and pack in threads, keep the blobs, free them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from time import monotonic_ns

from sidecar.adapters.buffers import Blob
from sidecar.adapters.builder import Built, build
from sidecar.adapters.packed import PackReport, lora_config
from sidecar.core.effects import Drop, Fetch
from sidecar.core.events import Event, Fetched, FetchFailed
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
    """The memory tier: packed blobs by key. Bytes and eviction are the core's; this only holds and frees."""

    def __init__(self, post: Callable[[Event], None], sources: Sources, threads: int = 4) -> None:
        self._post = post
        self._sources = sources
        self._built: dict[str, Built] = {}
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="fetch")
        self.on_packed: Callable[[str, PackReport], None] = lambda key, report: None

    def fetch(self, effect: Fetch) -> None:
        """Build a blob in a thread; Fetched or FetchFailed is posted."""
        future = asyncio.get_running_loop().run_in_executor(self._threads, self._build, effect)
        future.add_done_callback(lambda done: self._arrived(effect, done))

    def _arrived(self, effect: Fetch, done: asyncio.Future[Built]) -> None:
        if done.cancelled():
            return
        error = done.exception()
        if error is None:
            built = done.result()
            self._built[effect.key] = built
            self.on_packed(effect.key, built.report)
            self._post(Fetched(effect.key))
        elif isinstance(error, SidecarError):
            self._post(FetchFailed(effect.key, error.reason, error.message))
        else:
            logger.error("packing %s failed", effect.key, exc_info=error)
            self._post(FetchFailed(effect.key, Reason.ADAPTER_UNAVAILABLE, f"packing it failed: {error}"))

    def _build(self, effect: Fetch) -> Built:
        begun_ns = monotonic_ns()
        source = self._sources.locate(effect.origin, effect.digest)
        located_ns = monotonic_ns() - begun_ns
        try:
            built = build(source, effect.layout, expected_digest=effect.digest)
        except Invalid:
            # It was sound when it was registered. If it is our copy that has changed, there may be a better one.
            if not self._sources.mend(effect.origin, effect.digest):
                raise
            source = self._sources.locate(effect.origin, effect.digest)
            built = build(source, effect.layout, expected_digest=effect.digest)
        return built._replace(report=replace(built.report, fetch_ns=built.report.fetch_ns + located_ns))

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
        self._threads.shutdown(wait=True, cancel_futures=True)
        for built in self._built.values():
            built.blob.release()
        self._built.clear()
