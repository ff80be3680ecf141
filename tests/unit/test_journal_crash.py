"""What a journal says of the end of a process whose core raised, and what a replay makes of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sidecar.config.plugins import policies_of
from sidecar.core import effects as do
from sidecar.core import events as ev
from sidecar.core.config import CoreConfig
from sidecar.core.core import Core
from sidecar.core.state import NEVER_NS
from sidecar.incident.explain import explain
from sidecar.journal import replay
from sidecar.journal.raised import Raised, describe
from sidecar.journal.segments import segment_paths
from sidecar.journal.writer import Journal
from sidecar.shell.driver import Driver
from tests.unit.test_journal import CONFIG, Script, busy_script

FAULTY = replace(CONFIG, raise_on="Received:poison")


def poison(request: int) -> ev.Received:
    return ev.Received(request, "poison", "t0", "default", 5, 5)


class Life:
    """A journaled core, driven as a process drives it, from events at given times until it ends."""

    def __init__(self, directory: Path, config: CoreConfig = FAULTY, **bounds: int) -> None:
        self.now_ns = 0
        self.fails_on: type | None = None
        core = Core(config, policies_of(config))
        self.journal = Journal(core, directory, **bounds)
        self.driver = Driver(core, lambda: self.now_ns, self._run)
        self.driver._wake_at = lambda at_ns, now_ns: None  # type: ignore[method-assign]  # time is the script's
        self.driver.observe(self.journal)
        self.driver.crash.then(self.journal.ended)
        self.journal.start()

    def _run(self, effect: do.Effect) -> None:
        if type(effect) is self.fails_on:
            raise OSError("the backend's wire")

    def take(self, script: Script) -> Life:
        for self.now_ns, event in script:
            self.driver._take(event)
        return self

    def poisoned(self) -> Life:
        """Take in a request that the core raises on, and one more behind it."""
        return self.take([(self.now_ns + 1, poison(900)), (self.now_ns + 2, poison(901))])

    def over(self) -> None:
        self.journal.stop()


def replayed(path: Path) -> tuple[int, dict[str, Any], str]:
    """Return the exit code, the verdict as JSON and as a sentence."""
    as_json: list[str] = []
    said: list[str] = []
    code = replay.run(path, False, True, as_json.append, lambda note: None)
    assert replay.run(path, False, False, said.append, lambda note: None) == code
    return code, json.loads(as_json[-1]), said[-1]


def test_a_replay_raises_what_the_core_raised(tmp_path: Path) -> None:
    """The event on which the core raised is the last record; taken again it raises the same, and replay says so."""
    script = busy_script(8)
    Life(tmp_path).take(script).poisoned().over()
    (path,) = segment_paths(tmp_path)
    last = json.loads(path.read_bytes().splitlines()[-1])
    assert (last["event"]["request"], last["step"]) == (900, len(script) + 1)
    assert last["raised"] == "Injected: raise_on is Received:poison"
    code, verdict, said = replayed(tmp_path)
    assert (code, verdict["same"], verdict["raised"][0]["again"]) == (70, True, True)
    assert f"{len(script)} steps in 1 segment gave the recorded effects" in said
    assert f"the core raised {last['raised']} at step {len(script) + 1} (Received), as it did then" in said
    steps = list(replay.replay(path))
    assert (steps[-1].step, steps[-1].failure) == (len(script) + 1, last["raised"])


def test_a_core_that_is_mended_is_a_difference(tmp_path: Path) -> None:
    """Where the code no longer raises, the replay is told from one that reproduces it."""
    Life(tmp_path).take(busy_script(4)).poisoned().over()
    (path,) = segment_paths(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"raise_on":"Received:poison"', b'"raise_on":""'))
    code, verdict, said = replayed(tmp_path)
    assert (code, verdict["same"]) == (1, False)
    assert "(Received) differs: it raised Injected: raise_on is Received:poison then, actual " in said


def test_no_segment_begins_with_the_state_that_is_left(tmp_path: Path) -> None:
    """The journal is full by the step that raises: no state that may be half changed is written."""
    life = Life(tmp_path, segment_bytes=1, segments_max=10_000).take(busy_script(8))
    life.journal.flush()
    before = segment_paths(tmp_path)
    life.poisoned().over()
    assert segment_paths(tmp_path) == before
    last = [json.loads(line) for line in before[-1].read_bytes().splitlines()]
    assert "raised" in last[-1]
    assert not any(re.search(r"\b900\b", json.dumps(line.get("items", []))) for line in last)
    assert replayed(tmp_path)[0] == 70


def test_behind_a_gap_the_exception_cannot_be_had_again_and_replay_says_so(tmp_path: Path) -> None:
    """Steps found the writer's queue full before the one that raised; what is known of it is written all the same."""
    script = busy_script(8)
    life = Life(tmp_path).take(script[:-3])
    life.journal.flush()
    life.journal._interrupt(NEVER_NS)
    life.take(script[-3:]).poisoned().over()
    code, verdict, said = replayed(tmp_path)
    assert (code, verdict["same"], verdict["raised"][0]["again"]) == (1, True, False)
    assert verdict["steps"] == len(script) - 3
    assert (
        f"at step {len(script) + 1} (Received); the journal lacks 3 steps before it, so it cannot be reproduced" in said
    )


