"""Capturing an incident: what goes in, what is cut out, and what an archive from elsewhere cannot do here."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from sidecar.config import Config, parse
from sidecar.core.events import Received
from sidecar.errors import Misused
from sidecar.incident import capture, parts
from sidecar.incident.capture import Wanted
from sidecar.incident.parts import CUT, is_secret, redacted, redacted_text
from sidecar.journal import replay
from sidecar.journal.segments import segment_paths
from tests.kit.cli_runs import Ended, runner
from tests.kit.corekit import World
from tests.kit.identities import REAL
from tests.kit.journals import write_journal
from tests.unit.test_explain import busy_world

HOUR = timedelta(hours=1)


@pytest.fixture
def sidecar(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    return runner(capfd)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data directory with a journal of some segments."""
    write_journal(busy_world(requests=160), tmp_path / "data" / "journal", segment_bytes=16_384)
    return tmp_path / "data"


def members_of(path: Path) -> dict[str, bytes]:
    """Return an archive's files by their names below its folder."""
    with tarfile.open(path) as incident:
        found = {}
        for member in incident.getmembers():
            content = incident.extractfile(member)
            assert content is not None
            found[member.name.partition("/")[2]] = content.read()
        return found


# What goes in.


def test_a_dead_sidecars_journal_is_captured_and_replays(data: Path, tmp_path: Path) -> None:
    """Without any process the segments go in whole, and the archive replays and explains as the directory does."""
    out = tmp_path / "incident.tgz"
    manifest = capture.capture(Wanted(HOUR, data), out)
    held = members_of(out)
    assert json.loads(held["manifest.json"]) == manifest
    for path in segment_paths(data / "journal"):
        assert held[f"journal/{path.name}"] == path.read_bytes()
    assert [step.line() for step in replay.replay(out)] == [step.line() for step in replay.replay(data)]
    assert oct(out.stat().st_mode & 0o777) == "0o600"
    assert sorted(tmp_path.iterdir()) == [data, out]


def test_the_manifest_tells_what_it_is_of(data: Path, tmp_path: Path) -> None:
    """Times, versions, each segment, and that there are no prompts in it."""
    manifest = capture.capture(Wanted(HOUR, data), tmp_path / "incident.tgz")
    assert manifest["versions"].keys() >= {"lora-sidecar", "python", "platform", "grpcio", "numpy"}
    assert manifest["holds"].startswith("ids, names of adapters, ")
    assert "never prompts" in manifest["holds"]
    without = capture.capture(Wanted(HOUR, data, redact_ids=True), tmp_path / "without.tgz")
    assert without["holds"].startswith("names of adapters, ")
    assert [item["file"] for item in manifest["journal"]] == [
        f"journal/{path.name}" for path in segment_paths(data / "journal")
    ]
    assert datetime.fromisoformat(manifest["covers"]["from"]) <= datetime.fromisoformat(manifest["covers"]["to"])


def test_clients_ids_are_cut_out_on_demand(tmp_path: Path) -> None:
    """From arrivals and from the states that segments begin with; decisions replay, and equal ids stay equal."""
    world = World(seats=1)
    ids = [*REAL, 'a"client_id":"b', "twice", "twice"]
    for client_id in ids:
        world.send(tenant="kept", client_id=client_id)
    world.run()
    directory = tmp_path / "data" / "journal"
    write_journal(world, directory, segment_bytes=8_192)
    assert len(segment_paths(directory)) > 1
    with segment_paths(directory)[-1].open("ab") as last:
        last.write(b'{"at":1,"event":{"!":"Received","client_id":"cut o')
    out = tmp_path / "incident.tgz"
    manifest = capture.capture(Wanted(HOUR, tmp_path / "data", redact_ids=True), out)
    assert "journal: client_id" in manifest["redacted"]
    text = b"".join(members_of(out).values())
    for client_id in (*(one for one in ids if one != "42"), "cut o"):  # there are other numbers of two digits
        assert json.dumps(client_id)[1:-1].encode() not in text
    steps, plain = list(replay.replay(out)), list(replay.replay(directory))
    assert all(step.same for step in steps)
    assert [step.line() for step in steps] == [step.line() for step in plain]
    called = [step.event.client_id for step in steps if isinstance(step.event, Received)]
    assert len({*called}) == len({*ids})
    assert called[-1] == called[-2]
    assert all(one.startswith("redacted-") for one in called)
    again = tmp_path / "again.tgz"
    capture.capture(Wanted(HOUR, tmp_path / "data", redact_ids=True), again)
    assert not {step.event.client_id for step in replay.replay(again) if isinstance(step.event, Received)} & {*called}


