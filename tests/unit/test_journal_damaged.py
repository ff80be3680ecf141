"""What a damaged journal, or a stranger's, can't do to who replays, explains or simulates it."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sidecar.cli.journaled import journaled
from sidecar.errors import Misused, Reason
from sidecar.incident.explain import explain
from sidecar.journal import replay
from sidecar.journal.segments import segment_paths
from sidecar.lab.sim.options import Options
from tests.kit.cli_runs import Ended, runner
from tests.kit.journals import write_journal
from tests.unit.test_explain import busy_world

Records = list[dict[str, Any]]
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Records:
    """The records of a small segment that has all a segment has: it begins in the middle of work."""
    folder = tmp_path_factory.mktemp("journal")
    # Nothing is left out, and so each step waits for the journal's thread: the segments are the same in each run.
    write_journal(busy_world(requests=24), folder, segment_bytes=8192, leave_out=lambda _: False)
    return [json.loads(line) for line in segment_paths(folder)[1].read_bytes().splitlines()]


def ways(path: Path) -> Iterator[Callable[[], Any]]:
    """Yield each way to read a journal."""
    yield lambda: replay.run(path, True, True, lambda _: None, lambda _: None)
    yield lambda: explain(path, 8)
    yield lambda: explain(path, 8_000_000)  # the error names the nearest arrivals
    yield lambda: journaled(Options(journal=path), path)


def written(folder: Path, records: Records, tail: str = "") -> Path:
    path = folder / "segment-000000001.jsonl"
    path.write_text("".join(f"{json.dumps(record, separators=(',', ':'))}\n" for record in records) + tail)
    return path


def first_event(records: Records) -> dict[str, Any]:
    return next(record for record in records if "event" in record)


HEADERS: list[dict[str, Any]] = [
    *({"first_step": first} for first in ("x", None)),
    *({"state": state} for state in ([1], None, "abc", {}, {"!": "State"}, {"!": "Tick", "config": {"!": "Tick"}})),
]
EVENTS: list[Any] = [
    *("x", None, [], {"x": 1}, {"!": "Nope"}, {"!": [1]}, {"!": "Received"}, {"!": "Phase", "=": "UP"}),
    *({"!": "dict", "=": held} for held in ([[1]], [[[1], 2]], 5)),
    *({"!": "deque", "=": [1], "maxlen": most} for most in (-1, 1 << 80)),
    *({"!": "FirstToken", "request": "1", "attempt": 1}, {"!": "Progress", "backend": "b0", "tokens": [1]}),
]
STEPS: list[dict[str, Any]] = [{"at": "x"}, {"at": 1 << 80}, {"effects": 5}, {"effects": None}]
FIELDS: list[dict[str, Any]] = [
    {"field": "versions", "items": 5},
    {"field": "versions", "items": [[1]]},
    {"field": ["a"], "items": []},
    {"field": "config", "items": []},
    {"field": "backends", "items": [["b0", 5]]},
]
ENDS: list[dict[str, Any]] = [
    {"raised": "X", "at": 1, "step": "a", "event": {"!": "Tick"}},
    *({"raised": "X", "at": 1, "step": 5, **rest} for rest in ({}, {"effect": "str"}, {"event": "str"})),
]


@pytest.mark.parametrize("header", HEADERS, ids=str)
def test_a_damaged_header_is_refused(header: dict[str, Any], whole: Records, tmp_path: Path) -> None:
    path = written(tmp_path, [{**whole[0], **header}, *whole[1:]])
    for read in ways(path):
        with pytest.raises(Misused, match=r"segment-000000001.jsonl cannot be re(played|ad): its ") as caught:
            read()
        assert caught.value.reason is Reason.NOT_A_JOURNAL


@pytest.mark.parametrize("field", FIELDS, ids=str)
def test_a_damaged_part_of_the_state_is_refused(field: dict[str, Any], whole: Records, tmp_path: Path) -> None:
    path = written(tmp_path, [whole[0], field, *whole[1:]])
    for read in ways(path):
        with pytest.raises(Misused) as caught:
            read()
        assert caught.value.reason is Reason.NOT_A_JOURNAL


@pytest.mark.parametrize("damage", [*({"event": event} for event in EVENTS), *STEPS], ids=str)
def test_a_damaged_step_is_refused_by_its_place(damage: dict[str, Any], whole: Records, tmp_path: Path) -> None:
    """By line and step, without Python's words; explaining and simulating leave it out."""
    records = copy.deepcopy(whole)
    number = records.index(first_event(records)) + 1
    first_event(records).update(damage)
    path = written(tmp_path, records)
    with pytest.raises(Misused, match=rf"line {number}, step {whole[0]['first_step']}, (holds|lacks) ") as caught:
        list(replay.replay(path))
    assert caught.value.reason is Reason.NOT_A_JOURNAL
    assert "__init__" not in caught.value.message
    assert "object" not in caught.value.message
    for read in ways(path):
        tried(read)


