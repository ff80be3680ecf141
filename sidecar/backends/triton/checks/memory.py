"""Check that the server reads our shared memory, and that the mount has room for the host store."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio

from sidecar.adapters.shared_memory import DIRECTORY, PREFIX, Mount
from sidecar.backends.checks.finding import Finding, failed, ok, warning
from sidecar.backends.triton.checks.look import Look
from sidecar.backends.triton.sharing import RegionRefused, SharedBlobs

SAMPLE = b"lora-sidecar" * 8
FORGET_S = 3.0
SHARE_FIX = (
    "docker run --ipc=host, or the same volume on both sides: -v /dev/shm:/dev/shm   (sidecar and tritonserver)",
    'Kubernetes: an emptyDir {medium: Memory} volume of the pod, mounted at "/dev/shm" in both containers',
)


async def shared_memory(look: Look) -> Finding:
    """Check that the server maps a file of ours, which fails on another machine, and that the mount is large enough."""
    try:
        async with region(look, SAMPLE):
            look.sees_our_memory = True
    except RegionRefused as refused:
        return _not_shared(look, f"the server does not see our /dev/shm ({refused})")
    except OSError as error:
        return _not_shared(look, f"/dev/shm cannot be written to here ({error.strerror})")
    return room(_usable_bytes(), look.target.store_bytes)


def _usable_bytes() -> int:
    """Return the bytes that the mount has for blobs: the free ones, and those that sidecars use now."""
    usage = os.statvfs(DIRECTORY)
    held = 0
    for path in DIRECTORY.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            held += path.stat().st_size
    return usage.f_bavail * usage.f_frsize + held


def _not_shared(look: Look, text: str) -> Finding:
    if look.target.transport == "shared_memory":
        return failed(f"{text}, and weights_transport is shared_memory", *SHARE_FIX)
    return warning(f"{text}: weights travel by gRPC, which takes some ten times as long", *SHARE_FIX)


def room(usable_bytes: int, store_bytes: int | None) -> Finding:
    """Judge the mount's room for the host store, if the store's budget is known."""
    text = f"the server reads our /dev/shm, which has room for {usable_bytes / 2**30:.3g} GiB"
    if store_bytes is None:
        return ok(text)
    if usable_bytes < store_bytes:
        gib = -(-store_bytes // 2**30)
        return warning(
            f"{text} and store.memory_bytes is {store_bytes / 2**30:.3g} GiB, so weights travel by gRPC after all",
            f"docker run --shm-size={gib + 1}g   (Kubernetes: sizeLimit: {gib + 1}Gi of the emptyDir)",
            f"or config.yaml: store: {{memory_bytes: {usable_bytes * 9 // 10}}}",
        )
    return ok(f"{text}; store.memory_bytes is {store_bytes / 2**30:.3g} GiB")


@asynccontextmanager
async def region(look: Look, data: bytes) -> AsyncIterator[str]:
    """Register a region with this content for the length of a block; yield its name.

    Raises RegionRefused if the server does not map it, OSError if it cannot be made. However the block ends, the region
    is unregistered and then its file removed.
    """
    mount = Mount()
    try:
        blobs = SharedBlobs(look.target.id, look.stub, mount)
        path = _write(mount, data)
        try:
            yield await blobs.refer(str(path), len(data))
        finally:
            with contextlib.suppress(grpc.aio.AioRpcError, TimeoutError):
                async with asyncio.timeout(FORGET_S):
                    await blobs.forget(path.name)
    finally:
        mount.close()


def _write(mount: Mount, data: bytes) -> Path:
    descriptor, path = mount.create()
    try:
        os.posix_fallocate(descriptor, 0, len(data))  # a full mount is an error here, not a signal later
        with path.open("r+b") as file:
            file.write(data)
    finally:
        os.close(descriptor)
    return path