def set_times(data: Path, ended: datetime, each: timedelta) -> None:
    """Have a journal's segments begun so long after each other, and the last written to at `ended`."""
    paths = segment_paths(data / "journal")
    for before, path in enumerate(reversed(paths)):
        head, rest = path.read_bytes().split(b"\n", 1)
        header = json.loads(head)
        header["began"] = (ended - each * (before + 1)).isoformat(timespec="milliseconds")
        path.write_bytes(json.dumps(header, separators=(",", ":")).encode() + b"\n" + rest)
        os.utime(path, (ended.timestamp(), ended.timestamp()))


@pytest.mark.parametrize(("minutes", "kept"), [(0, 1), (3, 1), (7, 2), (12, 3)])
def test_only_the_last_while_is_taken(minutes: int, kept: int, data: Path, tmp_path: Path) -> None:
    """Of segments of five minutes those are taken that cover the while before the last write, however long ago."""
    set_times(data, datetime(2020, 1, 1, tzinfo=UTC), timedelta(minutes=5))
    names = [path.name for path in segment_paths(data / "journal")]
    assert len(names) >= 3
    manifest = capture.capture(Wanted(timedelta(minutes=minutes), data), tmp_path / "incident.tgz")
    assert [item["file"].removeprefix("journal/") for item in manifest["journal"]] == names[-kept:]
    assert manifest["covers"]["to"] == "2020-01-01T00:00:00.000Z"


def test_a_journal_that_is_being_written(data: Path, tmp_path: Path) -> None:
    """A last line in the making is captured as it is, and the replay leaves it out."""
    last = segment_paths(data / "journal")[-1]
    steps = len(list(replay.replay(data)))
    with last.open("ab") as file:
        file.write(b'{"at":12345,"event":{"!":"Ti')
    out = tmp_path / "incident.tgz"
    capture.capture(Wanted(HOUR, data), out)
    summary = replay.Summary()
    assert sum(step.same for step in replay.replay(out, summary)) == steps
    assert summary.notes == [f"{last.name}: its last line was cut off and is left out"]


