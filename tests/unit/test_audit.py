"""The audit: each change and denial is a line, whatever callers write, and however the disk fails."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest

from sidecar.access import audit_log
from sidecar.access.audit import CALLERS_MAX, Audit
from sidecar.access.audit_log import RotatingFile, denials_file, rotated_files
from sidecar.access.principal import SYSTEM, Action, Principal, Proof, Resource, Sort
from sidecar.config import access as config
from sidecar.fronts.callers import peer_at, peer_of_grpc

ROOT = Path(__file__).parents[2]
ANN = Principal("acme", Proof.KEY, "key-7", ("ml",))
SQL = Resource(Sort.ADAPTER, "sql")
NOON = datetime(2026, 11, 28, 12, tzinfo=UTC).timestamp()


class Clock:
    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


@contextmanager
def audit_in(folder: Path, clock: Clock | None = None, **settings: Any) -> Iterator[Audit]:
    """Yield an audit that writes into a folder, with a clock of its own if one is given."""
    audit = Audit.configured(config.Audit(**settings), folder)
    if clock is not None:
        audit._clock = clock
    audit.start()
    try:
        yield audit
    finally:
        audit.stop()


def changes_file(folder: Path) -> Path:
    return folder / "audit" / "audit.jsonl"


def lines_in(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a file and in those that it was before, the oldest first."""
    texts = [file.read_text() for file in (*rotated_files(path), path) if file.exists()]
    return [json.loads(line) for text in texts for line in text.splitlines()]


def change(audit: Audit, name: str = "sql", **more: Any) -> bool:
    return asyncio.run(
        audit.changed(ANN, "10.0.0.9:4711", Action.PROMOTE, Resource(Sort.ADAPTER, name), {}, {}, "r-1", **more)
    )


def deny(audit: Audit, principal: Principal | None = None, peer: str = "10.0.0.9:1", name: str = "sql") -> None:
    audit.denied(principal, peer, Proof.KEY, Action.INFER, Resource(Sort.ADAPTER, name), "unknown key", "r-2")


# What a line says.


async def test_a_change_is_written_before_it_returns(tmp_path: Path) -> None:
    """The line names who, how proven, from where, what, before, after, the result and the request."""
    clock = Clock()
    with audit_in(tmp_path, clock) as audit:
        before, after = {"current": "v1"}, {"current": "v2", "canary": None, "allow": ("acme",)}
        said = (ANN, "10.0.0.9:4711", Action.PROMOTE, SQL, before, after, "r-1")
        assert await audit.changed(*said, verb="Adapters.Promote")
        assert lines_in(changes_file(tmp_path)) == [
            {
                "format": 1,
                "time": "2026-11-28T12:00:00.000Z",
                "kind": "change",
                "who": {"tenant": "acme", "subject": "key-7", "groups": ["ml"]},
                "proof": "key",
                "peer": "10.0.0.9:4711",
                "action": "promote",
                "resource": {"sort": "adapter", "name": "sql"},
                "verb": "Adapters.Promote",
                "before": {"current": "v1"},
                "after": {"current": "v2", "canary": None, "allow": ["acme"]},
                "result": "ok",
                "why": "",
                "request_id": "r-1",
            }
        ]
        assert await audit.changed(*said, why="sql has no version v2")
    failed = lines_in(changes_file(tmp_path))[-1]
    assert (failed["result"], failed["why"]) == ("failed", "sql has no version v2")
    assert changes_file(tmp_path).stat().st_mode & 0o777 == 0o600


