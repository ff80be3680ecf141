"""Staged adapters are whole or not there, whatever ends the process, and nobody removes what another needs."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sidecar.adapters import claims
from sidecar.adapters.claims import HIDDEN
from sidecar.adapters.entries import Files
from sidecar.adapters.spool import digest_of_folder
from sidecar.adapters.staging import AdaptersDir, Staging
from sidecar.core.facts import Layout, packed_key
from sidecar.errors import Invalid, Misused, Refused
from tests.kit.peft_files import read_tensors, write_adapter, write_safetensors

ROOT = Path(__file__).parents[2]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapter(folder: Path, seed: int = 0) -> tuple[Path, str, str]:
    """Return a source folder, its digest and its packed key."""
    write_adapter(folder, seed=seed)
    digest = digest_of_folder(folder)
    return folder, digest, packed_key(digest, Layout("float16", files=True))


@contextmanager
def opened(directory: Path, files: Files | None = None) -> Iterator[Staging]:
    staging = Staging(directory, files)
    staging.open()
    try:
        yield staging
    finally:
        staging.close()


def visible(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != HIDDEN)


def work_left(directory: Path) -> list[Path]:
    return [path for work in (directory / HIDDEN).glob("*/work") for path in work.iterdir()]


def test_what_is_staged(tmp_path: Path) -> None:
    """The adapter's own files and nothing else, readable by everybody, under its packed key."""
    source, digest, key = adapter(tmp_path / "sql")
    (source / "README.md").write_text("x")
    (source / "optimizer.pt").write_text("x")
    (source / WEIGHTS).chmod(0o600)
    before = os.umask(0o077)
    try:
        with opened(tmp_path / "shared") as staging:
            place = staging.stage(source, key, digest)
            assert place == tmp_path / "shared" / key
            assert visible(place) == [CONFIG, WEIGHTS]
            assert digest_of_folder(place) == digest
            assert place.stat().st_mode & 0o777 == 0o755
            assert {path.stat().st_mode & 0o777 for path in place.iterdir()} == {0o644}
            assert (source / WEIGHTS).stat().st_mode & 0o777 == 0o600
            assert AdaptersDir(place.parent, "/mnt/a/").engine_path(key) == f"/mnt/a/{key}"
    finally:
        os.umask(before)


