"""Blobs: written once, sealed, lent out, and gone with the last lease."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from sidecar.adapters import buffers
from sidecar.adapters.buffers import Blob, Regions, available_bytes
from sidecar.adapters.shared_memory import Mount
from sidecar.errors import Reason, Refused
from tests.kit.peft_files import open_files


@pytest.fixture(params=["memory", "mount", "no memfd"])
def mount(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mount | None]:
    """Each place a blob can lie in."""
    if request.param == "no memfd":
        monkeypatch.delattr(os, "memfd_create")
        monkeypatch.setattr(buffers.tempfile, "tempdir", str(tmp_path))
    if request.param != "mount":
        yield None
        return
    mount = Mount(tmp_path)
    yield mount
    mount.close()


def filled(mount: Mount | None, regions: Regions | None = None) -> Blob:
    """A sealed blob of 0, 1, 2, …"""
    regions = regions or Regions(mount)
    blob = Blob(1024, regions)
    blob.array(np.uint8, (1024,))[:] = np.arange(1024) % 256
    blob.seal()
    return blob


def test_a_sealed_blob_is_read_only_and_keeps_its_bytes(mount: Mount | None) -> None:
    """What was written before the seal is what everybody reads after it."""
    blob = filled(mount)
    values = blob.array(np.uint8, (4, 256))
    assert values[3, 255] == 255
    assert not values.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        values[0, 0] = 1
    blob.release()


def test_another_process_reads_the_path_while_the_blob_lives(mount: Mount | None) -> None:
    """The loader process opens the blob by its path."""
    blob = filled(mount)
    code = "import sys, pathlib; print(sum(pathlib.Path(sys.argv[1]).read_bytes()))"
    output = subprocess.run([sys.executable, "-c", code, str(blob.path)], capture_output=True, check=True, text=True)
    assert int(output.stdout) == 4 * sum(range(256))
    blob.release()
    assert not blob.path.exists()


def test_a_sealed_memory_file_cannot_be_written_by_others() -> None:
    """Not even by a process that opens it for writing."""
    blob = filled(None)
    descriptor = os.open(blob.path, os.O_RDWR)
    with pytest.raises(PermissionError):
        os.write(descriptor, b"x")
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 0)
    os.close(descriptor)
    blob.release()


def test_the_last_lease_ends_the_blob(mount: Mount | None) -> None:
    """Two leases: the first release changes nothing, the second closes the descriptor and removes the file."""
    before = open_files()
    blob = filled(mount)
    assert blob.lease() is blob
    assert blob.leases == 2
    blob.release()
    assert blob.array(np.uint8, (1,)) == [0]
    assert blob.path.exists()
    blob.release()
    assert open_files() == before
    assert not blob.path.exists()
    for call in (blob.release, blob.lease, lambda: blob.array(np.uint8, (1,))):
        with pytest.raises(AssertionError):
            call()


def test_an_array_outlives_the_last_lease(mount: Mount | None) -> None:
    """A reader that is late reads its bytes, not a fault."""
    blob = filled(mount)
    values = blob.array(np.uint8, (1024,))
    blob.release()
    assert values[255] == 255


def test_a_forgotten_blob_leaves_nothing_behind(mount: Mount | None) -> None:
    """A blob that is dropped without a release gives its descriptor and file back too."""
    gc.collect()  # what earlier tests have left would go meanwhile
    before = open_files()
    blob = filled(mount)
    path = blob.path
    del blob
    gc.collect()
    assert open_files() == before
    assert not path.exists()


def test_sealing_under_a_writable_array_is_an_error() -> None:
    """A writer that is still there could change what was promised not to change."""
    blob = Blob(16)
    values = blob.array(np.uint8, (16,))
    with pytest.raises(BufferError):
        blob.seal()
    del values
    blob.seal()
    assert blob.is_sealed
    blob.release()


def test_an_array_larger_than_the_blob_is_an_error() -> None:
    """Shapes are checked against the bytes."""
    blob = Blob(16)
    with pytest.raises((TypeError, ValueError)):
        blob.array(np.float16, (9,))
    blob.release()


def test_no_room_is_refused_with_the_bytes_and_leaves_nothing(
    mount: Mount | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A full disk or memory is a message, not a crash."""

    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = open_files()
    with pytest.raises(Refused) as caught:
        Blob(4096, Regions(mount))
    assert caught.value.reason is Reason.ADAPTER_UNAVAILABLE
    assert "no room for 4096 bytes of packed weights" in caught.value.message
    assert "No space left on device" in caught.value.message
    assert open_files() == before
    assert [path for path in tmp_path.iterdir() if path.suffix != ".owner"] == []


