"""The disk tier: a restart is no cold start, and nothing that happens to the disk is seen by a client."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sidecar.adapters import disk
from sidecar.adapters.builder import build
from sidecar.adapters.disk import DiskTier
from sidecar.adapters.entries import Files
from sidecar.adapters.layout import Layout
from sidecar.core.effects import Fetch
from sidecar.core.facts import packed_key
from sidecar.errors import Refused
from sidecar.proto import admin_pb2 as pb
from tests.kit.emulated import running_engine
from tests.kit.forked import python
from tests.kit.peft_files import write_adapter
from tests.kit.serving import Serving, serving, until, write_adapters

DUMMY = {"compute": "none", "shape": "tiny"}
FP16 = Layout("float16")


def fetches(served: Serving) -> dict[bool, int]:
    """Return how many fetches there were from origins (False) and from disk (True)."""
    found = served.recorder.of(Fetch)
    return {where: sum(fetch.from_disk is where for fetch in found) for where in (False, True)}


def blobs(data: Path) -> list[Path]:
    return sorted(path for path in (data / "blobs").rglob("*") if path.is_file())


async def ask_all(served: Serving, names: list[str]) -> None:
    for answer, name in zip(await asyncio.gather(*(served.ask(name, 3) for name in names)), names, strict=True):
        assert answer.tokens == served.expected(name, 3)


async def test_a_restart_packs_nothing_anew(tmp_path: Path) -> None:
    """Every blob that the first life packed serves the second, though the origins are gone."""
    names = write_adapters(tmp_path / "loras", 6)
    data = {"data_directory": str(tmp_path / "data")}
    async with running_engine(**DUMMY) as engine, serving([engine], tmp_path / "loras", **data) as served:
        await ask_all(served, names)
        await until(lambda: len(served.state.disk.entries) == 6 and not served.state.disk.fetches)
    assert len(blobs(tmp_path / "data")) == 6
    async with running_engine(**DUMMY) as engine, serving([engine], tmp_path / "loras", **data) as served:
        assert len(served.state.disk.entries) == 6
        assert (await served.ask("a00", 3)).origins[0].cache == "host"
        await ask_all(served, names)
        assert fetches(served) == {False: 0, True: 6}


async def test_budgets_hold_in_both_tiers(tmp_path: Path) -> None:
    """A memory of two blobs over a disk of five: what memory evicts comes back from disk, and neither is exceeded."""
    names = write_adapters(tmp_path / "loras", 10)
    blob = 4 * 8 * 128 * 2
    store = {"memory_bytes": 2 * blob, "disk_bytes": 5 * blob + 10}
    record = {"data_directory": str(tmp_path / "data"), "store": store}
    async with (
        running_engine(**DUMMY, lora_host_pages=1, lora_device_pages=1) as engine,
        serving([engine], tmp_path / "loras", **record) as served,
    ):
        for _ in range(3):
            await ask_all(served, names[:4])
        assert fetches(served)[False] == 4
        assert fetches(served)[True] > 0
        await ask_all(served, names)
        assert served.state.store.bytes_used <= store["memory_bytes"]
        assert served.state.disk.bytes_used <= store["disk_bytes"]
        await until(lambda: not served.state.disk.fetches)
        assert served.state.disk.evictions > 0


async def test_a_corrupt_blob_is_fetched_again(tmp_path: Path) -> None:
    """Its checksum is wrong at first use: the adapter comes from its origin, and the answer is right."""
    write_adapters(tmp_path / "loras", 2)
    data = {"data_directory": str(tmp_path / "data")}
    async with running_engine(**DUMMY) as engine, serving([engine], tmp_path / "loras", **data) as served:
        await ask_all(served, ["a00", "a01"])
        await until(lambda: len(served.state.disk.entries) == 2 and not served.state.disk.fetches)
    for path in blobs(tmp_path / "data"):
        content = bytearray(path.read_bytes())
        content[100] ^= 1
        path.write_bytes(content)
    async with running_engine(**DUMMY) as engine, serving([engine], tmp_path / "loras", **data) as served:
        await ask_all(served, ["a00", "a01"])
        assert fetches(served) == {False: 2, True: 2}
        await until(lambda: len(served.state.disk.entries) == 2 and not served.state.disk.fetches)


@pytest.mark.parametrize(
    ("operation", "error"),
    [("write", errno.ENOSPC), ("create", errno.EROFS), ("sync", errno.EIO), ("rename", errno.EACCES)],
)
async def test_a_disk_that_cannot_be_written_is_left_alone(
    operation: str, error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full, read-only or broken: serving goes on from memory and origins, and nothing half-written stays."""

    def broken(self: Files, *arguments: Any) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(Files, operation, broken)
    names = write_adapters(tmp_path / "loras", 4)
    data = {"data_directory": str(tmp_path / "data")}
    async with running_engine(**DUMMY) as engine, serving([engine], tmp_path / "loras", **data) as served:
        await ask_all(served, names)
        await until(lambda: not served.state.disk.fetches)
        assert not served.state.disk.entries
        assert served.state.disk.bytes_used == 0
        assert all(not entry.pins for entry in served.state.store.entries.values())
    assert blobs(tmp_path / "data") == []


