"""What an archive from elsewhere cannot do here: it is opened without trusting it, and nothing of it stays."""

from __future__ import annotations

import gzip
import io
import tarfile
from datetime import timedelta
from pathlib import Path

import pytest

from sidecar.errors import Misused, Reason
from sidecar.incident import capture
from sidecar.incident.capture import Wanted
from sidecar.journal import archive, replay
from sidecar.journal.archive import opened
from sidecar.journal.segments import segment_paths
from tests.kit.journals import write_journal
from tests.unit.test_explain import busy_world

HOUR = timedelta(hours=1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data directory with a journal of some segments."""
    write_journal(busy_world(), tmp_path / "data" / "journal", segment_bytes=16_384)
    return tmp_path / "data"


Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> Member:
    made = tarfile.TarInfo(name)
    made.size, made.type, made.linkname = len(content), kind, link
    return made, content


def pack(path: Path, *members: Member) -> Path:
    with tarfile.open(path, "w:gz") as made:
        for info, content in members:
            made.addfile(info, io.BytesIO(content))
    return path


HOSTILE: dict[str, Member] = {
    "a way out": member("x/journal/../../../segment-1.jsonl", b"{}"),
    "an absolute path": member("/journal/segment-1.jsonl", b"{}"),
    "a symbolic link": member("x/journal/segment-1.jsonl", kind=tarfile.SYMTYPE, link="/etc/passwd"),
    "a hard link": member("x/journal/segment-1.jsonl", kind=tarfile.LNKTYPE, link="/etc/passwd"),
    "a pipe": member("x/journal/segment-1.jsonl", kind=tarfile.FIFOTYPE),
    "a device": member("x/journal/segment-1.jsonl", kind=tarfile.CHRTYPE),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_a_hostile_archive_is_refused(name: str, tmp_path: Path) -> None:
    """Whatever leads out of the folder or is no plain file refuses the whole, and nothing is written anywhere."""
    folder = tmp_path / "deep" / "er"
    folder.mkdir(parents=True)
    path = pack(tmp_path / "incident.tgz", HOSTILE[name])
    with pytest.raises(Misused, match=r"leads out of the folder|no plain file") as caught:
        archive.unpack(path, folder)
    assert caught.value.reason is Reason.NOT_A_JOURNAL
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "deep", folder, path]


def test_only_segments_are_unpacked(tmp_path: Path) -> None:
    """Other files, and segments that lie elsewhere, are read over."""
    folder = tmp_path / "folder"
    folder.mkdir()
    path = pack(
        tmp_path / "incident.tgz",
        member("x", kind=tarfile.DIRTYPE),
        member("x/manifest.json", b"{}"),
        member("x/journal/segment-1.jsonl.sh", b"no"),
        member("x/segment-2.jsonl", b"no"),
        member("x/journal/segment-3.jsonl", b"yes"),
    )
    assert archive.unpack(path, folder) == [folder / "segment-3.jsonl"]
    assert [held.read_bytes() for held in folder.iterdir()] == [b"yes"]


def test_an_archive_that_grows_too_large_is_refused(tmp_path: Path) -> None:
    """What a few bytes would unpack to is bounded, and the way out is named."""
    path = pack(tmp_path / "incident.tgz", member("x/journal/segment-1.jsonl", bytes(1 << 20)))
    assert path.stat().st_size < 4096
    with pytest.raises(Misused, match="unpacks to more than 1000000 bytes; unpack it yourself"):
        archive.unpack(path, tmp_path, bytes_max=1_000_000)
    assert list(tmp_path.iterdir()) == [path]


def test_bytes_count_that_no_member_owns(tmp_path: Path) -> None:
    """A header as large as a file, such as a name of megabytes, is not read into memory."""
    path = pack(tmp_path / "incident.tgz", member("x/" + "n" * (4 << 20), b"{}"))
    with pytest.raises(Misused, match="one of its headers is larger"):
        archive.unpack(path, tmp_path)


def test_too_many_members_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their number is bounded."""
    monkeypatch.setattr(archive, "MEMBERS_MAX", 10)
    path = pack(tmp_path / "incident.tgz", *(member(f"x/{number}") for number in range(11)))
    with pytest.raises(Misused, match="more than 10 members"):
        archive.unpack(path, tmp_path)


def test_one_segment_twice_is_refused(tmp_path: Path) -> None:
    """The second of two segments of one name does not overwrite the first."""
    path = pack(
        tmp_path / "incident.tgz",
        member("x/journal/segment-1.jsonl", b"one"),
        member("y/journal/segment-1.jsonl", b"two"),
    )
    with pytest.raises(Misused, match="is in it twice"):
        archive.unpack(path, tmp_path)
    assert (tmp_path / "segment-1.jsonl").read_bytes() == b"one"


def test_an_archive_without_a_journal_says_so(tmp_path: Path) -> None:
    """An incident that was captured without a journal cannot be replayed."""
    path = pack(tmp_path / "incident.tgz", member("x/manifest.json", b"{}"))
    with pytest.raises(Misused, match="captured without a journal"):
        list(replay.replay(path))


def test_no_damage_goes_unnoticed(data: Path, tmp_path: Path) -> None:
    """Cut off anywhere, or with a byte changed anywhere, an archive is refused as damaged, or loses nothing by it.

    A few changed bits of a compressed file give the same bytes: those after its last code, or of the distance to one of
    two equal texts.
    """
    whole = tmp_path / "incident.tgz"
    capture.capture(Wanted(HOUR, data), whole)
    content, wanted = whole.read_bytes(), unpacked(whole, tmp_path / "whole")
    broken, errors = tmp_path / "broken.tgz", list[str]()
    after_gzips_header = 64
    places = range(after_gzips_header, len(content), len(content) // 40)
    for place in places:
        broken.write_bytes(content[:place])
        with pytest.raises(Misused, match=f"{broken} cannot be replayed: "):
            unpacked(broken, tmp_path / f"cut {place}")
        broken.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        try:
            assert unpacked(broken, tmp_path / f"changed {place}") == wanted
        except Misused as error:
            errors.append(error.message)
    assert all(error.startswith(f"{broken} cannot be replayed: ") for error in errors)
    assert len(errors) > len(places) / 2


def unpacked(path: Path, folder: Path) -> dict[str, bytes]:
    """Return an archive's segments by name."""
    folder.mkdir()
    return {segment.name: segment.read_bytes() for segment in archive.unpack(path, folder)}


def test_nothing_stays_after_a_replay(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unpacked folder goes when the replay ends, in the middle of a step too, and when the archive is bad."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    out = tmp_path / "incident.tgz"
    capture.capture(Wanted(HOUR, data), out)
    steps = replay.replay(out)
    next(steps)
    assert list((tmp_path / "scratch").iterdir())
    steps.close()
    assert list((tmp_path / "scratch").iterdir()) == []
    out.write_bytes(out.read_bytes()[:-20])
    with pytest.raises(Misused, match="it is damaged"):
        list(replay.replay(out))
    assert list((tmp_path / "scratch").iterdir()) == []


def test_what_is_no_archive_is_given_as_it_is(data: Path) -> None:
    """A directory, a segment and a path that is not there are left to the replay."""
    for path in (data, segment_paths(data / "journal")[0], data / "nothing"):
        with opened(path) as place:
            assert place == path


def test_a_compressed_file_that_is_no_archive(tmp_path: Path) -> None:
    """It is refused as damaged."""
    path = tmp_path / "incident.tgz"
    path.write_bytes(gzip.compress(b"not a tar file" * 1000))
    with pytest.raises(Misused, match="it is damaged"):
        list(replay.replay(path))
