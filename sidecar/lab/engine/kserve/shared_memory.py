"""System shared memory regions: clients put tensors there and send a reference instead of bytes.

Texts and codes follow Triton's `shared_memory_manager.cc`.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path

import grpc

from sidecar.lab.engine.kserve.errors import Rejection

DIRECTORY = Path("/dev/shm")


@dataclass
class Region:
    """A mapped region; `users` counts the requests that read it now."""

    name: str
    key: str
    offset: int
    size_bytes: int
    memory: mmap.mmap
    users: int = 0


class Regions:
    """The regions that clients registered, by name."""

    def __init__(self) -> None:
        self._regions: dict[str, Region] = {}

    def register(self, name: str, key: str, offset: int, size_bytes: int) -> None:
        """Map a region. Raises Rejection if the name or key is taken, or the key or the bytes cannot be mapped."""
        if name in self._regions:
            raise Rejection(f"shared memory region '{name}' already in manager", grpc.StatusCode.ALREADY_EXISTS)
        if any(region.key == key for region in self._regions.values()):
            # The server uses the other region's file descriptor, which it has closed; if another file has the number by
            # then, it maps that one. Refusing is what it does otherwise.
            raise Rejection(f"Invalid shared memory region: '{key}'", grpc.StatusCode.INTERNAL)
        memory = _mapped(name, key, offset, size_bytes)
        self._regions[name] = Region(name, key, offset, size_bytes, memory)

    def unregister(self, name: str) -> None:
        """Forget a region; an unknown one is no error. Raises Rejection while a request reads it."""
        region = self._regions.get(name)
        if region is None:
            return
        if region.users:
            raise Rejection(
                f"Cannot unregister shared memory region '{name}', it is currently in use.",
                grpc.StatusCode.INTERNAL,
            )
        del self._regions[name]

    def unregister_all(self) -> None:
        """Forget every region that no request reads."""
        for name in [name for name, region in self._regions.items() if not region.users]:
            self.unregister(name)

    def status(self, name: str) -> list[Region]:
        """Return one region, or all for an empty name. Raises Rejection for an unknown one."""
        if not name:
            return list(self._regions.values())
        if name not in self._regions:
            raise Rejection(f"Unable to find system shared memory region: '{name}'", grpc.StatusCode.NOT_FOUND)
        return [self._regions[name]]

    def use(self, name: str, offset: int, size_bytes: int) -> tuple[Region, memoryview]:
        """Return a region, held until `release`, and the requested bytes. Raises Rejection if they do not exist."""
        region = self._regions.get(name)
        if region is None:
            raise Rejection(f"Unable to find shared memory region: '{name}'", grpc.StatusCode.NOT_FOUND)
        if not 0 <= offset < region.size_bytes:
            raise Rejection(f"Invalid offset for shared memory region: '{name}'")
        if not 0 <= size_bytes <= region.size_bytes - offset:
            raise Rejection(f"Invalid offset + byte size for shared memory region: '{name}'")
        region.users += 1
        start = region.offset + offset
        return region, memoryview(region.memory)[start : start + size_bytes]


def release(regions: list[Region]) -> None:
    """Release regions taken with `use`."""
    for region in regions:
        region.users -= 1


def _mapped(name: str, key: str, offset: int, size_bytes: int) -> mmap.mmap:
    try:
        with (DIRECTORY / key.lstrip("/")).open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise Rejection(f"Unable to open shared memory region: '{key}'", grpc.StatusCode.INTERNAL) from error
    if offset + size_bytes > len(memory):
        memory.close()
        raise Rejection(f"failed to register shared memory region '{name}': invalid args")
    if not size_bytes or offset % mmap.PAGESIZE:
        memory.close()
        raise Rejection(
            f"failed to register shared memory region '{name}': unable to process address spaceInvalid argument"
        )
    return memory