def test_repeated_denials_become_one_line_a_minute(tmp_path: Path) -> None:
    """The first is written at once; those that follow are counted; a pause ends the counting."""
    clock = Clock()
    with audit_in(tmp_path, clock, aggregate_s=60) as audit:
        deny(audit)
        assert audit.log.flush()
        [first] = lines_in(denials_file(changes_file(tmp_path)))
        assert (first["result"], first["why"], first["who"]["tenant"]) == ("denied", "unknown key", "")
        assert "count" not in first
        for port in range(500):
            deny(audit, peer=f"10.0.0.9:{port}")  # each connection has another port
        clock.now += 59
        audit.tell_repeated()
        assert audit.log.flush()
        assert len(lines_in(denials_file(changes_file(tmp_path)))) == 1
        clock.now += 1
        audit.tell_repeated()
        assert audit.log.flush()
        told = lines_in(denials_file(changes_file(tmp_path)))[1:]
        assert [(line["count"], line["since"], line["time"]) for line in told] == [
            (500, "2026-11-28T12:00:00.000Z", "2026-11-28T12:01:00.000Z")
        ]
        clock.now += 60
        audit.tell_repeated()
        deny(audit)
        assert audit.log.flush()
        assert len(lines_in(denials_file(changes_file(tmp_path)))) == 3
        deny(audit)
    assert lines_in(denials_file(changes_file(tmp_path)))[-1]["count"] == 1  # the end writes what is counted


def test_the_line_of_repetitions_has_their_first_ids(tmp_path: Path) -> None:
    """Each client was told to ask by the id of its own call."""
    with audit_in(tmp_path, Clock(), aggregate_s=60) as audit:
        for number in range(300):
            audit.denied(Principal("acme"), "", Proof.KEY, Action.INFER, SQL, "no policy permits it", f"id-{number}")
    first, more = lines_in(denials_file(changes_file(tmp_path)))
    assert (first["request_id"], more["count"]) == ("id-0", 299)
    assert more["request_ids"] == [f"id-{number}" for number in range(1, 101)]


def test_another_verb_is_another_denial(tmp_path: Path) -> None:
    """Verbs with one action, resource and reason: the first denial of each is a line with its own id."""
    with audit_in(tmp_path, Clock()) as audit:
        for verb in ("Access.ListKeys", "Access.ReadAudit"):
            audit.denied(ANN, "p", Proof.KEY, Action.MANAGE, SYSTEM, "no policy permits it", verb, verb=verb)
    lines = lines_in(denials_file(changes_file(tmp_path)))
    assert [(line["verb"], line["request_id"], line.get("count", 1)) for line in lines] == [
        ("Access.ListKeys", "Access.ListKeys", 1), ("Access.ReadAudit", "Access.ReadAudit", 1),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["eyJhbGciOiJSUzI1NiJ9.eyJzdWIi.c2ln", "lsk_3fdca2eb99c0_" + "a" * 64])
def test_a_credential_where_a_name_belongs_is_hidden(tmp_path: Path, name: str) -> None:
    with audit_in(tmp_path) as audit:
        deny(audit, name=f"open1@{name}")
    assert name not in denials_file(changes_file(tmp_path)).read_text()
    assert "hidden)" in denials_file(changes_file(tmp_path)).read_text()


def test_what_is_observed_is_told_apart(tmp_path: Path) -> None:
    """A call that only would be denied says so, with who it is."""
    with audit_in(tmp_path) as audit:
        audit.denied(ANN, "p", Proof.KEY, Action.INFER, SQL, "acme may not infer sql", "r", observed=True)
        audit.denied(ANN, "p", Proof.KEY, Action.INFER, SQL, "acme may not infer sql", "r")
    lines = lines_in(denials_file(changes_file(tmp_path)))
    assert [line["result"] for line in lines] == ["observed", "denied"]
    assert lines[0]["who"] == {"tenant": "acme", "subject": "key-7", "groups": ["ml"]}


def test_a_cause_with_another_number_each_time_is_one_cause(tmp_path: Path) -> None:
    """As a budget's refusals have them: 5,000 of them are two lines, of which the first has its numbers."""
    with audit_in(tmp_path, Clock()) as audit:
        for taken in range(5_000):
            why = f"acme may use 20,000 tokens a minute and has used {20_000 + taken:,}; try again in {taken / 7:.1f} s"
            audit.denied(ANN, "p", Proof.KEY, Action.INFER, SQL, why)
    lines = lines_in(denials_file(changes_file(tmp_path)))
    assert [line.get("count", 1) for line in lines] == [1, 4_999]
    assert "has used 20,000; try again in 0.0 s" in lines[0]["why"]