def test_a_segment_that_is_deleted_meanwhile(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments are held open: one that the sidecar rotates away after it was found is captured whole."""
    contents = {path.name: path.read_bytes() for path in segment_paths(data / "journal")}
    find = parts.journal_of

    def find_and_lose(*arguments: object) -> object:
        found = find(*arguments)  # type: ignore[arg-type]
        for path in segment_paths(data / "journal"):
            path.unlink()
        return found

    monkeypatch.setattr(parts, "journal_of", find_and_lose)
    out = tmp_path / "incident.tgz"
    capture.capture(Wanted(HOUR, data), out)
    held = members_of(out)
    assert {name: held[f"journal/{name}"] for name in contents} == contents


def test_progress_reaches_the_end(data: Path, tmp_path: Path) -> None:
    """The callback hears of every byte of the journal."""
    told: list[tuple[int, int]] = []
    capture.capture(Wanted(HOUR, data), tmp_path / "incident.tgz", lambda done, total: told.append((done, total)))
    size_bytes = sum(path.stat().st_size for path in segment_paths(data / "journal"))
    assert told[-1] == (size_bytes, size_bytes)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_an_existing_file_is_left_alone(data: Path, tmp_path: Path) -> None:
    """A capture never writes over another."""
    out = tmp_path / "incident.tgz"
    out.write_text("an older incident")
    with pytest.raises(Misused, match="exists already"):
        capture.capture(Wanted(HOUR, data), out)
    assert out.read_text() == "an older incident"


def test_a_failed_capture_leaves_nothing(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk fails under it no half of a file stays."""

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(capture, "_fill", fail)
    with pytest.raises(OSError, match="No space left"):
        capture.capture(Wanted(HOUR, data), tmp_path / "incident.tgz")
    assert sorted(tmp_path.iterdir()) == [data]


def test_nothing_at_all_is_an_error(tmp_path: Path) -> None:
    """With no journal, no configuration and nobody who answers there is nothing to write, and why is said."""
    with pytest.raises(Misused, match=r"nothing to capture: journal: there is no segment-.* in ") as caught:
        capture.capture(Wanted(HOUR, tmp_path, http=parts.HttpListener("127.0.0.1:1")), tmp_path / "incident.tgz")
    assert "metrics: http://127.0.0.1:1/metrics" in caught.value.message
    assert list(tmp_path.iterdir()) == []


# Redaction.


def secretive(tmp_path: Path) -> Config:
    """Return a configuration with secrets where people put them."""
    engine = {"pretrained_config": {"hidden_size": 64}, "hub_token": "hf_SECRET5", "max_num_tokens": 8192}
    (tmp_path / "engine.json").write_text(json.dumps(engine))
    (tmp_path / "token").write_text("SECRET6")
    return parse(
        {
            "listeners": {"admin": {"token_file": str(tmp_path / "token")}},
            "backends": [
                {
                    "url": "triton://gpu-1:8001",
                    "id": "trt/1",
                    "metrics": "https://user:SECRET2@gpu-1:8002/metrics?key=SECRET3",
                    "engine": {"config": str(tmp_path / "engine.json")},
                },
                {"url": "triton://gpu-2:8001", "engine": {"config": str(tmp_path / "gone.json")}},
                {"url": "triton://gpu-3:8001", "tls": {"key": "-----BEGIN PRIVATE KEY-----SECRET4"}},
            ],
        },
        "the test",
    )


def test_no_secret_is_captured(tmp_path: Path) -> None:
    """Passwords and queries in URLs, tokens and keys are cut from the configuration and the engines' configs."""
    out = tmp_path / "incident.tgz"
    manifest = capture.capture(Wanted(HOUR, config=secretive(tmp_path)), out)
    held = members_of(out)
    assert b"SECRET" not in b"".join(held.values())
    config = yaml.safe_load(held["config.yaml"])
    assert config["backends"][0]["metrics"] == f"https://{CUT}@gpu-1:8002/metrics?{CUT}"
    assert config["listeners"]["admin"]["token_file"] == str(tmp_path / "token")
    assert manifest["redacted"] == ["backends.0.metrics", "backends.2.tls.key"]
    engine = json.loads(held["backends/00-trt_1/engine.json"])
    assert engine == {"pretrained_config": {"hidden_size": 64}, "hub_token": CUT, "max_num_tokens": 8192}


def test_what_could_not_be_had_is_told(tmp_path: Path) -> None:
    """An engine's config that is gone, and one that was never named, stand in the manifest with the reason."""
    manifest = capture.capture(Wanted(HOUR, config=secretive(tmp_path)), tmp_path / "incident.tgz")
    missing = {item["what"]: item["why"] for item in manifest["missing"]}
    assert "gone.json" in missing["backends/01-gpu-2_8001/engine.json"]
    assert missing["engine config of gpu-3:8001"] == "backends[].engine.config names no file"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("https://u:p@host/a", f"https://{CUT}@host/a"),
        ("https://u:p@ss/w@host/a", f"https://{CUT}@host/a"),
        ("https://host/a?sig=x#y", f"https://host/a?{CUT}"),
        ("cannot read https://u:p@host/a?b=c now", f"cannot read https://{CUT}@host/a?{CUT} now"),
        ("hf://owner/name@main/folder", "hf://owner/name@main/folder"),
        ("triton://gpu-1:8001", "triton://gpu-1:8001"),
        ("a@b.c", "a@b.c"),
        ("-----BEGIN KEY-----", CUT),
    ],
)
def test_urls_in_a_text(text: str, kept: str) -> None:
    """User names and queries go, hosts and paths stay; a revision of a repository is no user name."""
    assert redacted_text(text) == kept