@pytest.mark.parametrize("tail", [*map(json.dumps, ENDS), DEEP, f'{{"at":1,"event":{DEEP}}}', "[1]", '{"a":"\xff"'])
def test_a_damaged_line_is_refused(tail: str, whole: Records, tmp_path: Path) -> None:
    path = written(tmp_path, whole, tail + "\n")
    with pytest.raises(Misused, match=rf"line {len(whole) + 1}\b") as caught:
        list(replay.replay(path))
    assert caught.value.reason is Reason.NOT_A_JOURNAL
    for read in ways(path):
        tried(read)


def tried(read: Callable[[], Any]) -> None:
    """Read a journal: either that works, or it is said that the journal is none."""
    with suppress(Misused):
        read()


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.just("\ud800"),
    st.builds(list),
    st.builds(dict),
)


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_ends_as_a_replay_or_as_no_journal(data: st.DataObject, whole: Records, tmp_path: Path) -> None:
    """One or two values, wherever they are, are others, or are gone."""
    records = copy.deepcopy(whole)
    for _ in range(data.draw(st.integers(1, 2))):
        at: Any = records
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            key = data.draw(st.sampled_from(keys))
            if not isinstance(at[key], dict | list) or not at[key] or (at is not records and data.draw(st.booleans())):
                break
            at = at[key]
        if data.draw(st.booleans()) or at is records:
            at[key] = data.draw(JUNK)
        else:
            del at[key]
    path = written(tmp_path, records)
    for read in ways(path):
        tried(read)


# Policies.


@pytest.fixture
def sidecar(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    return runner(capfd)


def names_policy(records: Records, kind: str, name: Any) -> Records:
    return [
        json.loads(
            json.dumps(records[0]).replace(f'"{kind}": "{records[0]["config"][kind]}"', f'"{kind}": {json.dumps(name)}')
        ),
        *records[1:],
    ]


@pytest.fixture
def strangers(whole: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A journal of a policy that no package offers, and that can be imported: it's ours under another name."""
    (tmp_path / "strange_policy.py").write_text("from policies.eviction.lru import LRU as Mine\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "strange_policy", raising=False)
    return written(tmp_path, names_policy(whole, "disk_eviction", "strange_policy:Mine"))


COMMANDS = (("replay",), ("replay", "--explain", "8"), ("simulate", "--journal"), ("calibrate", "--from-journal"))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_journals_word_imports_nothing(
    command: tuple[str, ...], strangers: Path, sidecar: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a class that is neither ours nor an installed plug-in; the operator may allow it by its name."""
    monkeypatch.chdir(strangers.parent)
    ended = sidecar(*command, str(strangers))
    assert ended.code == 2
    assert f"{strangers} cannot be replayed: it names the eviction policy" in ended.err
    assert "--policy strange_policy:Mine" in ended.err
    assert "[CONFIG_INVALID]" in ended.err
    assert "strange_policy" not in sys.modules
    sidecar(*command, str(strangers), "--policy", "strange_policy:Mine")
    assert "strange_policy" in sys.modules


def test_our_own_class_needs_no_leave(whole: Records, tmp_path: Path) -> None:
    path = written(tmp_path, names_policy(whole, "disk_eviction", "policies.eviction.lru:LRU"))
    assert all(step.same for step in replay.replay(path))


@pytest.mark.parametrize("name", ["nosuch", "nosuch:X", ".a:X", ":X"])
def test_a_policy_that_is_not_there_is_said_of_the_segment(name: str, whole: Records, tmp_path: Path) -> None:
    path = written(tmp_path, names_policy(whole, "eviction", name))
    with pytest.raises(Misused, match=rf"{path.name} cannot be replayed: .*{name}") as caught:
        list(replay.replay(path, allowed=[name]))
    assert caught.value.reason is Reason.CONFIG_INVALID