@pytest.mark.parametrize(
    ("peers", "callers"),
    [
        (("10.0.0.1:1", "10.0.0.1:2", "10.0.0.2:1"), 2),
        (("[2001:db8::1]:1", "[2001:db8::1]:2", "[2001:db8::2]:1", "[::1]:7"), 3),
        (("unix", "unix", ""), 2),
    ],
)
def test_callers_without_a_name_are_told_apart_by_their_machine(
    peers: tuple[str, ...], callers: int, tmp_path: Path
) -> None:
    """Each connection has another port."""
    with audit_in(tmp_path, Clock()) as audit:
        for peer in peers:
            deny(audit, peer=peer)
        assert len(audit._repeated) == callers


@pytest.mark.parametrize(
    ("peer", "told"),
    [
        ("ipv4:10.0.0.1:56", "10.0.0.1:56"),
        ("ipv6:%5B2001:db8::1%5D:56", "[2001:db8::1]:56"),
        ("ipv6:[::1]:56", "[::1]:56"),
        ("ipv6:%5Bfe80::1%25eth0%5D:56", "[fe80::1%eth0]:56"),
        ("unix:", "unix"),
        ("unix:/run/sidecar.sock", "unix"),
    ],
)
def test_a_peer_has_one_form_whichever_listener_it_calls(peer: str, told: str) -> None:
    assert peer_of_grpc(peer) == told
    host, _, port = told.rpartition(":")
    if port.isdecimal():  # as the listener for HTTP gets it
        assert peer_at(host.strip("[]"), int(port)) == told
    assert peer_at("::ffff:10.0.0.1", 56) == "10.0.0.1:56"


async def test_a_number_that_json_has_not_is_null(tmp_path: Path) -> None:
    with audit_in(tmp_path) as audit:
        await audit.changed(ANN, "", Action.PAUSE, SQL, {}, {"paused_s": inf, "share": nan, "held_s": 1.23456}, "")
    [line] = lines_in(changes_file(tmp_path))
    assert line["after"] == {"paused_s": None, "share": None, "held_s": 1.235}


# Attackers.


def test_ten_thousand_attackers_are_counted_and_push_no_change_out(tmp_path: Path) -> None:
    """Memory and files stay bounded, no denial goes uncounted, and the change before the flood is still there."""
    with audit_in(tmp_path, Clock(), file_bytes_max=200_000, files_max=3) as audit:
        assert change(audit)
        for attacker in range(CALLERS_MAX + 2_000):
            deny(audit, peer=f"10.{attacker >> 16}.{attacker >> 8 & 255}.{attacker & 255}:9")
            if attacker % 1_000 == 0:
                assert audit.log.flush()
        assert len(audit._repeated) <= CALLERS_MAX + 1
    path = denials_file(changes_file(tmp_path))
    files = [*rotated_files(path), path]
    assert len(files) == 3
    assert sum(file.stat().st_size for file in files) < 3 * (200_000 + audit_log.BATCH_BYTES)
    more = lines_in(path)[-1]
    assert (more["peer"], more["count"]) == ("(more)", 1_999)  # all but the first of those without an entry
    assert audit.log.lost == {"change": 0, "denial": 0}
    assert len(lines_in(changes_file(tmp_path))) == 1


def test_nobody_hides_behind_another_s_thousands(tmp_path: Path) -> None:
    """One caller who tries 20,000 names takes a bounded part of the table; a second caller's denial has its line."""
    with audit_in(tmp_path, Clock()) as audit:
        for number in range(20_000):
            deny(audit, ANN, name=f"guess{number}")
        deny(audit, Principal("other", Proof.TOKEN, "bob"), name="payroll")
    lines = lines_in(denials_file(changes_file(tmp_path)))
    assert [line["resource"]["name"] for line in lines if line["who"]["tenant"] == "other"] == ["payroll"]
    acme = [line for line in lines if line["who"]["tenant"] == "acme"]
    assert len(acme) < 150
    assert sum(line.get("count", 1) for line in acme) == 20_000