@pytest.mark.parametrize("key", ["password", "hub_token", "hubToken", "API_KEY", "client_secret", "Authorization"])
def test_keys_that_name_a_secret(key: str) -> None:
    """Whatever stands under such a key is cut, in lists and sections too."""
    assert is_secret(key)
    assert redacted({key: {"a": ["b", 1]}}) == ({key: {"a": [CUT, 1]}}, [f"{key}.a.0"])


@pytest.mark.parametrize("key", ["token_file", "max_num_tokens", "tokens_per_block", "key", "keys", "memory_bytes", ""])
def test_keys_that_name_none(key: str) -> None:
    """Files of secrets and counts of tokens are kept."""
    assert redacted({key: "value"}) == ({key: "value"}, [])


# The command.


def test_the_command_says_what_it_wrote(data: Path, tmp_path: Path, sidecar: Callable[..., Ended]) -> None:
    """One line about the file, and one for each thing left out; exit code 0."""
    out = tmp_path / "incident.tgz"
    ended = sidecar("debug", "capture", "--data-directory", str(data), "-o", str(out), "--http", "127.0.0.1:1")
    assert ended.code == 0
    assert ended.out.startswith(f"{out}: ")
    assert "never prompts" in ended.out
    assert "left out: metrics: http://127.0.0.1:1/metrics: " in ended.err
    assert sidecar("replay", str(out)).code == 0


def test_the_commands_json_is_the_manifest(data: Path, tmp_path: Path, sidecar: Callable[..., Ended]) -> None:
    """--json prints the manifest and the path; the configuration file leads to the data directory."""
    config, out = tmp_path / "config.yaml", tmp_path / "incident.tgz"
    config.write_text(f"data_directory: {data}\nlisteners: {{http: {{address: '127.0.0.1:1'}}}}\n")
    printed = sidecar("debug", "capture", "--config", str(config), "-o", str(out), "--last", "1h30m", "--json").json()
    assert printed["path"] == str(out)
    assert printed["asked_for_s"] == 5400
    assert len(printed["journal"]) == len(segment_paths(data / "journal"))
    assert [item["what"] for item in printed["missing"]] == ["metrics"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("backends: [{url: 'ftp://me:hunter2@x'}]", "it is wrong at backends.0.url"),
        ("backends: [{url: 'vllm://a:1', model: m, password: hunter2}]", "it is wrong at backends.0"),
        ("backends: [{kind: triton, url: 'triton://a:1', api_key: hunter2}]", "it is wrong at backends.0.api_key"),
        ("backends: [{discover: {dns: x}, password: hunter2}]", "it is wrong at backends.0"),
        ("store: {memory_bytes: hunter2, wrong: hunter2}", "it is wrong at store.memory_bytes, store.wrong"),
        ("queue: hunter2", "it is wrong at queue"),
        ("password: [hunter2", "it is refused"),
    ],
)
def test_a_broken_configuration_does_not_stop_it(
    text: str, told: str, data: Path, tmp_path: Path, sidecar: Callable[..., Ended]
) -> None:
    """A configuration that is wrong may be what the incident is about: its keys are told, and none of its values."""
    config, out = tmp_path / "config.yaml", tmp_path / "incident.tgz"
    config.write_text(text)
    ended = sidecar("debug", "capture", "--config", str(config), "--data-directory", str(data), "-o", str(out))
    assert ended.code == 0
    assert f"left out: config: {told}" in ended.err
    assert "hunter2" not in ended.out + ended.err
    assert b"hunter2" not in b"".join(members_of(out).values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name the sidecar's configuration with --config"),
        (("--last", "soon", "--data-directory", "."), 'and "soon" is none'),
        (("--last", "10m5", "--data-directory", "."), 'and "10m5" is none'),
        (("--data-directory", "/nowhere"), "there is no data directory /nowhere"),
        (("--config", "/nowhere.yaml"), "/nowhere.yaml"),
    ],
)
def test_a_misused_command_says_how_it_is_used(
    arguments: tuple[str, ...], message: str, sidecar: Callable[..., Ended]
) -> None:
    """Exit code 2, and what to give."""
    ended = sidecar("debug", "capture", *arguments)
    assert ended.code == 2
    assert message in ended.err
