"""The journal: what is written, when a segment begins, what a replay proves, and what a failing disk does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from sidecar.config.plugins import policies_of
from sidecar.core import events as ev
from sidecar.core.config import CoreConfig
from sidecar.core.core import Core
from sidecar.errors import Misused
from sidecar.journal import codec, replay
from sidecar.journal.segments import segment_paths
from sidecar.journal.snapshot import snapshot_of
from sidecar.journal.writer import RETRY_NS, Journal
from tests.kit.corekit import BLOB_BYTES, World
from tests.kit.journals import written_state

Script = list[tuple[int, ev.Event]]
CONFIG = CoreConfig(store_bytes=4 * BLOB_BYTES)


def busy_script(requests: int = 40, adapters: int = 6, seed: int = 0, fault_rate: float = 0.0) -> Script:
    """Return the events of two engines and a store that are too small, one engine lost under way."""
    world = World(CONFIG, engines=2, seed=seed, host_pages=3, device_pages=2, seats=2)
    for engine in world.engines.values():
        engine.fault_rate = fault_rate
    world.register(*(f"a{number}" for number in range(adapters)))
    for number in range(requests):
        world.send(f"a{number * 7 % adapters}", tenant=f"t{number % 3}")
    world.run(for_ns=40_000_000)
    world.lose("b0")
    world.run(for_ns=40_000_000)
    world.bring_up("b0")
    world.run()
    return world.events


def drive(core: Core, journal: Journal, script: Iterable[tuple[int, ev.Event]]) -> None:
    for now_ns, event in script:
        journal.observed(event, core.step(event, now_ns), now_ns)


def record(directory: Path, script: Script, segment_bytes: int = 1 << 20, segments_max: int = 8) -> Journal:
    """Write a journal of a script and stop it."""
    core = Core(CONFIG, policies_of(CONFIG))
    journal = Journal(core, directory, segment_bytes, segments_max)
    journal.start()
    drive(core, journal, script)
    journal.stop()
    return journal


def replayed_in_a_process(path: Path, hash_seed: str) -> bytes:
    program = (
        "import sys; from pathlib import Path; from sidecar.journal.replay import run; "
        "sys.exit(run(Path(sys.argv[1]), True, False, print, lambda line: print(line, file=sys.stderr)))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], env=environment, capture_output=True, check=True, timeout=60
    )
    return done.stdout


def test_a_replay_gives_the_recorded_effects(tmp_path: Path) -> None:
    """Every step of a busy script, run again from the file, has the digest that was recorded, and all are there."""
    script = busy_script()
    record(tmp_path, script)
    summary = replay.Summary()
    steps = list(replay.replay(tmp_path, summary))
    assert [step.event for step in steps] == [event for _, event in script]
    assert all(step.same for step in steps)
    assert (summary.segments, summary.difference, summary.notes) == (1, None, [])


def test_two_hash_seeds_give_the_same_bytes(tmp_path: Path) -> None:
    """A segment from the middle of a journal, replayed alone under two hash seeds, prints the same bytes."""
    record(tmp_path, busy_script(), segment_bytes=4096)
    middle = segment_paths(tmp_path)[2]
    outputs = [replayed_in_a_process(middle, seed) for seed in ("0", "1")]
    assert outputs[0].count(b"\n") > 10
    assert outputs[1] == outputs[0]


def test_any_retained_segment_replays_alone(tmp_path: Path) -> None:
    """Segments are begun in the middle of work; each is replayed alone, and together they hold every step once."""
    script = busy_script()
    record(tmp_path, script, segment_bytes=4096, segments_max=1000)
    numbers = []
    for path in segment_paths(tmp_path):
        steps = list(replay.replay(path))
        assert all(step.same for step in steps), path
        numbers += [step.step for step in steps]
    assert len(segment_paths(tmp_path)) > 3
    assert numbers == list(range(1, len(script) + 1))


def test_the_oldest_segments_are_deleted(tmp_path: Path) -> None:
    """No more than segments_max are kept, the newest ones, and none is left unfinished."""
    journal = record(tmp_path, busy_script(), segment_bytes=4096, segments_max=2)
    kept = segment_paths(tmp_path)
    assert [int(path.stem.removeprefix("segment-")) for path in kept] == [
        journal.figures.segments - 1,
        journal.figures.segments,
    ]
    assert sorted(tmp_path.iterdir()) == kept


@pytest.mark.parametrize("seed", range(6))
def test_every_segment_of_a_faulty_run_replays(tmp_path: Path, seed: int) -> None:
    """With engines that fail at random, every segment, begun wherever it was, replays to the same effects."""
    record(tmp_path, busy_script(seed=seed, fault_rate=0.2), segment_bytes=1024, segments_max=1000)
    said: list[str] = []
    assert replay.run(tmp_path, False, False, said.append, said.append) == 0, said
    assert len(segment_paths(tmp_path)) > 3


def test_a_second_run_appends_new_segments(tmp_path: Path) -> None:
    """A journal in a directory that has segments begins a new one behind them and leaves them as they are."""
    record(tmp_path, busy_script(4))
    before = segment_paths(tmp_path)[0].read_bytes()
    record(tmp_path, busy_script(4))
    first, second = segment_paths(tmp_path)
    assert first.read_bytes() == before
    assert all(step.same for step in replay.replay(second))


def test_a_tampered_step_is_found(tmp_path: Path) -> None:
    """An event that was changed makes the first step whose effects depend on it differ, with both digests."""
    record(tmp_path, busy_script())
    (path,) = segment_paths(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    index, line = next((i, line) for i, line in enumerate(lines) if b'"Received"' in line)
    lines[index] = line.replace(b'"adapter":"a0"', b'"adapter":"nobody"')
    path.write_bytes(b"".join(lines))
    said: list[str] = []
    assert replay.run(path, False, True, said.append, said.append) == 1
    difference = json.loads(said[-1])["difference"]
    assert difference["event"]["adapter"] == "nobody"
    assert difference["step"] == index - lines.index(b'{"complete":true}\n')
    assert difference["expected"] != difference["actual"]


def test_a_core_that_raises_is_a_difference(tmp_path: Path) -> None:
    """A step that makes the core raise is reported as the difference, with what was raised."""
    record(tmp_path, busy_script(4))
    (path,) = segment_paths(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"!":"Fetched","key":"', b'"!":"Fetched","key":"un', 1))
    said: list[str] = []
    assert replay.run(path, False, False, said.append, said.append) == 1
    assert "(Fetched) differs" in said[-1]
    assert "the core raised KeyError" in said[-1]


def test_a_cut_off_last_line_is_noted(tmp_path: Path) -> None:
    """What a crash left of the last line is left out, and said."""
    script = busy_script(4)
    record(tmp_path, script)
    (path,) = segment_paths(tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    said: list[str] = []
    assert replay.run(tmp_path, False, False, said.append, said.append) == 0
    assert "cut off" in said[0]
    assert said[1].startswith(f"{len(script) - 1} steps in 1 segment ")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "does not begin as a journal segment"),
        (b"hello\n", "line 1 is not JSON"),
        (b"[1]\n", "line 1 is not a record"),
        (b'{"some":"record"}\n', "does not begin as a journal segment"),
        (
            b'{"journal":99,"version":"7.1"}\n',
            "its format is 99 and this version reads 11; replay it with lora-sidecar 7",
        ),
        (b'{"journal":11}\n', "its first line lacks first_step, config, state"),
    ],
)
def test_what_is_no_segment_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    """A file that is not a segment, or one of another format, is refused with the path and the reason."""
    path = tmp_path / "segment-000000001.jsonl"
    path.write_bytes(content)
    with pytest.raises(Misused) as caught:
        list(replay.replay(path))
    assert str(path) in caught.value.message
    assert problem in caught.value.message


def test_a_state_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    """A segment that ends within its state cannot be replayed and says so."""
    record(tmp_path, busy_script(4))
    (path,) = segment_paths(tmp_path)
    first, rest = path.read_bytes().split(b"\n", 1)
    assert rest.startswith(b'{"complete":true}\n')
    for content in (first + b"\n", first + rest.removeprefix(b'{"complete":true}')):
        path.write_bytes(content)
        with pytest.raises(Misused, match="its state is cut off"):
            list(replay.replay(path))


def test_a_missing_file_and_an_empty_directory_are_refused(tmp_path: Path) -> None:
    """A path that is not there, and a directory without segments, are refused by name."""
    with pytest.raises(Misused, match="No such file"):
        list(replay.replay(tmp_path / "gone"))
    with pytest.raises(Misused, match="there is no segment"):
        list(replay.replay(tmp_path))


def test_a_segment_of_unknown_events_is_refused(tmp_path: Path) -> None:
    """An event that this version has not got is a clear error, not a traceback."""
    record(tmp_path, busy_script(4))
    (path,) = segment_paths(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"!":"Fetched"', b'"!":"Teleported"'))
    with pytest.raises(Misused, match="an event that this version does not know"):
        list(replay.replay(path))


def test_a_full_queue_begins_a_new_segment(tmp_path: Path) -> None:
    """Steps that find the queue full are left out and counted, and what follows is replayable again."""
    script = busy_script()
    core = Core(CONFIG, policies_of(CONFIG))
    longest = max(len(codec.named(event)) for _, event in script)
    journal = Journal(core, tmp_path, queued_bytes_max=longest)  # the longest event's line never fits
    journal.start()
    for pair in script:
        drive(core, journal, [pair])
        journal.flush()
    journal.stop()
    assert journal.figures.gaps >= 1
    steps = list(replay.replay(tmp_path))
    assert len(segment_paths(tmp_path)) >= 2
    assert all(step.same for step in steps)
    assert [step.event for step in steps][-1] == script[-1][1]


def test_a_disk_that_fails_is_logged_once_and_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """While the directory cannot be made serving goes on; once it can, a new segment is begun and replays."""
    directory = tmp_path / "journal"
    directory.write_text("in the way")
    script = busy_script()
    core = Core(CONFIG, policies_of(CONFIG))
    journal = Journal(core, directory)
    journal.start()
    journal.flush()
    drive(core, journal, script[:20])
    late = RETRY_NS
    drive(core, journal, [(now_ns + late, event) for now_ns, event in script[20:30]])
    journal.flush()
    drive(core, journal, [(now_ns + late, event) for now_ns, event in script[30:31]])
    assert journal.figures.errors == 2
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == 1
    assert "serving goes on without it" in caplog.records[0].message
    directory.unlink()
    drive(core, journal, [(now_ns + 2 * late, event) for now_ns, event in script[31:]])
    journal.stop()
    steps = list(replay.replay(directory))
    assert len(steps) > 10
    assert all(step.same for step in steps)


def test_the_journal_holds_no_prompt(tmp_path: Path) -> None:
    """Lengths are written, the text is not: nothing the core is told of a request has a place for it."""
    received = ev.Received(1, "a0", "tenant", "default", len("MARKER a secret prompt"), 7)
    script: Script = [*busy_script(4), (10**12, received)]
    record(tmp_path, script)
    written = b"".join(path.read_bytes() for path in segment_paths(tmp_path))
    assert b"MARKER" not in written
    assert b'"input_tokens":22,"output_tokens_max":7' in written


def test_a_snapshot_is_the_state_and_stays_so() -> None:
    """After every step of a script a snapshot is written like the state itself, and later steps do not change it."""
    core = Core(CONFIG, policies_of(CONFIG))
    held = []
    for now_ns, event in busy_script(20):
        core.step(event, now_ns)
        state = written_state(core.state)
        snapshot = snapshot_of(core.state)
        assert codec.dumps(snapshot) == state
        held.append((snapshot, state))
    assert all(codec.dumps(snapshot) == state for snapshot, state in held)