INJECTED = (
    'x"}\n{"kind":"change","who":{"tenant":"boss"}}\n',
    "\x1b[2J\x1b[31mall good\x1b[0m",
    "abc\u202egpj.exe",
    "line\u2028separator\u0085next",
    "\ud800 alone",
    "nul\x00bell\x07",
    "y" * 1_000_000,
)


def test_no_text_of_a_caller_forges_a_line(tmp_path: Path) -> None:
    """Line breaks, escapes, reversed text, lone surrogates and a megabyte leave one printable line of modest size."""
    with audit_in(tmp_path) as audit:
        for text in INJECTED:
            who = Principal(text, Proof.TOKEN, text, (text,))
            about = Resource(Sort.ADAPTER, text)
            fields = {text: text, "deep": {"deeper": {"deepest": {"end": [text] * 99}}}}
            changed = audit.changed(who, text, Action.SHOW, about, fields, fields, text, verb="V", why=text)
            assert asyncio.run(changed)
            audit.denied(who, text, Proof.TOKEN, Action.INFER, about, text, text)
    for path in (changes_file(tmp_path), denials_file(changes_file(tmp_path))):
        raw = path.read_bytes().splitlines()
        assert len(raw) == len(INJECTED)
        assert all(len(line) < 16_000 for line in raw)
        for line in raw:
            text = "".join(_texts(json.loads(line)))
            assert text.isprintable()
            assert "boss" not in json.loads(line)["who"]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from (key, *_texts(item))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    else:
        yield str(value)


# Files.


@pytest.mark.parametrize("each", [120, pytest.param(500, marks=pytest.mark.slow)])
def test_files_rotate_while_they_are_written_and_read(tmp_path: Path, each: int) -> None:
    """Eight threads write changes over many small files: a reader sees whole lines, and in the end each once."""
    with audit_in(tmp_path, file_bytes_max=4096, files_max=10_000) as audit, ThreadPoolExecutor(9) as pool:
        seen: list[int] = []

        def read_on() -> None:
            while sum(audit.log.written.values()) < 8 * each:
                seen.append(sum(1 for _ in audit.read(0)))

        reading = pool.submit(read_on)
        list(pool.map(lambda part: [change(audit, f"a{part}-{number}") for number in range(each)], range(8)))
        reading.result(60)
    lines = lines_in(changes_file(tmp_path))
    assert Counter(line["resource"]["name"] for line in lines) == Counter(
        f"a{p}-{n}" for p in range(8) for n in range(each)
    )
    assert len(rotated_files(changes_file(tmp_path))) > 50
    assert seen == sorted(seen)
    assert [json.loads(line) for line in audit.read(0)] == lines


@pytest.mark.parametrize("files_max", [1, 3])
def test_only_so_many_files_are_kept(files_max: int, tmp_path: Path) -> None:
    """The newest lines are in them, also under a name with a pattern's letters and without a suffix."""
    path = tmp_path / "a[0-9]*"
    file = RotatingFile(path, 4096, files_max, is_synced=False)
    for number in range(100):
        file.append(json.dumps({"n": number, "pad": "x" * 1000}).encode() + b"\n")
    file.close()
    lines = lines_in(path)
    assert len([*rotated_files(path), path]) == files_max == len(list(tmp_path.iterdir()))
    assert [line["n"] for line in lines] == list(range(100 - len(lines), 100))


def test_a_file_that_somebody_moves_is_begun_anew(tmp_path: Path) -> None:
    """As logrotate does it, or a person who deletes it."""
    with audit_in(tmp_path) as audit:
        assert change(audit, "first")
        changes_file(tmp_path).rename(tmp_path / "moved")
        assert change(audit, "second")
        changes_file(tmp_path).unlink()
        assert change(audit, "third")
    assert [line["resource"]["name"] for line in lines_in(tmp_path / "moved")] == ["first"]
    assert [line["resource"]["name"] for line in lines_in(changes_file(tmp_path))] == ["third"]


