"""Downloads from web servers that go wrong: they end whole, or with a clear error and nothing left behind."""

from __future__ import annotations

import base64
import hashlib
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sidecar.adapters.origins.download import download
from sidecar.adapters.origins.failures import Stopped
from sidecar.adapters.origins.limits import Errand
from sidecar.adapters.origins.origin import parse_origin
from sidecar.adapters.origins.remote import Body, Resume
from sidecar.errors import Invalid, Reason, Refused, SidecarError
from tests.kit.faulty_http import Fault, FaultyServer, faulty_server
from tests.kit.origins import LIMITS, World, bring, folder_files, write_shards
from tests.kit.peft_files import ALL_LINEAR, write_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "source" / "sql", modules=ALL_LINEAR)


@pytest.fixture
def server(folder: Path) -> Iterator[FaultyServer]:
    with faulty_server() as running:
        running.serve("sql", folder)
        yield running


def refused(server: FaultyServer, directory: Path, **options: object) -> SidecarError:
    """Return the error that a download ends with, having checked that no half file is left."""
    with pytest.raises(SidecarError) as caught:
        bring(server.url("sql"), directory, [server.url("")], **options)  # type: ignore[arg-type]
    assert WEIGHTS not in folder_files(directory)
    assert not list(directory.glob("*.part"))
    return caught.value


def test_a_sound_server(server: FaultyServer, folder: Path, tmp_path: Path) -> None:
    """The files arrive as they are, one request each, and progress ends at their sum; a probe.jsonl may be missing."""
    brought = bring(server.url("sql/"), tmp_path / "to", [server.url("")])
    assert brought.files() == folder_files(folder)
    assert [asked.path for asked in server.asked] == [f"/sql/{CONFIG}", f"/sql/{WEIGHTS}", "/sql/probe.jsonl"]
    assert brought.size_bytes == brought.progress[-1] == sum(map(len, folder_files(folder).values()))
    assert brought.totals[-1] == brought.size_bytes
    assert brought.world.waits_s == []


def test_shards(server: FaultyServer, folder: Path, tmp_path: Path) -> None:
    """Without a whole weights file the index is asked for, and what it names."""
    write_shards(folder)
    server.files.clear()
    server.serve("sql", folder)
    assert bring(server.url("sql"), tmp_path / "to", [server.url("")]).files() == folder_files(folder)
    server.files = {path: data for path, data in server.files.items() if "00002-of" not in path}
    assert "adapter_model-00002-of-00002.safetensors, which is not there" in refused(server, tmp_path / "again").message


def test_cut_connections_are_gone_on_with(server: FaultyServer, folder: Path, tmp_path: Path) -> None:
    """Each attempt asks for what is missing, of the same file, and waits longer only when it brings nothing."""
    server.faults[WEIGHTS] = [Fault(body_max=1000), Fault(body_max=500), Fault(body_max=0), Fault(body_max=0)]
    brought = bring(server.url("sql"), tmp_path / "to", [server.url("")], attempts_max=4)
    assert brought.files() == folder_files(folder)
    asked = [(a.headers.get("range"), "if-range" in a.headers) for a in server.asked[1:-1]]
    assert asked == [(None, False), ("bytes=1000-", True), *[("bytes=1500-", True)] * 3]
    assert brought.world.waits_s == [0.5, 0.5, 1.0, 2.0]


@pytest.mark.parametrize("without", ["ranges", "validators"])
def test_a_server_that_cannot_go_on_is_asked_anew(
    without: str, server: FaultyServer, folder: Path, tmp_path: Path
) -> None:
    """Without ranges, or a tag that proves it is the same file, what came is thrown away; progress goes back."""
    setattr(server, without, False)
    server.faults[WEIGHTS] = [Fault(body_max=1000)]
    brought = bring(server.url("sql"), tmp_path / "to", [server.url("")])
    assert brought.files() == folder_files(folder)
    assert brought.progress[-1] == brought.size_bytes


def test_a_file_that_changes_under_way_is_never_a_mixture(server: FaultyServer, folder: Path, tmp_path: Path) -> None:
    """The second attempt's tag does not fit, so the server sends the new file, from its beginning: a shorter one."""
    path, changed = f"/sql/{WEIGHTS}", b"y" * 500

    def change() -> None:
        server.files[path] = changed
        server.headers["x-amz-checksum-sha256"] = base64.b64encode(hashlib.sha256(changed).digest()).decode()

    server.faults[WEIGHTS] = [Fault(body_max=1000)]
    brought = bring(server.url("sql"), tmp_path / "to", [server.url("")], WorldThatActs(change))
    assert brought.files()[WEIGHTS] == changed
    assert brought.progress[-1] == brought.size_bytes