def test_a_disk_that_fails_before_the_core_does(tmp_path: Path) -> None:
    """The end of a segment that a full disk cut off in the middle of a line is written behind its last whole one."""
    script = busy_script(8)
    life = Life(tmp_path).take(script[:-3])
    life.journal.flush()
    (path,) = segment_paths(tmp_path)
    writer = life.journal._writer
    writer._fail(OSError("No space left on device"))
    with path.open("ab") as file:
        file.write(b'{"at":17,"event":{"!":"Rec')
    life.take([(life.now_ns, event) for _, event in script[-3:]]).poisoned().over()
    code, verdict, said = replayed(tmp_path)
    assert (code, verdict["same"], verdict["steps"]) == (1, True, len(script) - 3)
    assert "the journal lacks 3 steps before it" in said


def test_a_disk_that_takes_nothing_while_the_core_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It ends all the same, and the log says both."""
    (tmp_path / "journal").write_text("in the way")
    Life(tmp_path / "journal").take(busy_script(2)).poisoned().over()
    assert "the core on Received raised Injected" in caplog.text
    assert "cannot be written" in caplog.text


def test_an_effect_that_raised_is_named(tmp_path: Path) -> None:
    """The step is one like the others, and replays; of what carries out effects no replay can tell."""
    life = Life(tmp_path, CONFIG)
    life.fails_on = do.Dispatch
    life.take(busy_script(8)).over()
    code, verdict, said = replayed(tmp_path)
    assert (code, verdict["same"]) == (0, True)
    assert verdict["raised"][0]["step"] == verdict["steps"]
    assert "carrying out Dispatch raised OSError: the backend's wire, which a replay cannot show" in said


def test_ownership_that_raised_is_named(tmp_path: Path) -> None:
    """It is no part of the journal but for what it ended of."""
    life = Life(tmp_path, CONFIG).take(busy_script(4))
    life.driver.crash.happen(Raised(KeyError("b7"), 5, ownership="LeaseAnswered"))
    life.over()
    code, _, said = replayed(tmp_path)
    assert code == 0
    assert "ownership, on LeaseAnswered, raised KeyError: 'b7', which a replay cannot show" in said


def test_an_event_without_a_written_form_is_said_to_be_one(tmp_path: Path) -> None:
    """What the core raised on may be just what cannot be written; that it raised can be."""
    life = Life(tmp_path).take(busy_script(4))
    life.take([(life.now_ns + 1, replace(poison(900), input_tokens=object()))])  # type: ignore[arg-type]
    life.over()
    code, _, said = replayed(tmp_path)
    assert code == 1
    assert "its event could not be encoded, so it cannot be reproduced" in said


def test_a_step_that_cannot_be_written_is_a_gap(tmp_path: Path) -> None:
    """A number of more digits than JSON takes leaves no hole within a segment: what follows is in a new one."""
    script = busy_script(8)
    at_ns = script[-1][0]
    long = ev.Received(901, "nobody", "t0", "default", 5, 10**5000)
    life = Life(tmp_path).take([*script, (at_ns + 1, long)])
    life.journal.flush()
    life.take([(at_ns + 2, ev.Received(902, "nobody", "t0", "default", 5, 5)), (at_ns + 3, ev.Tick())]).over()
    assert life.journal.figures.gaps == 1
    said: list[str] = []
    assert replay.run(tmp_path, False, False, said.append, said.append) == 0
    assert "not in the journal" in said[0]


def test_each_life_says_what_it_ended_of(tmp_path: Path) -> None:
    """A process that was started anew goes on in the same folder; both ends are told, and a request is explained."""
    for _ in range(2):
        Life(tmp_path).take(busy_script(4)).poisoned().over()
    code, verdict, _ = replayed(tmp_path)
    assert (code, verdict["segments"], len(verdict["raised"])) == (70, 2, 2)
    notes = explain(tmp_path, 1).notes
    assert all("cannot be replayed" not in note for note in notes)


def test_an_address_in_an_exception_is_no_difference() -> None:
    """The same object lies elsewhere in the process that replays."""
    assert describe(OSError(object())) == "OSError: <object object at 0x…>"