def test_shards(tmp_path: Path) -> None:
    """An adapter in several files takes its index along, and the files that this names."""
    source, _, _ = adapter(tmp_path / "sql")
    tensors = read_tensors(source)
    (source / WEIGHTS).unlink()
    names = sorted(tensors)
    parts = {"adapter_model-1-of-2.safetensors": names[:3], "adapter_model-2-of-2.safetensors": names[3:]}
    for file_name, part in parts.items():
        write_safetensors(source / file_name, {name: tensors[name] for name in part})
    owners = {name: file_name for file_name, part in parts.items() for name in part}
    (source / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": owners}))
    (source / "adapter_model-3-of-2.safetensors").write_text("left over")
    digest = digest_of_folder(source)
    with opened(tmp_path / "shared") as staging:
        place = staging.stage(source, "k", digest)
        assert visible(place) == [*sorted([CONFIG, *parts]), f"{WEIGHTS}.index.json"]
        assert digest_of_folder(place) == digest


def test_links_and_copies(tmp_path: Path) -> None:
    """Links only where they are allowed and others may read the source; its mode is never touched."""
    source, digest, key = adapter(tmp_path / "sql")
    (source / CONFIG).chmod(0o600)
    (source / WEIGHTS).chmod(0o644)
    with opened(tmp_path / "shared") as staging:
        place = staging.stage(source, key, digest, link=True)
        assert (place / WEIGHTS).samefile(source / WEIGHTS)
        assert not (place / CONFIG).samefile(source / CONFIG)
        assert (place / CONFIG).stat().st_mode & 0o777 == 0o644
        assert (source / CONFIG).stat().st_mode & 0o777 == 0o600
        staging.remove(key)
        place = staging.stage(source, key, digest)
        assert not (place / WEIGHTS).samefile(source / WEIGHTS)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_a_copy_where_links_are_not_to_be_had(tmp_path: Path, number: int) -> None:
    """Another file system, somebody else's file, too many links."""

    class NoLinks(Files):
        def link(self, source: Path, target: Path) -> None:
            raise OSError(number, os.strerror(number))

    source, digest, key = adapter(tmp_path / "sql")
    with opened(tmp_path / "shared", NoLinks()) as staging:
        place = staging.stage(source, key, digest, link=True)
        assert digest_of_folder(place) == digest
        assert not (place / WEIGHTS).samefile(source / WEIGHTS)


def test_another_file_system(tmp_path: Path) -> None:
    """The real thing, where this machine has two."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    shared = memory / f"lora-sidecar-test-{os.getpid()}"
    try:
        source, digest, key = adapter(tmp_path / "sql")
        with opened(shared) as staging:
            assert digest_of_folder(staging.stage(source, key, digest, link=True)) == digest
    finally:
        shutil.rmtree(shared)


def test_staging_again_does_nothing(tmp_path: Path) -> None:
    """Neither the source nor anybody's claims are looked at, which may be out of reach by then."""
    source, digest, key = adapter(tmp_path / "sql")
    hidden, away = tmp_path / "shared" / HIDDEN, tmp_path / "away"
    with opened(tmp_path / "shared") as staging:
        inode = (staging.stage(source, key, digest) / WEIGHTS).stat().st_ino
        shutil.rmtree(source)
        hidden.rename(away)
        assert (staging.stage(source, key, digest) / WEIGHTS).stat().st_ino == inode
        away.rename(hidden)


def _remove_all(place: Path) -> None:
    shutil.rmtree(place)


def _remove_weights(place: Path) -> None:
    (place / WEIGHTS).unlink()


def _write_over(place: Path) -> None:
    data = bytearray((place / WEIGHTS).read_bytes())
    data[-1] ^= 0x7F
    (place / WEIGHTS).write_bytes(data)


@pytest.mark.parametrize("harm", [_remove_all, _remove_weights, _write_over])
def test_what_was_harmed_is_staged_anew(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    """It is noticed without reading, by a look at the files."""
    source, digest, key = adapter(tmp_path / "sql")
    with opened(tmp_path / "shared") as staging:
        place = staging.stage(source, key, digest)
        assert staging.is_whole(key)
        harm(place)
        assert not staging.is_whole(key)
        staging.stage(source, key, digest)
        assert staging.is_whole(key)
        assert digest_of_folder(place) == digest
        assert visible(tmp_path / "shared") == [key]
        assert work_left(tmp_path / "shared") == []


def test_a_source_written_over_does_not_reach_a_copy(tmp_path: Path) -> None:
    """Of a linked one it is noticed: the version would have other content."""
    source, digest, key = adapter(tmp_path / "sql")
    linked, linked_digest, linked_key = adapter(tmp_path / "chat", seed=1)
    with opened(tmp_path / "shared") as staging:
        staging.stage(source, key, digest)
        staging.stage(linked, linked_key, linked_digest, link=True)
        _write_over(source)
        _write_over(linked)
        assert (staging.is_whole(key), staging.is_whole(linked_key)) == (True, False)
        with pytest.raises(Invalid, match="now holds other content"):
            staging.stage(linked, linked_key, linked_digest, link=True)
        assert visible(tmp_path / "shared") == [key]


def test_other_content_is_refused(tmp_path: Path) -> None:
    """The folder of a version that was trained anew; nothing is left behind."""
    source, digest, key = adapter(tmp_path / "sql")
    write_adapter(source, seed=9)
    with opened(tmp_path / "shared") as staging:
        with pytest.raises(Invalid, match="register it as a new version"):
            staging.stage(source, key, digest)
        shutil.rmtree(source)
        with pytest.raises(Invalid, match="cannot be read"):
            staging.stage(source, key, digest)
        assert visible(tmp_path / "shared") == []
        assert work_left(tmp_path / "shared") == []


STEPS = ("make_directory", "link", "create", "write", "sync", "rename", "sync_directory")


@pytest.mark.parametrize("step", [step for step in STEPS if step != "link"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_fails(tmp_path: Path, step: str, number: int) -> None:
    """Full, read-only or broken, at every step: it is told, nothing is half-made, and it goes well when it is over."""
    fails = True

    class Failing(Files):
        def __getattribute__(self, name: str) -> Any:
            if name == step and fails:
                raise OSError(number, os.strerror(number))
            return super().__getattribute__(name)

    source, digest, key = adapter(tmp_path / "sql")
    shared = tmp_path / "shared"
    with opened(shared, Failing()) as staging:
        with pytest.raises(Refused, match=f"cannot be put into adapters_dir {shared}: {os.strerror(number)}") as caught:
            staging.stage(source, key, digest)
        assert caught.value.reason.value == "ADAPTER_UNAVAILABLE"
        assert digest[:12] in caught.value.message
        assert "free some room" in caught.value.message
        assert visible(shared) == []
        assert work_left(shared) == []
        assert not staging.is_whole(key)
        fails = False
        assert digest_of_folder(staging.stage(source, key, digest)) == digest


def test_a_full_disk(tmp_path: Path) -> None:
    """A real limit on the size of a file, which the kernel enforces in the middle of the weights."""
    source, digest, key = adapter(tmp_path / "sql")
    program = """
import resource, signal, sys
from pathlib import Path
from sidecar.adapters.staging import Staging
from sidecar.errors import Refused
source, shared, key, digest = sys.argv[1:]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
staging = Staging(Path(shared))
staging.open()
try:
    staging.stage(Path(source), key, digest)
except Refused as refused:
    print(refused.message)
"""
    told = run(program, source, tmp_path / "shared", key, digest)
    assert "File too large" in told.stdout, told.stderr
    assert visible(tmp_path / "shared") == []


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


KILLED = """
import os, signal, sys
from pathlib import Path
from sidecar.adapters.entries import Files
from sidecar.adapters.staging import Staging
source, shared, key, digest, step, number, doing = sys.argv[1:]
calls = 0
armed = False
class Dying(Files):
    def __getattribute__(self, name):
        global calls
        if armed and name == step:
            calls += 1
            if calls == int(number):
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__getattribute__(name)
staging = Staging(Path(shared), Dying())
staging.open()
if doing == "remove":
    staging.stage(Path(source), key, digest)
armed = True
if doing == "remove":
    staging.remove(key)
else:
    staging.stage(Path(source), key, digest, link=doing == "link")
print("done")
"""


@pytest.mark.parametrize(
    ("doing", "step", "number"),
    [
        ("copy", "make_directory", 1),
        ("copy", "create", 1),
        ("copy", "create", 2),
        ("copy", "write", 2),
        ("copy", "sync", 2),
        ("copy", "sync_directory", 1),
        ("copy", "rename", 1),
        ("copy", "sync_directory", 2),
        ("link", "link", 1),
        ("link", "link", 2),
        ("link", "rename", 1),
        ("remove", "rename", 1),
    ],
)
def test_a_kill_at_each_step(tmp_path: Path, doing: str, step: str, number: int) -> None:
    """What has the name is whole; the next one removes what was under way, and what nobody claims any more."""
    source, digest, key = adapter(tmp_path / "sql")
    shared = tmp_path / "shared"
    ended = run(KILLED, source, shared, key, digest, step, number, doing)
    assert ended.returncode == -9, ended.stderr
    placed = (step, number) == ("sync_directory", 2) or doing == "remove"
    assert visible(shared) == ([key] if placed else [])
    assert not placed or digest_of_folder(shared / key) == digest
    with opened(shared) as staging:
        assert visible(shared) == ([key] if placed else [])
        staging.sweep()
        assert visible(shared) == []
        assert len(list((shared / HIDDEN).glob("*/owner"))) == 1
        assert work_left(shared) == []
        assert digest_of_folder(staging.stage(source, key, digest)) == digest


def test_two_sidecars_share_a_folder(tmp_path: Path) -> None:
    """What one gives up stays as long as the other needs it; a start sweeps away nothing that is claimed."""
    source, digest, key = adapter(tmp_path / "sql")
    other, other_digest, other_key = adapter(tmp_path / "chat", seed=1)
    shared = tmp_path / "shared"
    with opened(shared) as first:
        inode = (first.stage(source, key, digest) / WEIGHTS).stat().st_ino
        first.stage(other, other_key, other_digest)
        with opened(shared) as second:
            shutil.rmtree(source)  # what is there and sound is taken as it is
            assert (second.stage(source, key, digest) / WEIGHTS).stat().st_ino == inode
            first.remove(key)
            assert visible(shared) == sorted([key, other_key])
            assert second.is_whole(key)
            first.remove(other_key)
            assert visible(shared) == [key]
        assert visible(shared) == []
    assert not list((shared / HIDDEN).glob("*/owner"))


def test_two_stage_the_same_at_once(tmp_path: Path) -> None:
    """Who is second keeps what the first has put there: an engine may be reading it already."""
    source, digest, key = adapter(tmp_path / "sql")
    shared = tmp_path / "shared"

    class Overtaken(Files):
        def sync_directory(self, path: Path) -> None:
            first.stage(source, key, digest)
            super().sync_directory(path)

    with opened(shared) as first, opened(shared, Overtaken()) as second:
        place = second.stage(source, key, digest)
        assert first.is_whole(key)
        assert second.is_whole(key)
        assert digest_of_folder(place) == digest
        assert work_left(shared) == []


HOLDING = """
import sys
from pathlib import Path
from sidecar.adapters.staging import Staging
source, shared, key, digest = sys.argv[1:]
staging = Staging(Path(shared))
staging.open()
staging.stage(Path(source), key, digest)
print("staged", flush=True)
sys.stdin.read()
"""


def test_a_sidecar_that_was_killed_claims_nothing(tmp_path: Path) -> None:
    """Its lock tells: while it lives what it staged stays, and after that it goes with the last who needs it."""
    source, digest, key = adapter(tmp_path / "sql")
    shared = tmp_path / "shared"
    command = [sys.executable, "-c", HOLDING, str(source), str(shared), key, digest]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"staged\n"
        with opened(shared) as staging:
            staging.stage(source, key, digest)
            staging.remove(key)
            assert visible(shared) == [key]
            staging.stage(source, key, digest)
            process.kill()
            process.wait()
            staging.remove(key)
            assert visible(shared) == []


def test_what_a_killed_process_left_stays_until_the_sweep(tmp_path: Path) -> None:
    """An engine may be reading it. Who needs it meanwhile keeps it over the sweep, and then it goes as ever."""
    source, digest, key = adapter(tmp_path / "sql")
    other, other_digest, other_key = adapter(tmp_path / "chat", seed=1)
    shared = tmp_path / "shared"
    with opened(shared) as left:
        left.stage(source, key, digest)
        left.stage(other, other_key, other_digest)
        left.close(as_dead=True)
    with opened(shared) as staging:
        inode = (shared / key / WEIGHTS).stat().st_ino
        staging.stage(source, key, digest)
        staging.remove(key)
        assert visible(shared) == sorted([key, other_key])
        staging.stage(source, key, digest)
        staging.sweep()
        assert visible(shared) == [key]
        assert (shared / key / WEIGHTS).stat().st_ino == inode
        staging.remove(key)
        assert visible(shared) == []


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    """Files and folders of people, whatever they hold; unclaimed packed keys go."""
    shared = tmp_path / "shared"
    source, _, key = adapter(tmp_path / "sql")
    shutil.copytree(source, shared / "sql")
    shutil.copytree(source, shared / key)
    (shared / "notes").write_text("x")
    with opened(shared) as staging:
        assert visible(shared) == sorted([key, "notes", "sql"])
        staging.sweep()
        assert visible(shared) == ["notes", "sql"]


def test_many_at_once(tmp_path: Path) -> None:
    """Two sidecars, each with threads that stage and remove the same versions: what is claimed is there and sound."""
    sources = [adapter(tmp_path / f"a{seed}", seed) for seed in range(4)]
    shared = tmp_path / "shared"
    troubles: list[str] = []

    def work(staging: Staging, source: Path, digest: str, key: str) -> None:
        for _ in range(15):
            place = staging.stage(source, key, digest)
            if digest_of_folder(place) != digest:
                troubles.append(f"{key} is not there")
            staging.remove(key)

    with opened(shared) as first, opened(shared) as second:
        threads = [
            threading.Thread(target=work, args=(staging, source, digest, key))
            for staging in (first, second)
            for source, digest, key in sources
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert troubles == []
        assert visible(shared) == []
        assert work_left(shared) == []


def test_one_changes_the_claims_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever finds them held waits, and after a while says so: a process may be stopped in the middle."""
    monkeypatch.setattr(claims, "LOCK_WAIT_S", 0.05)
    source, digest, key = adapter(tmp_path / "sql")
    with opened(tmp_path / "shared") as first, opened(tmp_path / "shared") as second:
        with first._claims.alone(), pytest.raises(Refused, match=r"another process has held .*/\.lora-sidecar/lock"):
            second.stage(source, key, digest)
        assert digest_of_folder(second.stage(source, key, digest)) == digest


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    """It is said at start, with the key of the configuration and the way out."""
    (tmp_path / "file").write_text("x")
    for directory in (tmp_path / "file", tmp_path / "no" / "where"):
        with pytest.raises(Misused, match=f"adapters_dir {directory} cannot be used: .*; it must be a folder"):
            Staging(directory).open()
