"""The store's staged folders: in every shared folder or in none, one thing at a time for each version."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from sidecar.adapters.claims import HIDDEN
from sidecar.adapters.entries import Files
from sidecar.adapters.origins.allowing import AllowList
from sidecar.adapters.origins.origin import PUSHED
from sidecar.adapters.spool import Spool, digest_of_folder
from sidecar.adapters.staging import Staging
from sidecar.core.effects import Fetch
from sidecar.core.facts import Layout, packed_key
from sidecar.errors import Invalid, Refused
from sidecar.shell.sources import Sources
from sidecar.shell.staged import StagedFolders
from tests.kit.peft_files import write_adapter

FILES = Layout("float16", files=True)


class Full(Files):
    """A disk with no room."""

    def write(self, descriptor: int, data: memoryview) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@asynccontextmanager
async def folders(sources: Sources, *stagings: Staging) -> AsyncIterator[StagedFolders]:
    with ThreadPoolExecutor(4) as threads:
        made = StagedFolders(sources, stagings, threads)
        await made.open()
        yield made
    made.close()
    sources.close()


def sources_of(directory: Path) -> Sources:
    return Sources(AllowList.of(roots=[directory]), Spool(directory / "data"))


def fetch(origin: Path) -> Fetch:
    digest = digest_of_folder(origin)
    return Fetch(packed_key(digest, FILES), digest, str(origin), FILES, 1000)


def staged(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != HIDDEN)


async def test_into_every_folder(tmp_path: Path) -> None:
    """A load may be for an engine that reads from any of them; the bytes are told back when it leaves."""
    effect = fetch(write_adapter(tmp_path / "sql"))
    one, two = tmp_path / "one", tmp_path / "two"
    async with folders(sources_of(tmp_path), Staging(one), Staging(two)) as made:
        await made.bring(effect)
        assert digest_of_folder(one / effect.key) == digest_of_folder(two / effect.key) == effect.digest
        weights = made.lease(effect.key)
        assert (weights.path, weights.dtype, weights.size_bytes) == (str(one / effect.key), "float16", 1000)
        shutil.rmtree(two / effect.key)
        await weights.ready()
        assert digest_of_folder(two / effect.key) == effect.digest
        assert await made.leave(effect.key) == 1000
        assert staged(one) == staged(two) == []


async def test_one_folder_is_full(tmp_path: Path) -> None:
    """Then the version is in none; it is told which, and what to do."""
    effect = fetch(write_adapter(tmp_path / "sql"))
    one, two = tmp_path / "one", tmp_path / "two"
    async with folders(sources_of(tmp_path), Staging(one), Staging(two, Full())) as made:
        with pytest.raises(Refused, match=f"adapters_dir {two}: No space left on device; free some room there"):
            await made.bring(effect)
        assert staged(one) == staged(two) == []


async def test_it_leaves_and_comes_at_once(tmp_path: Path) -> None:
    """What was asked for last is what holds: nobody looks at the folder while it is being taken away."""
    looked_at = threading.Event()

    class Watched(Staging):
        leaving = looked_at_meanwhile = False

        def remove(self, key: str) -> None:
            looked_at.clear()
            Watched.leaving = True
            looked_at.wait(0.2)
            super().remove(key)
            Watched.leaving = False

        def is_whole(self, key: str) -> bool:
            looked_at.set()
            Watched.looked_at_meanwhile |= Watched.leaving
            return super().is_whole(key)

    effect = fetch(write_adapter(tmp_path / "sql"))
    shared = tmp_path / "shared"
    async with folders(sources_of(tmp_path), Watched(shared)) as made:
        await made.bring(effect)
        await asyncio.gather(made.leave(effect.key), made.bring(effect))
        assert digest_of_folder(shared / effect.key) == effect.digest
        assert not Watched.looked_at_meanwhile


async def test_only_what_is_in_the_spool_is_linked(tmp_path: Path) -> None:
    """A person's own folder may be written over at any time."""
    sources = sources_of(tmp_path)
    own = fetch(write_adapter(tmp_path / "sql"))
    pushed = write_adapter(sources.spool.make_incoming(), seed=1)
    digest = digest_of_folder(pushed)
    home = sources.spool.adopt(pushed, digest)
    shared = tmp_path / "shared"
    async with folders(sources, Staging(shared)) as made:
        await made.bring(own)
        spooled = Fetch(packed_key(digest, FILES), digest, f"{PUSHED}://{digest}", FILES, 1000)
        await made.bring(spooled)
        name = "adapter_model.safetensors"
        assert (shared / spooled.key / name).samefile(home / name)
        assert not (shared / own.key / name).samefile(tmp_path / "sql" / name)


async def test_a_damaged_copy_of_ours(tmp_path: Path) -> None:
    """The spool's is dropped, and what cannot be had again is told."""
    sources = sources_of(tmp_path)
    pushed = write_adapter(sources.spool.make_incoming())
    digest = digest_of_folder(pushed)
    home = sources.spool.adopt(pushed, digest)
    weights = home / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    async with folders(sources, Staging(tmp_path / "shared")) as made:
        with pytest.raises(Invalid, match="push it again"):
            await made.bring(Fetch(packed_key(digest, FILES), digest, f"{PUSHED}://{digest}", FILES, 1000))
        assert staged(tmp_path / "shared") == []
        assert not sources.spool.holds(digest)