def test_a_folder_that_is_called_like_a_blob_is_let_be(tmp_path: Path) -> None:
    """It is not the tier's: the scan neither fails on it nor removes it."""
    for name in ("d.blob", "other"):
        (tmp_path / name).mkdir()
    assert DiskTier(tmp_path).scan() == []
    assert {path.name for path in tmp_path.iterdir()} == {"d.blob", "other"}


def test_a_full_disk_frees_room_and_lets_the_process_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing new can be made there, so what goes is unlinked where it is."""
    tier = DiskTier(tmp_path)
    tier.scan()
    built = build(write_adapter(tmp_path / "adapter"), FP16)
    tier.write("first", built)
    (tmp_path / "broken.blob").touch()

    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    monkeypatch.setattr(Path, "mkdir", lambda path, **_: None if path.is_dir() else full())
    assert [held.key for held in DiskTier(tmp_path).scan()] == ["first"]
    with pytest.raises(OSError, match="No space left"):
        tier.write("second", built)
    tier.delete("first")
    assert not list(tmp_path.glob("*.blob"))
    built.blob.release()


@pytest.mark.parametrize("strange", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("nowhere")])
def test_what_only_has_a_blobs_name_is_let_be(strange: Callable[[Path], None], tmp_path: Path) -> None:
    strange(tmp_path / "x.blob")
    assert DiskTier(tmp_path).scan() == []
    assert os.path.lexists(tmp_path / "x.blob")


@pytest.mark.parametrize(
    ("field", "value"), [("key", "other"), ("rows", [[0, 0, 8]]), ("width", 998), ("sha256", "0" * 64)]
)
def test_a_footer_that_was_changed_is_no_other_adapter(field: str, value: object, tmp_path: Path) -> None:
    """The rows are as they were: the checksum is over what says how to read them, too."""
    tier = DiskTier(tmp_path)
    tier.scan()
    built = build(write_adapter(tmp_path / "adapter"), FP16)
    tier.write("key", built)
    tier.write("other", built)
    rows = built.blob.size_bytes
    (tmp_path / "other.blob").rename(tmp_path / "moved.blob")
    with pytest.raises(Refused, match="another blob"):
        tier.read("moved", FP16)
    content = (tmp_path / "key.blob").read_bytes()
    footer = json.loads(content[rows:-8])
    if field == "rows":
        value = [[module, layer, 2 * rank] for module, layer, rank in footer["rows"]]
    text = json.dumps(footer | {field: value}, separators=(",", ":")).encode()
    (tmp_path / "key.blob").write_bytes(content[:rows] + text + struct.pack("<I4s", len(text), content[-4:]))
    with pytest.raises(Refused, match=r"another blob|checksum"):
        tier.read("key", FP16)
    built.blob.release()


async def test_500_blobs_are_found_without_reading_them(tmp_path: Path) -> None:
    """20 GB of them, sparse: the scan reads tails only, and first use verifies."""
    folder = tmp_path / "blobs"
    tier = DiskTier(folder)
    tier.scan()
    built = build(write_adapter(tmp_path / "a"), FP16)
    tier.write("first", built)
    (written,) = blobs(tmp_path)
    content = written.read_bytes()
    with written.open("rb") as file:
        rows, _ = disk._read_footer(file.fileno())
    for number in range(500):
        with (folder / f"sparse{number}.blob").open("wb") as file:
            file.truncate(40_000_000)
            file.seek(40_000_000)
            file.write(content[rows:])
    found = tier.scan()
    assert len(found) == 501
    assert sum(held.size_bytes for held in found) > 20_000_000_000
    with pytest.raises(Refused, match="its footer describes another blob"):
        tier.read("sparse7", FP16)
    again = tier.read("first", FP16)
    assert again.blob.array("u1", (rows,)).tobytes() == content[:rows]
    assert (again.plan.rows, again.plan.width) == (built.plan.rows, built.plan.width)
    for held in (again, built):
        held.blob.release()


CRASH = """
import os, sys
from pathlib import Path
from sidecar.adapters import disk
from sidecar.adapters.builder import build
from sidecar.adapters.entries import Files
from sidecar.adapters.layout import Layout