def test_bytes_that_changed_on_the_way_are_fetched_again(server: FaultyServer, folder: Path, tmp_path: Path) -> None:
    """A body with the right length and the wrong checksum is thrown away, all of it."""
    server.always[WEIGHTS] = Fault(headers=(("x-amz-checksum-sha256", _sha256(folder / WEIGHTS)),))
    server.faults[WEIGHTS] = [Fault(headers=server.always[WEIGHTS].headers, garbled=True)]
    assert bring(server.url("sql"), tmp_path / "to", [server.url("")]).files() == folder_files(folder)
    assert [asked.headers.get("range") for asked in server.asked[1:-1]] == [None, None]


def _sha256(path: Path) -> str:
    return base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()


class ShortRemote:
    """A store whose bodies end early without an error."""

    @contextmanager
    def open(self, file_name: str, resume: Resume | None, attempt: int) -> Iterator[Body]:
        yield Body(resume.offset if resume else 0, 10, "tag", None, iter([b"abc"]))

    def close(self) -> None:
        """Nothing is open."""


def test_a_body_that_ends_early_is_gone_on_with(tmp_path: Path) -> None:
    """What counts is the size that the store gave; more than that is refused."""
    errand = Errand(parse_origin("s3://a/b"), LIMITS, World().surroundings(), lambda done, total: None)
    with pytest.raises(Invalid, match="12 bytes or more and 10 are allowed"):
        download(ShortRemote(), "file", tmp_path, 100, errand)
    assert folder_files(tmp_path) == {}


class WorldThatActs(World):
    """Does something whenever a download waits."""

    def __init__(self, act: object) -> None:
        super().__init__()
        self._act = act

    def _wait(self, seconds: float) -> None:
        super()._wait(seconds)
        self._act()  # type: ignore[operator]


def test_busy_servers_are_tried_again(server: FaultyServer, folder: Path, tmp_path: Path) -> None:
    """5xx and 429 pass; what the server asks for is waited for, within bounds."""
    later = (("retry-after", "7"),)
    server.faults[CONFIG] = [Fault(status=503), Fault(status=429, headers=later)]
    server.faults[WEIGHTS] = [Fault(status=500, headers=(("retry-after", "3600"),))]
    brought = bring(server.url("sql"), tmp_path / "to", [server.url("")])
    assert brought.files() == folder_files(folder)
    assert brought.world.waits_s == [0.5, 7.0, 15.0]


@pytest.mark.parametrize(
    ("fault", "reason", "words"),
    [
        (Fault(status=503), Reason.ADAPTER_UNAVAILABLE, "the server answers 503 (3 attempts in a row)"),
        (Fault(body_max=0), Reason.ADAPTER_UNAVAILABLE, "3 attempts in a row"),
        (Fault(length=10**9), Reason.ADAPTER_UNAVAILABLE, "3 attempts in a row"),
        (Fault(length=1 << 40), Reason.ADAPTER_TOO_LARGE, "origins.size_bytes_max"),
        (Fault(status=403), Reason.ORIGIN_UNREADABLE, "credentials"),
        (Fault(status=418), Reason.ORIGIN_UNREADABLE, "the server answers 418"),
        (Fault(status=404), Reason.ORIGIN_UNREADABLE, f"it has no {WEIGHTS}"),
        (Fault(headers=(("content-encoding", "gzip"),)), Reason.ORIGIN_UNREADABLE, "compressed"),
        (Fault(status=206), Reason.ADAPTER_UNAVAILABLE, "another part"),
        (
            Fault(status=206, headers=(("content-range", f"bytes 0-{'9' * 5000}/1"),)),
            Reason.ADAPTER_UNAVAILABLE,
            "another",
        ),
        (Fault(status=503, headers=(("retry-after", "²"),)), Reason.ADAPTER_UNAVAILABLE, "answers 503"),
        (Fault(body_max=10, headers=(("etag", '"\xe9"'),)), Reason.ADAPTER_UNAVAILABLE, "3 attempts in a row"),
        (Fault(headers=(("x-amz-checksum-crc32", "AAAAAA=="),)), Reason.ADAPTER_UNAVAILABLE, "does not have the crc32"),
    ],
)
def test_what_stays_wrong_is_told(
    fault: Fault, reason: Reason, words: str, server: FaultyServer, tmp_path: Path
) -> None:
    """The message names the origin and the reason; what may pass is Refused and can be tried again."""
    server.always[WEIGHTS] = fault
    error = refused(server, tmp_path / "to")
    assert error.reason is reason
    assert words in error.message
    assert server.url("sql") in error.message or reason is Reason.ADAPTER_TOO_LARGE


