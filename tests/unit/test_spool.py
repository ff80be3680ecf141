"""The spool holds whole folders or none, whenever the process ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sidecar.adapters.spool import Spool, digest_of_folder
from sidecar.errors import Refused
from tests.kit.peft_files import write_adapter

ROOT = Path(__file__).parents[2]


def arrived(spool: Spool, seed: int = 0) -> tuple[Path, str]:
    """Return an incoming folder with an adapter in it, and its digest."""
    folder = write_adapter(spool.make_incoming(), seed=seed)
    return folder, digest_of_folder(folder)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_adopt_and_discard(tmp_path: Path) -> None:
    """A folder is known by its digest from the rename on, to the next process too, until it is discarded."""
    spool = Spool(tmp_path)
    folder, digest = arrived(spool)
    assert not spool.holds(digest)
    target = spool.adopt(folder, digest)
    assert target == tmp_path / "sources" / digest
    assert digest_of_folder(target) == digest
    assert Spool(tmp_path).digests() == [digest]
    assert names(tmp_path / "incoming") == []
    spool.discard(digest)
    spool.discard(digest)
    assert (spool.holds(digest), spool.digests(), names(tmp_path / "incoming")) == (False, [], [])


def test_what_is_there_already(tmp_path: Path) -> None:
    """A sound copy stays and the new one goes; a damaged copy is replaced."""
    spool = Spool(tmp_path)
    folder, digest = arrived(spool)
    weights = spool.adopt(folder, digest) / "adapter_model.safetensors"
    inode = weights.stat().st_ino
    spool.adopt(arrived(spool)[0], digest)
    assert weights.stat().st_ino == inode
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    spool.adopt(arrived(spool)[0], digest)
    assert digest_of_folder(spool.folder(digest)) == digest
    assert names(tmp_path / "incoming") == []


def test_what_was_under_way_is_removed_at_start(tmp_path: Path) -> None:
    """Folders and stray files; nothing that stands in `sources` is touched, known or not."""
    spool = Spool(tmp_path)
    _, digest = arrived(spool)
    spool.adopt(arrived(spool)[0], digest)
    (tmp_path / "incoming" / "stray").write_text("x")
    (tmp_path / "sources" / "README").write_text("x")
    again = Spool(tmp_path)
    assert names(tmp_path / "incoming") == []
    assert again.digests() == [digest]


def test_without_a_data_directory(tmp_path: Path) -> None:
    """A temporary directory is made when it is needed, for this user only, and goes with `close`."""
    spool = Spool(None)
    assert not spool.holds("a" * 64)
    assert spool.digests() == []
    folder, digest = arrived(spool)
    spool.adopt(folder, digest)
    directory = spool.directory
    assert directory.stat().st_mode & 0o077 == 0
    spool.close()
    assert not directory.exists()
    Spool(None).close()


def test_a_disk_that_cannot_be_written_to(tmp_path: Path) -> None:
    """Nothing arrives and the reason is told."""
    spool = Spool(tmp_path)
    (tmp_path / "incoming").rmdir()
    (tmp_path / "incoming").touch()
    with pytest.raises(Refused, match="no room for a new folder on the disk of the data directory"):
        spool.make_incoming()


KILLED = """
import os, signal, sys
from pathlib import Path
from sidecar.adapters.entries import Files
from sidecar.adapters.spool import Spool
from tests.unit.test_spool import arrived
calls = 0
class Dying(Files):
    def __getattribute__(self, name):
        global calls
        if name in ("rename", "sync_directory"):
            calls += 1
            if calls == int(sys.argv[2]):
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__getattribute__(name)
spool = Spool(Path(sys.argv[1]), Dying())
folder, digest = arrived(spool)
print(digest, flush=True)
spool.adopt(folder, digest)
"""


@pytest.mark.parametrize(("call", "is_there"), [(1, False), (2, False), (3, True)])
def test_a_kill_before_each_step(call: int, is_there: bool, tmp_path: Path) -> None:
    """After a restart the source is whole or not there, and no folder that was under way stays.

    The steps: flush the folder, rename it, flush the folder that holds it.
    """
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(call)]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert ended.returncode == -9, ended.stderr
    digest = ended.stdout.strip()
    spool = Spool(tmp_path)
    assert spool.holds(digest) is is_there
    assert not spool.holds(digest) or digest_of_folder(spool.folder(digest)) == digest
    assert names(tmp_path / "incoming") == []
