"""Files of a shared-memory mount: whose they are, and that only leftovers of the dead are removed."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from sidecar.adapters.buffers import Blob, Regions
from sidecar.adapters.shared_memory import Mount

HOLDER = """
import sys, pathlib
from sidecar.adapters.shared_memory import Mount
from sidecar.adapters.buffers import Blob, Regions
mount = Mount(pathlib.Path(sys.argv[1]))
blob = Blob(4096, Regions(mount))
print(blob.path.name, flush=True)
sys.stdin.read()
"""


@contextmanager
def another_instance(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a process that keeps one blob in the mount; give it and the blob's name."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_start_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    with another_instance(tmp_path) as (process, blob):
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert blob in names(tmp_path)
    mount = Mount(tmp_path)
    assert mount.is_leftover(blob)
    assert mount.sweep() == 4096
    assert names(tmp_path) == {f"lora-sidecar-{mount.instance}.owner"}
    mount.close()
    assert names(tmp_path) == set()


def test_a_living_process_is_left_alone(tmp_path: Path) -> None:
    with another_instance(tmp_path) as (_, blob):
        mount = Mount(tmp_path)
        assert not mount.is_leftover(blob)
        assert mount.sweep() == 0
        assert blob in names(tmp_path)
        mount.close()
        assert blob in names(tmp_path)


def test_files_without_an_owner_and_files_of_others(tmp_path: Path) -> None:
    """Whoever has no owner file holds no lock; what is not named as ours is not ours."""
    orphan, other = tmp_path / f"lora-sidecar-{'0' * 16}-x", tmp_path / "triton_python_backend_shm_region_1"
    orphan.write_bytes(b"123")
    other.write_bytes(b"123")
    mount = Mount(tmp_path)
    assert mount.is_leftover(orphan.name)
    assert not mount.is_leftover(other.name)
    assert mount.sweep() == 3
    assert other.exists()
    mount.close()
    assert names(tmp_path) == {other.name}


def test_own_files_are_no_leftovers(tmp_path: Path) -> None:
    mount = Mount(tmp_path)
    blob = Blob(64, Regions(mount))
    blob.array(np.uint8, (64,))[:] = 7
    blob.seal()
    assert blob.path.name.startswith(mount.prefix)
    assert not mount.is_leftover(blob.path.name)
    assert mount.sweep() == 0
    assert blob.path.read_bytes() == bytes([7] * 64)
    blob.release()
    mount.close()


def test_starts_at_the_same_time_never_take_each_other_for_dead(tmp_path: Path) -> None:
    """Each claims an id, sweeps, and keeps its file, fifty times over."""

    def live(_: int) -> bool:
        mount = Mount(tmp_path)
        blob = Blob(8, Regions(mount))
        mount.sweep()
        there = blob.path.exists()
        blob.release()
        mount.close()
        return there

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(live, range(400)))
    assert names(tmp_path) == set()