point = int(sys.argv[3])
count = 0

def before(method):
    def crash(self, *arguments):
        global count
        count += 1
        if count == point:
            os.kill(os.getpid(), 9)
        return method(self, *arguments)
    return crash

for name in ("create", "write", "sync", "rename", "sync_directory", "unlink"):
    setattr(Files, name, before(getattr(Files, name)))
tier = disk.DiskTier(Path(sys.argv[2]))
tier.scan()
for number in range(2):
    tier.write(f"key{number}", build(Path(sys.argv[1]), Layout("float16")))
tier.delete("key0")
print(count)
"""


async def crashing(adapter: Path, folder: Path, point: int) -> tuple[int, str]:
    process = await python("-c", CRASH, str(adapter), str(folder), str(point), stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode()


async def test_kill_9_before_every_operation_leaves_whole_blobs_or_none(tmp_path: Path) -> None:
    """After each crash the next start finds blobs that verify, and no unfinished file."""
    adapter = write_adapter(tmp_path / "a")
    code, out = await crashing(adapter, tmp_path / "uncrashed", 10_000)
    assert code == 0
    points = int(out)
    assert points >= 12
    for point in range(1, points + 1):
        folder = tmp_path / f"crash{point}"
        code, _ = await crashing(adapter, folder, point)
        assert code == -9
        tier = DiskTier(folder)
        for held in tier.scan():
            tier.read(held.key, FP16).blob.release()
        assert [path.name for path in folder.rglob("*") if path.suffix != disk.SUFFIX] == [disk.WORK]


async def test_the_version_before_is_kept_on_disk(tmp_path: Path) -> None:
    """A memory of one blob: going back reads the disk and never the origin, which is gone."""
    paths = [write_adapter(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two", "other"))]
    store: dict[str, Any] = {"memory_bytes": 10_000, "disk_bytes": 100_000}
    record = {"data_directory": str(tmp_path / "data"), "store": store}
    async with (
        running_engine(**DUMMY, lora_host_pages=1, lora_device_pages=1) as engine,
        serving([engine], roots=[tmp_path], **record) as served,
    ):
        answers = []
        for path in paths[:2]:
            await served.adapters.Register(pb.RegisterRequest(name="sql", path=str(path)))
            answers.append((await served.ask("sql", 3)).tokens)
        await served.adapters.Register(pb.RegisterRequest(name="other", path=str(paths[2])))
        await served.ask("other", 3)
        await until(lambda: len(served.state.disk.entries) == 3 and not served.state.disk.fetches)
        for path in paths:
            (path / "adapter_model.safetensors").unlink()
        await served.adapters.Rollback(pb.RollbackRequest(name="sql"))
        assert (await served.ask("sql", 3)).tokens == answers[0]
        digest = served.state.versions[served.state.names["sql"].digest].adapter.digest
        assert served.state.disk.has(packed_key(digest, FP16))