def test_a_length_that_is_too_short_ends_the_file(server: FaultyServer, tmp_path: Path) -> None:
    """What HTTP calls the end of the file is the end; that it is cut short is for the reader of the file to say."""
    server.always[WEIGHTS] = Fault(length=100)
    assert len(bring(server.url("sql"), tmp_path / "to", [server.url("")]).files()[WEIGHTS]) == 100


def test_sizes_are_bounded_before_and_while_downloading(server: FaultyServer, folder: Path, tmp_path: Path) -> None:
    """A claim above the limit is refused unread; a body without a size is cut off at the limit; shards add up."""
    size_bytes = (folder / WEIGHTS).stat().st_size
    assert "are allowed" in refused(server, tmp_path / "a", size_bytes_max=size_bytes - 1).message
    assert "are allowed" in refused(server, tmp_path / "b", config_bytes_max=10).message
    write_shards(folder)
    server.files.clear()
    server.serve("sql", folder)
    error = refused(server, tmp_path / "c", size_bytes_max=size_bytes // 2 + 400)
    assert error.reason is Reason.ADAPTER_TOO_LARGE
    assert "00002-of-00002" in error.message


def test_only_weights_that_run_code_are_left(server: FaultyServer, tmp_path: Path) -> None:
    """A folder with a pickle is told apart from an empty one."""
    del server.files[f"/sql/{WEIGHTS}"]
    assert f"it has no {WEIGHTS}" in refused(server, tmp_path / "a").message
    server.files["/sql/adapter_model.bin"] = b"x"
    assert "a pickle" in refused(server, tmp_path / "b").message
    assert f"it has no {CONFIG}" in _refused_at(server, "elsewhere", tmp_path / "c")


def _refused_at(server: FaultyServer, folder: str, directory: Path) -> str:
    with pytest.raises(Invalid) as caught:
        bring(server.url(folder), directory, [server.url("")])
    return caught.value.message


def test_a_silent_server_is_given_up(server: FaultyServer, tmp_path: Path) -> None:
    """A read that takes too long is an attempt that failed."""
    server.always[WEIGHTS] = Fault(stall=True)
    error = refused(server, tmp_path / "to", timeout_s=0.05, attempts_max=2)
    assert error.reason is Reason.ADAPTER_UNAVAILABLE
    assert "silent for too long (2 attempts" in error.message


def test_a_download_has_an_end(server: FaultyServer, tmp_path: Path) -> None:
    """A server that brings a little with each attempt is not waited for for ever."""
    server.ranges = True
    server.faults[WEIGHTS] = [Fault(body_max=1)] * 100
    assert "took longer than 3 s" in refused(server, tmp_path / "to", duration_s_max=3.0).message


def test_nobody_waits_any_more(server: FaultyServer, tmp_path: Path) -> None:
    """What progress raises ends the download, and leaves no file."""
    stop = threading.Event()
    server.faults[WEIGHTS] = [Fault(body_max=1000)]
    world = WorldThatActs(stop.set)

    def wait(seconds: float) -> None:
        raise Stopped

    world._wait = wait  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        bring(server.url("sql"), tmp_path / "to", [server.url("")], world)
    assert sorted(folder_files(tmp_path / "to")) == [CONFIG]


# Where a connection may go.


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("http://169.254.169.254/latest/meta-data/", "169.254.169.254, which is not public"),
        ("http://10.0.0.1/x", "10.0.0.1, which is not public"),
        ("http://[::1]/x", "::1, which is not public"),
        ("http://inside.example/x", "10.9.8.7, which is not public"),
        ("file:///etc/passwd", "redirects to file://"),
        ("ftp://example.com/x", "redirects to ftp://"),
        ("https://elsewhere.example/x", "is where the origin redirects to, and outside the allowed origins"),
        ("http://me:pw@example.com/x", "user name"),
        ("http://example.com/a/../../x", "allowed"),
        ("//169.254.169.254/x", "not public"),
        ("http://exam ple/", "no host to connect to"),
    ],
)
def test_redirects_are_checked_again(location: str, words: str, server: FaultyServer, tmp_path: Path) -> None:
    """A hop must be allowed and public as if it had been asked for; the first host alone may be local."""
    world = World({"169.254.169.254": ["169.254.169.254"], "10.0.0.1": ["10.0.0.1"], "::1": ["::1"],
                   "inside.example": ["8.8.8.8", "10.9.8.7"]})  # fmt: skip
    server.always[CONFIG] = Fault(status=302, location=location)
    allow = [server.url(""), "http://"]
    if words == "allowed":
        allow, words = [server.url("")], "outside the allowed origins"
    with pytest.raises(Invalid) as caught:
        bring(server.url("sql"), tmp_path / "to", allow, world)
    assert words in caught.value.message
    assert "pw" not in caught.value.message
    assert len(server.asked) == 1
    assert not folder_files(tmp_path / "to")