def test_reading_chooses(tmp_path: Path) -> None:
    """Time, adapter, tenant and kind choose lines; both kinds come in the order of their times."""
    clock = Clock()
    with audit_in(tmp_path, clock) as audit:
        change(audit, "old")
        clock.now += 3600
        deny(audit, Principal("beta"), name="sql")
        clock.now += 1
        change(audit, "sql")
        clock.now += 1
        about = Resource(Sort.TENANT, "beta")
        asyncio.run(audit.changed(ANN, "p", Action.MANAGE, about, {}, {}, "r-9"))
        assert audit.log.flush()

        def found(**chosen: Any) -> list[tuple[str, str]]:
            lines = map(json.loads, audit.read(**{"since": NOON + 60, **chosen}))
            return [(line["kind"], line["resource"]["name"]) for line in lines]

        assert found() == [("denial", "sql"), ("change", "sql"), ("change", "beta")]
        assert found(since=0)[0] == ("change", "old")
        assert found(adapter="sql") == [("denial", "sql"), ("change", "sql")]
        assert found(tenant="beta") == [("denial", "sql"), ("change", "beta")]
        assert found(kind="denial") == [("denial", "sql")]
        assert found(adapter="none") == []


# A process that is killed, a disk that fails.


def run(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )


CHANGING = """
import asyncio, itertools, sys
from pathlib import Path
from sidecar.access.audit import Audit
from sidecar.access.principal import Action, Principal, Resource, Sort
from sidecar.config import access as config
async def main():
    audit = Audit.configured(config.Audit(file_bytes_max=8192, files_max=1000), Path(sys.argv[1]))
    audit.start()
    for number in itertools.count():
        about = Resource(Sort.ADAPTER, str(number))
        assert await audit.changed(Principal(), "", Action.PROMOTE, about, {}, {}, "")
        print(number, flush=True)
asyncio.run(main())
"""


def test_a_kill_loses_no_change_that_was_answered(tmp_path: Path) -> None:
    """Every number that was told is in the files, once; the next process goes on with whole lines."""
    with run(CHANGING, tmp_path) as killed:
        assert killed.stdout is not None
        assert "100\n" in killed.stdout
        killed.send_signal(signal.SIGKILL)
        told = 100 + len(killed.stdout.read().splitlines())
    with changes_file(tmp_path).open("ab") as file:
        file.write(b'{"time": "2026-11-2')  # what a kill in the middle of a write leaves
    with audit_in(tmp_path, file_bytes_max=8192, files_max=1000) as audit:
        change(audit, "after")
        names = [json.loads(line)["resource"]["name"] for line in audit.read(0)]
    assert names[-1] == "after"
    assert names[:-1] == [str(number) for number in range(len(names) - 1)]
    assert len(names) - 1 in (told + 1, told + 2)  # the last may be written and not told


FULL = """
import asyncio, logging, resource, signal, sys
from pathlib import Path
from sidecar.access.audit import Audit
from sidecar.access.principal import SYSTEM, Action, Principal, Proof, Resource, Sort
from sidecar.config import access as config
logging.basicConfig()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
async def main():
    audit = Audit.configured(config.Audit(), Path(sys.argv[1]))
    audit.start()
    async def change(number):
        about = Resource(Sort.ADAPTER, f"name-{number}")
        return await audit.changed(Principal("acme"), "", Action.PROMOTE, about, {}, {"x": "y" * 250}, "")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))
    told = [await change(number) for number in range(10)]
    for number in range(10):
        audit.denied(None, f"10.0.0.{number}:1", Proof.KEY, Action.INFER, SYSTEM, "y" * 250)
        audit.log.flush()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    told.append(await change(10))
    audit.stop()
    print(told, audit.log.lost, audit.log.written)
asyncio.run(main())
"""