def test_more_than_the_machine_has_is_refused_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel grants memory files beyond its memory and then kills processes: we ask first."""
    monkeypatch.setattr(buffers, "available_bytes", lambda: 4095)
    with pytest.raises(Refused, match="4095 bytes are available"):
        Blob(4096)


def test_the_machines_memory_is_known() -> None:
    """On Linux the estimate exists and is plausible."""
    available = available_bytes()
    assert available is not None
    assert available > 1 << 20


@pytest.mark.parametrize(
    ("limit", "expected"), [("max", 8 << 20), ("5000000", 5_000_000 - 3_000_000 + 1_000_000), ("9", 0)]
)
def test_a_containers_limit_counts(tmp_path: Path, limit: str, expected: int) -> None:
    """The smaller of machine and container, cached file pages not counted as used."""
    (tmp_path / "meminfo").write_text("MemTotal: 99999 kB\nMemAvailable: 8192 kB\n")
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 1000000\n" if limit != "9" else "")
    assert available_bytes(tmp_path / "meminfo", tmp_path) == expected
    assert available_bytes(tmp_path / "missing", tmp_path / "missing") is None


def test_a_mount_that_has_gone_is_refused(tmp_path: Path) -> None:
    """The mount is named."""
    mount = Mount(tmp_path)
    mount.directory = tmp_path / "missing"
    with pytest.raises(Refused, match="missing"):
        Blob(16, Regions(mount))
    mount.directory = tmp_path
    mount.close()


def test_an_ended_blobs_memory_serves_the_next(mount: Mount | None) -> None:
    """The next has its own name and bytes; nothing is left once the spares are closed."""
    before = open_files()
    regions = Regions(mount, 2)
    first = filled(mount, regions)
    path = first.path
    first.release()
    held = len(open_files())
    assert held > len(before)
    second = Blob(1024, regions)
    assert len(open_files()) == held, "no other memory was taken"
    second.array(np.uint8, (1024,))[:] = 7
    second.seal()
    assert set(second.path.read_bytes()) == {7}
    if mount is not None:
        assert second.path != path
        assert not path.exists()
    second.release()
    assert regions.close()
    assert not regions.close()
    assert open_files() == before


@pytest.mark.parametrize("size", [256, 1024, 9000])
def test_memory_that_is_used_again_has_the_new_size(mount: Mount | None, size: int) -> None:
    """Sealed memory keeps its size, so that of another size is new; a file in a mount is cut or grows."""
    regions = Regions(mount, 2)
    filled(mount, regions).release()
    blob = Blob(size, regions)
    blob.array(np.uint8, (size,))[:] = 3
    blob.seal()
    assert blob.path.read_bytes() == bytes([3]) * size
    assert blob.array(np.uint8, (size,)).sum() == 3 * size
    blob.release()
    regions.close()


def test_memory_that_is_still_read_serves_nobody_else(mount: Mount | None) -> None:
    """An array that outlives its blob, and something outside that nobody knows of."""
    regions = Regions(mount, 2)
    first = filled(mount, regions)
    values = first.array(np.uint8, (1024,))
    first.release()
    second = filled(mount, regions)
    second.array(np.uint8, (1,))
    assert values[255] == 255
    second.is_reusable = False
    held = second.path
    second.release()
    assert not held.exists()
    third = Blob(1024, regions)
    third.array(np.uint8, (1024,))[:] = 9
    assert values[255] == 255
    third.release()
    regions.close()


def test_spares_are_few_and_within_their_allowance(mount: Mount | None) -> None:
    """Of three that end at once the two youngest stay; beside a new blob, what the store has free."""
    before, allowance = len(open_files()), [10_000]
    regions = Regions(mount, 2, lambda: allowance[0])
    one = filled(mount, regions)
    of_one = len(open_files()) - before
    for blob in [one, filled(mount, regions), filled(mount, regions)]:
        blob.release()
    assert len(open_files()) == before + 2 * of_one
    allowance[0] = 0
    blob = Blob(1024, regions)
    assert len(open_files()) == before + of_one, "the other spare went"
    blob.release()
    assert len(open_files()) == before + of_one, "a blob that ends in a full store leaves its memory to the next"
    regions.close()
    assert len(open_files()) == before


def test_spares_give_way_when_memory_is_short(mount: Mount | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A blob that finds no room is tried once more without them."""
    regions = Regions(mount, 2)
    filled(mount, regions).release()
    tries: list[int] = []
    reserve = os.posix_fallocate

    def full_at_first(descriptor: int, offset: int, length: int) -> None:
        tries.append(length)
        if len(tries) < 2:
            raise OSError(28, "No space left on device")
        reserve(descriptor, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", full_at_first)
    monkeypatch.setattr(buffers.Region, "may_hold", lambda self, size: False)
    Blob(4096, regions).release()
    assert tries == [4096, 4096]
    regions.close()


def test_many_threads_share_regions(mount: Mount | None) -> None:
    """Each blob keeps its own bytes while it lives, whoever had the memory before."""
    regions = Regions(mount, 3)

    def live(number: int) -> bool:
        size = (512, 1024, 5000)[number % 3]
        blob = Blob(size, regions)
        blob.array(np.uint8, (size,))[:] = number % 251
        blob.seal()
        same = blob.path.read_bytes() == bytes([number % 251]) * size
        blob.release()
        return same

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(live, range(600)))
    regions.close()