def test_redirects_that_are_allowed_are_followed(server: FaultyServer, folder: Path, tmp_path: Path) -> None:
    """Relative ones too; each attempt begins at the first hop, whose target may be signed for a while only."""
    server.files[f"/moved/{WEIGHTS}"] = server.files[f"/sql/{WEIGHTS}"]
    server.always[f"sql/{WEIGHTS}"] = Fault(status=307, location=f"/moved/{WEIGHTS}?sig=1")
    server.faults[f"moved/{WEIGHTS}"] = [Fault(body_max=10)]
    assert bring(server.url("sql"), tmp_path / "to", [server.url("")]).files() == folder_files(folder)
    paths = [asked.path.split("/")[1] for asked in server.asked[1:-1]]
    assert paths == ["sql", "moved", "sql", "moved"]
    assert server.asked[-2].query == "sig=1"
    server.always[f"sql/{WEIGHTS}"] = Fault(status=302, location=f"/sql/{WEIGHTS}")
    assert "redirects more than 5 times" in refused(server, tmp_path / "again").message


def test_a_private_host_must_be_named(server: FaultyServer, tmp_path: Path) -> None:
    """A scheme alone allows every public host; this machine is none."""
    with pytest.raises(
        Invalid, match=r"127\.0\.0\.1, which is not public; if it is meant to be reached, name the host"
    ):
        bring(server.url("sql"), tmp_path / "to", ["http://"])
    assert server.asked == []


def test_the_address_that_was_checked_is_connected_to(
    server: FaultyServer, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The host goes into the request, the query with it but into no log, and its name is resolved once a request."""
    caplog.set_level("DEBUG")
    world, port = World(), server.address.rpartition(":")[2]
    origin = f"http://models.example:{port}/sql?token=s3cret"
    brought = bring(origin, tmp_path / "to", [f"http://models.example:{port}/sql"], world)
    assert brought.files() == folder_files(folder)
    assert [asked.headers["host"] for asked in server.asked] == [f"models.example:{port}"] * 3
    assert [asked.query for asked in server.asked] == ["token=s3cret"] * 3
    assert world.resolved == ["models.example"] * 3
    assert "s3cret" not in caplog.text


def test_another_address_is_tried(server: FaultyServer, folder: Path, tmp_path: Path) -> None:
    """A host with several addresses, of which one does not answer, is reached at the other."""
    world, port = World({"models.example": ["127.255.255.254", "127.0.0.1"]}), server.address.rpartition(":")[2]
    brought = bring(f"http://models.example:{port}/sql", tmp_path / "to", [f"http://models.example:{port}/"], world)
    assert brought.files() == folder_files(folder)
    assert len(world.waits_s) == 3


def test_credentials_come_from_netrc_and_stay_with_their_host(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first host is sent its password, the one that it redirects to is not."""
    port = server.address.rpartition(":")[2]
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine models.example login me password s3cret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    server.faults[WEIGHTS] = [Fault(status=302, location=f"http://other.example:{port}/sql/{WEIGHTS}")]
    allow = [f"http://{host}.example:{port}/" for host in ("models", "other")]
    bring(f"http://models.example:{port}/sql", tmp_path / "to", allow)
    sent = [(asked.headers["host"].split(".")[0], "authorization" in asked.headers) for asked in server.asked]
    assert sent == [("models", True), ("models", True), ("other", False), ("models", True)]


def test_certificates_are_of_the_host_not_of_its_address(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TLS is spoken under the host's name; under another name the same server is not believed."""
    pem, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-subj", "/CN=models.example", "-addext", "subjectAltName=DNS:models.example", "-days", "2",
         "-keyout", key, "-out", pem], check=True, capture_output=True,
    )  # fmt: skip
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(pem, key)
    with faulty_server(tls=tls) as server:
        server.serve("sql", folder)
        port = server.address.rpartition(":")[2]
        good, bad = (f"https://{host}.example:{port}/sql" for host in ("models", "other"))
        assert bring(good, tmp_path / "a", [good]).files() == folder_files(folder)
        with pytest.raises(Refused, match="certificate"):
            bring(bad, tmp_path / "b", [bad])


FULL = """
import resource, sys
from pathlib import Path
from tests.kit.origins import bring
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    bring(sys.argv[1], Path(sys.argv[2]), [sys.argv[1]])
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_disk_that_takes_no_more(server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused for want of room, before or while it comes, and nothing is left."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    command = [sys.executable, "-c", FULL, server.url("sql"), str(tmp_path / "to")]
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    assert said.startswith(f"Refused no room for {WEIGHTS}")
    assert sorted(folder_files(tmp_path / "to")) == [CONFIG]
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 2000}))
    assert "2000 are free" in refused(server, tmp_path / "again").message