def test_a_full_disk(tmp_path: Path) -> None:
    """The kernel cuts a write short: whole lines stay, what is lost is counted, changes are in the log instead."""
    full = run(FULL, tmp_path)
    out, err = full.communicate(timeout=60)
    assert full.returncode == 0, err
    kept = [line["resource"]["name"] for line in lines_in(changes_file(tmp_path))]
    lost = 11 - len(kept)
    assert 0 < lost < 10
    assert kept == [f"name-{number}" for number in (*range(10 - lost), 10)]
    assert len(lines_in(denials_file(changes_file(tmp_path)))) == 10 - lost_denials(out)
    assert lost_denials(out) > 0
    assert f"{[True] * (10 - lost) + [False] * lost + [True]} {{'change': {lost}, " in out
    assert err.count("the audit of changes cannot be written: [Errno 27] File too large") == 1
    assert [f"name-{number}" in err for number in range(11)] == [False] * (10 - lost) + [True] * lost + [False]
    assert err.count("the audit of denials cannot be written") == 1
    assert "the audit of changes is written again" in err


def lost_denials(out: str) -> int:
    return int(out.partition("'denial': ")[2].partition("}")[0])


async def test_a_place_without_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """/dev/full answers every write with ENOSPC: the change goes on and is told as lost."""
    with audit_in(tmp_path, file="/dev/full") as audit:
        assert not await audit.changed(ANN, "", Action.DRAIN, SYSTEM, {}, {}, "r-77")
    assert audit.log.lost["change"] == 1
    assert "No space left on device" in caplog.text
    assert "r-77" in caplog.text


class Pipe:
    """A full pipe that nobody reads."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.write_end, False)
        with suppress(BlockingIOError):
            while True:
                os.write(self.write_end, b"-")
        os.set_blocking(self.write_end, True)

    def append(self, data: bytes) -> None:
        os.write(self.write_end, data)

    def close(self) -> None:
        """Close it once, though changes and denials both go there."""
        end, self.write_end = self.write_end, -1
        if end >= 0:
            os.close(end)


async def test_a_place_that_takes_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """While a write hangs, denials are dropped and counted, and a change goes on without its line."""
    monkeypatch.setattr("sidecar.access.audit.WRITE_S", 0.01)
    monkeypatch.setattr(audit_log, "DENIALS_QUEUED_MAX", 50)
    monkeypatch.setattr(audit_log, "CHANGES_QUEUED_MAX", 60)
    pipe = Pipe()
    audit = Audit({"change": pipe, "denial": pipe}, clock=Clock())
    audit.start()
    for number in range(200):
        deny(audit, Principal(str(number)))
    assert audit.log.lost["denial"] >= 100  # some may have been taken before the write that hangs
    changes = [audit.changed(ANN, "", Action.DRAIN, SYSTEM, {}, {}, f"r-{number}") for number in range(200)]
    assert await asyncio.gather(*changes) == [False] * 200
    assert 100 <= audit.log.lost["change"] < 200  # they have room that denials cannot take, and no more than that
    assert "the audit lost this change (the queue of lines is full)" in caplog.text
    with os.fdopen(pipe.read_end, "rb") as reader:
        stopping = asyncio.get_running_loop().run_in_executor(None, audit.stop)
        written = await asyncio.get_running_loop().run_in_executor(None, reader.read)
        await stopping
    assert len(written.splitlines()) == sum(audit.log.written.values())


def test_lines_on_stdout_and_in_the_log(capfdbinary: pytest.CaptureFixture[bytes], caplog: Any) -> None:
    """`stdout: true` writes there, and a process without a data directory into its log; neither can be read back."""
    audit = Audit.configured(config.Audit(stdout=True), None)
    audit.start()
    assert change(audit)
    audit.stop()
    assert json.loads(capfdbinary.readouterr().out)["kind"] == "change"
    assert list(audit.read(0)) == []
    with caplog.at_level(logging.INFO):
        audit = Audit.configured(config.Audit(), None)
        audit.start()
        assert change(audit)
        audit.stop()
    assert '"kind": "change"' in caplog.text
