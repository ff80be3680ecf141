"""Downloads through fsspec: S3 by a real server behind one that goes wrong, the others by a scripted client."""

from __future__ import annotations

import base64
import hashlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from sidecar.adapters.origins import fetching as buckets
from sidecar.adapters.origins.checksums import Checksum, running
from sidecar.adapters.origins.origin import BUCKETS
from sidecar.errors import Invalid, Reason, Refused, needs_extra
from tests.kit.faulty_http import Fault, FaultyServer, faulty_server
from tests.kit.object_store import client, object_store, put_folder
from tests.kit.origins import World, bring, folder_files
from tests.kit.peft_files import ALL_LINEAR, write_adapter
from tools.release.bundle import ORIGINS

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ALLOW = ["s3://loras/"]


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with object_store() as address:
        client(address).create_bucket(Bucket="loras")
        yield address


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "source" / "sql", modules=ALL_LINEAR)


@pytest.fixture
def server(store: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    """A faulty server in front of the store, and this process's environment pointing at it; one try a call."""
    put_folder(store, "loras", "team/sql", folder)
    with faulty_server(upstream=store) as running_server:
        for name, value in (("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test"), ("MAX_ATTEMPTS", "1"),
                            ("DEFAULT_REGION", "us-east-1"), ("ENDPOINT_URL_S3", f"http://{running_server.address}"),
                            ("EC2_METADATA_DISABLED", "true")):  # fmt: skip
            monkeypatch.setenv(f"AWS_{name}", value)
        filesystem: Any = fsspec.get_filesystem_class("s3")
        monkeypatch.setattr(filesystem, "retries", 1)
        filesystem.clear_instance_cache()
        yield running_server
        filesystem.clear_instance_cache()


def test_a_sound_store(server: FaultyServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files come in ranges and are compared with the MD5 that the store's ETag is."""
    monkeypatch.setattr(buckets, "RANGE_BYTES", 10_000)
    brought = bring("s3://loras/team/sql", tmp_path / "to", ALLOW)
    assert brought.files() == folder_files(folder)
    ranges = [
        asked.headers["range"] for asked in server.asked if asked.path.endswith(WEIGHTS) and asked.method == "GET"
    ]
    assert ranges[:2] == ["bytes=0-9999", "bytes=10000-19999"]
    assert brought.progress[-1] == brought.size_bytes


def test_cut_connections_and_busy_answers(
    server: FaultyServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came in whole ranges is kept; the download goes on there."""
    monkeypatch.setattr(buckets, "RANGE_BYTES", 10_000)
    server.faults[WEIGHTS] = [Fault(), Fault(body_max=100), Fault(status=503), Fault(), Fault(length=20_000)]
    brought = bring("s3://loras/team/sql", tmp_path / "to", ALLOW)
    assert brought.files() == folder_files(folder)
    ranges = [
        asked.headers["range"] for asked in server.asked if asked.path.endswith(WEIGHTS) and asked.method == "GET"
    ]
    assert ranges[:4] == ["bytes=0-9999", *["bytes=10000-19999"] * 3]


def test_what_stays_wrong_is_told(server: FaultyServer, tmp_path: Path) -> None:
    """After the last attempt the error names the origin, and no half file is left."""
    server.always[WEIGHTS] = Fault(body_max=100)
    with pytest.raises(Refused, match=r"s3://loras/team/sql could not be fetched.*3 attempts in a row"):
        bring("s3://loras/team/sql", tmp_path / "to", ALLOW)
    assert sorted(folder_files(tmp_path / "to")) == [CONFIG]


def test_missing_files_and_buckets(server: FaultyServer, store: str, tmp_path: Path) -> None:
    """A folder that is not there, and one with a pickle only."""
    with pytest.raises(Invalid, match=f"it has no {CONFIG}") as caught:
        bring("s3://loras/nothing", tmp_path / "a", ALLOW)
    assert caught.value.reason is Reason.ORIGIN_UNREADABLE
    client(store).put_object(Bucket="loras", Key=f"odd/{CONFIG}/file", Body=b"x")
    with pytest.raises(Invalid, match=f"it has no {CONFIG}"):
        bring("s3://loras/odd", tmp_path / "d", ALLOW)
    client(store).put_object(Bucket="loras", Key="old/adapter_config.json", Body=b"{}")
    client(store).put_object(Bucket="loras", Key="old/adapter_model.bin", Body=b"x")
    with pytest.raises(Invalid, match="a pickle"):
        bring("s3://loras/old", tmp_path / "b", ALLOW)
    with pytest.raises(Invalid, match="outside the allowed origins"):
        bring("s3://others/sql", tmp_path / "c", ALLOW)


def test_checksums_of_s3(server: FaultyServer, store: str, folder: Path, tmp_path: Path) -> None:
    """A SHA-256 that the writer sent is preferred; with a key of its own the ETag is no MD5 and is not compared."""
    put_folder(store, "loras", "summed", folder, ChecksumAlgorithm="SHA256")
    put_folder(store, "loras", "keyed", folder, ServerSideEncryption="aws:kms")
    data = (folder / WEIGHTS).read_bytes()
    filesystem = buckets.client_of(buckets.Origin("s3", "loras", "summed"))
    of = {name: buckets._of_s3(filesystem, f"loras/{name}/{WEIGHTS}", {}) for name in ("summed", "keyed", "team/sql")}
    assert of["summed"] == Checksum("sha256", hashlib.sha256(data).hexdigest())
    assert of["keyed"] is None or of["keyed"].algorithm == "crc32"
    plain = of["team/sql"]
    assert plain is not None
    assert _sum(plain, data) == plain.value


def _sum(checksum: Checksum, data: bytes) -> str:
    computed = running(checksum, len(data))
    computed.update(data)
    return computed.hexdigest()


def test_sizes_are_bounded(server: FaultyServer, folder: Path, tmp_path: Path) -> None:
    """The store says how large a file is, and no byte of one that is too large is asked for."""
    with pytest.raises(Invalid, match="are allowed") as caught:
        bring("s3://loras/team/sql", tmp_path / "to", ALLOW, size_bytes_max=1000)
    assert caught.value.reason is Reason.ADAPTER_TOO_LARGE
    assert not [asked for asked in server.asked if asked.path.endswith(WEIGHTS) and asked.method == "GET"]


class ScriptedStore:
    """A client of fsspec's kind over files in memory; `info` is what a store says of each beside its size."""

    def __init__(self, files: dict[str, bytes], **info: Any) -> None:
        self.files = files
        self.extra = info
        self.denied = False

    def invalidate_cache(self) -> None:
        """Nothing is remembered."""

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        if self.denied:
            raise PermissionError("403 for https://me:pw@example.com/x?sig=s3cret")
        if path not in self.files:
            raise FileNotFoundError(path)
        data = self.files[path]
        return {"size": len(data), "name": path} | {key: make(data) for key, make in self.extra.items()}

    def cat_file(self, path: str, start: int, end: int) -> bytes:
        return self.files[path][start:end]


def scripted(folder: Path, prefix: str, monkeypatch: pytest.MonkeyPatch, **info: Any) -> ScriptedStore:
    store = ScriptedStore({f"{prefix}/{name}": data for name, data in folder_files(folder).items()}, **info)
    monkeypatch.setattr(fsspec, "filesystem", lambda scheme, **options: store)
    return store


def git_name(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def md5(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()


SAID = {
    "hf": {"lfs": lambda data: {"sha256": hashlib.sha256(data).hexdigest()} if len(data) > 5000 else None,
           "blob_id": git_name},
    "gs": {"md5Hash": lambda data: base64.b64encode(md5(data)).decode(), "etag": git_name},
    "az": {"content_settings": lambda data: {"content_md5": bytearray(md5(data))}, "etag": git_name},
}  # fmt: skip


def test_a_store_is_known_everywhere() -> None:
    """Its options, its checksum, a case of the test below, an extra, the image's lock, and the cluster's own check."""
    root = Path(__file__).parents[2]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    declared = (root / "deploy/helm/lora-sidecar/crds/loraadapters.yaml").read_text()
    (locked,) = (line for line in (root / "Makefile").read_text().splitlines() if "--extra s3" in line)
    for scheme in BUCKETS:
        assert scheme in buckets._INFO_OPTIONS
        assert scheme in buckets._CHECKSUMS
        assert scheme in {"s3", *SAID}, "S3 has a server"
        assert scheme in extras
        assert f"--extra {scheme} " in locked
        assert scheme in ORIGINS
        assert f"{scheme}://" in declared


@pytest.mark.parametrize("scheme", sorted(SAID))
def test_other_stores(scheme: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one's own checksum is compared: right it passes, wrong it is fetched again and then refused."""
    store = scripted(folder, "acme/sql@main", monkeypatch, **SAID[scheme])
    origin = f"{scheme}://acme/sql@main"
    assert bring(origin, tmp_path / "a", [f"{scheme}://acme/"]).files() == folder_files(folder)
    store.extra = {key: (lambda data, make=make: make(data + b"x" * 5000)) for key, make in store.extra.items()}
    with pytest.raises(Refused, match=r"does not have the (sha256|git|md5) that its origin gives \(3 attempts"):
        bring(origin, tmp_path / "b", [f"{scheme}://acme/"])
    assert WEIGHTS not in folder_files(tmp_path / "b")


def test_a_file_that_changes_under_way(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the store says at the end must be what it said at the beginning; else all of it is fetched again."""
    tags = iter("abcdefgh")
    store = scripted(folder, "acme/sql", monkeypatch, etag=lambda data: next(tags) if len(data) > 5000 else "same")
    with pytest.raises(Refused, match="changed while it was fetched"):
        bring("gs://acme/sql", tmp_path / "a", ["gs://acme/"])
    store.extra = {"etag": lambda data: "same"}
    assert bring("gs://acme/sql", tmp_path / "b", ["gs://acme/"]).files() == folder_files(folder)


def test_denied_and_not_installed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials that do not suffice are named without being shown; a missing extra says how to install it."""
    world = World()
    scripted(folder, "acme/sql", monkeypatch).denied = True
    with pytest.raises(Invalid, match=r"access is denied: 403 for https://example\.com/x; give this process") as caught:
        bring("az://acme/sql", tmp_path / "a", ["az://acme/"], world)
    assert "s3cret" not in caught.value.message
    assert world.waits_s == []
    monkeypatch.undo()
    monkeypatch.setattr(fsspec, "filesystem", _not_installed)
    with pytest.raises(Invalid, match=re.escape(needs_extra("az://", "az"))):
        bring("az://acme/sql", tmp_path / "b", ["az://acme/"])


def _not_installed(scheme: str, **options: Any) -> None:
    raise ImportError("Install adlfs to access Azure Datalake Gen2")
