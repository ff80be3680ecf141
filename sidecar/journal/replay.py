"""Replay a journal: the same events, from the state at the beginning of a segment, must give the same effects.

Each segment stands alone, so what is retained can be replayed whatever came before it. A step whose effects differ from
the recorded ones means that the code or a policy has changed, or that a decision depends on something outside the
event. Where the core raised, the replay must raise the same exception.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from sidecar.core.core import Core
from sidecar.core.effects import Effect
from sidecar.core.events import Event
from sidecar.errors import CRASHED_EXIT, Misused, Reason
from sidecar.journal import checked, codec
from sidecar.journal.archive import opened
from sidecar.journal.raised import describe
from sidecar.journal.segments import FORMAT, LARGE, effects_digest, product_version, segment_paths


@dataclass(frozen=True)
class Replayed:
    """One replayed step."""

    segment: str
    step: int
    at_ns: int
    event: Event
    effects: Sequence[Effect]
    recorded: str
    """The recorded digest of the effects, or the recorded exception of the core."""
    raised: bool = False
    """True if the core raised when the journal was written."""
    failure: str = ""
    """The exception that the core raises now instead of returning effects."""

    @property
    def digest(self) -> str:
        return self.failure or effects_digest(self.effects)

    @property
    def same(self) -> bool:
        return self.digest == self.recorded

    def line(self) -> str:
        """Return the effects as one line of JSON."""
        head = {"segment": self.segment, "step": self.step, "at_ns": self.at_ns}
        return codec.dumps({**head, "effects": msgspec.Raw(codec.listed(self.effects))}).decode()


@dataclass(frozen=True)
class Ending:
    """The end of a process whose core, effect or ownership raised, as its journal records it."""

    segment: str
    step: int
    at_ns: int
    raised: str
    on: str
    by_core: bool
    obstacle: str = ""
    """Why the exception of the core cannot be reproduced."""

    @property
    def is_reproducible(self) -> bool:
        """True if a replay raises it, unless an earlier step differs."""
        return self.by_core and not self.obstacle

    def sentence(self) -> str:
        """Return what raised, and whether a replay reproduces it."""
        if not self.by_core:
            return f"{self.segment}: after step {self.step} {self.on} raised {self.raised}, which a replay cannot show"
        end = f"; {self.obstacle}, so it cannot be reproduced" if self.obstacle else ", as it did then"
        return f"{self.segment}: the core raised {self.raised} at step {self.step} ({self.on}){end}"


@dataclass
class Summary:
    """The result of a replay. `notes` are for people: a cut-off line, missing steps, a journal of another version."""

    segments: int = 0
    steps: int = 0
    difference: Replayed | None = None
    notes: list[str] = field(default_factory=list)
    endings: list[Ending] = field(default_factory=list)
    next_step: int | None = None
    """The number after that of the last replayed step."""


class SegmentFile:
    """One segment, opened for a replay. Raises Misused if the file is no valid segment.

    A segment may come from a stranger: of the policies that it names as `package.module:Class`, only the `allowed` ones
    and those of installed plug-ins are imported.
    """

    def __init__(self, path: Path, allowed: Container[str] = ()) -> None:
        self.path = path
        self.cut_off = False
        """The last line is incomplete. Known once all steps were replayed."""
        self.ending: Ending | None = None
        """Why the process ended, if the journal says so. Known once all steps were replayed."""
        self._file = _lines_of(path)
        self._lines = enumerate(self._file, 1)
        self._number = 0
        """The number of the line that was read last."""
        try:
            self.header = self._read_header()
            self.core = self._restored(allowed)
        except Misused:
            self._file.close()
            raise

    @property
    def version(self) -> str:
        return str(self.header.get("version", ""))

    def steps(self) -> Iterator[Replayed]:
        """Replay and yield each recorded step. Ends after a step in which the core raised."""
        with closing(self._file):
            yield from self._steps()

    def _steps(self) -> Iterator[Replayed]:
        for step, record in enumerate(self._records(), self.header["first_step"]):
            if "raised" in record:
                self.ending = self._ending(step, record)
                if self.ending.is_reproducible:
                    yield self._replayed(step, record, self._decoded(step, record, "raised"))
                return
            replayed = self._replayed(step, record, self._decoded(step, record, "effects"))
            yield replayed
            if replayed.failure:
                return

    def _ending(self, next_step: int, record: dict[str, Any]) -> Ending:
        try:
            place = (self.path.name, record["step"], record["at"], record["raised"])
            if "effect" in record:
                effect = record["effect"]
                return Ending(*place, f"carrying out {effect['!'] if effect else 'an effect'}", False)
            if "event" not in record:
                return Ending(*place, f"ownership, on {record['ownership']},", False)
            event, left_out = record["event"], record["step"] - next_step
            if event is None:
                return Ending(*place, "an event", True, "its event could not be encoded")
            obstacle = f"the journal lacks {left_out} step{'s' if left_out > 1 else ''} before it" if left_out else ""
            return Ending(*place, event["!"], True, obstacle)
        except (KeyError, TypeError) as error:
            raise self._bad(f"line {self._number}, its record of the end of its process, is incomplete") from error

    def _replayed(self, step: int, record: dict[str, Any], event: Event) -> Replayed:
        place = (self.path.name, step, record["at"], event)
        raised = "raised" in record
        recorded = record["raised" if raised else "effects"]
        try:
            effects = self.core.step(event, record["at"])
        except Exception as error:  # noqa: BLE001 — whatever the core raises here is the difference to report
            return Replayed(*place, (), recorded, raised, describe(error))
        return Replayed(*place, effects, recorded, raised)

    def _decoded(self, step: int, record: dict[str, Any], outcome: str) -> Event:
        """Return a record's event. Raises Misused unless its time and its outcome are such, too."""
        where = f"line {self._number}, step {step},"
        if not checked.is_time(record.get("at")) or not isinstance(record.get(outcome), str):
            raise self._bad(f'{where} lacks "at" or "{outcome}"')
        try:
            return checked.event_of(record.get("event"))
        except ValueError as error:
            raise self._bad(f"{where} holds an event that this version does not know ({error})") from error

    def _read_header(self) -> dict[str, Any]:
        header = next(self._records(), None)
        if header is None or "journal" not in header:
            raise self._bad('it does not begin as a journal segment does ({"journal": …)')
        if header["journal"] != FORMAT:
            raise self._bad(
                f"its format is {header['journal']} and this version reads {FORMAT}; "
                f"replay it with lora-sidecar {header.get('version', 'of its time')}"
            )
        missing = [name for name in ("first_step", "config", "state") if name not in header]
        if missing:
            raise self._bad(f"its first line lacks {', '.join(missing)}")
        if not isinstance(header["first_step"], int) or not isinstance(header["state"], dict):
            raise self._bad("its first line has a first_step that is no number, or a state that is no record")
        return header

    def _restored(self, allowed: Container[str]) -> Core:
        try:
            return checked.core_of(self.header["state"], self._large_fields(), allowed)
        except Misused as error:
            raise Misused(error.reason, _cannot(self.path, error.message)) from error
        except ValueError as error:
            raise self._bad(f"its state is one that this version does not know ({error})") from error

    def _large_fields(self) -> dict[str, list[Any]]:
        fields: dict[str, list[Any]] = {}
        for record in self._records():
            if "complete" in record:
                return fields
            if record.get("field") not in LARGE or not isinstance(record.get("items"), list):
                break
            fields.setdefault(record["field"], []).extend(record["items"])
        raise self._bad(f"its state is cut off at line {self._number}")

    def _records(self) -> Iterator[dict[str, Any]]:
        for number, line in self._lines:
            self._number = number
            if not line.endswith(b"\n"):
                self.cut_off = True
                return
            try:
                record = codec.loads(line)
            except (ValueError, RecursionError) as error:
                raise self._bad(f"line {self._number} is not JSON") from error
            if not isinstance(record, dict):
                raise self._bad(f"line {self._number} is not a record")
            yield record

    def _bad(self, problem: str) -> Misused:
        return _not_a_segment(self.path, problem)


def _lines_of(path: Path) -> Generator[bytes, None, None]:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise _not_a_segment(path, error.strerror or str(error)) from error


def _not_a_segment(path: Path, problem: str) -> Misused:
    return Misused(Reason.NOT_A_JOURNAL, _cannot(path, problem))


def _cannot(path: Path, problem: str) -> str:
    return f"{path} cannot be replayed: {problem}"


def segments_of(path: Path) -> list[Path]:
    """Return a segment file itself, or all segments of a journal's directory, oldest first."""
    if not path.is_dir():
        return [path]
    found = segment_paths(path) or segment_paths(path / "journal")
    if not found:
        raise _not_a_segment(path, "there is no segment-*.jsonl in it")
    return found


def replay(path: Path, summary: Summary | None = None, allowed: Container[str] = ()) -> Generator[Replayed, None, None]:
    """Yield every replayed step of a segment file, a journal's directory, a data directory or an incident archive.

    A difference does not end the replay: the caller decides. `summary` is kept up to date and records the first
    difference; `allowed` is what SegmentFile takes. Raises Misused for a file that is no segment, or that this version
    cannot read. An archive is unpacked while the iterator is open.
    """
    with opened(path) as journal:
        yield from _replay(segments_of(journal), summary if summary is not None else Summary(), allowed)


def _replay(paths: Sequence[Path], summary: Summary, allowed: Container[str]) -> Iterator[Replayed]:
    for segment_path in paths:
        segment = SegmentFile(segment_path, allowed)
        summary.segments += 1
        if segment.version != product_version():
            summary.notes.append(
                f"{segment_path.name} was written by version {segment.version}, this is {product_version()}"
            )
        _note_left_out(summary, segment)
        for step in segment.steps():
            summary.steps += 1
            summary.next_step = step.step + 1
            if summary.difference is None and not step.same:
                summary.difference = step
            yield step
        if segment.ending is not None:
            summary.endings.append(segment.ending)
        if segment.cut_off:
            summary.notes.append(f"{segment_path.name}: its last line was cut off and is left out")


def _note_left_out(summary: Summary, segment: SegmentFile) -> None:
    """Note the steps that are missing before a segment. One that counts from lower numbers is of another process."""
    first, expected = segment.header["first_step"], summary.next_step
    if expected is not None and first > expected:
        steps = f"step {expected} is" if first == expected + 1 else f"steps {expected} to {first - 1} are"
        summary.notes.append(f"{segment.path.name}: {steps} not in the journal")
    summary.next_step = first


def run(
    path: Path,
    show_effects: bool,
    as_json: bool,
    write: Callable[[str], None],
    tell: Callable[[str], None],
    allowed: Container[str] = (),
) -> int:
    """Replay and report, as `sidecar replay` does; return the exit code.

    0: the same. `CRASHED_EXIT`: the same up to an exception of the core that was raised again. 1: a difference, or an
    exception that could not be reproduced.

    `write` takes result lines; with `show_effects` one line of JSON per step. `tell` takes notes for people. The
    verdict goes to `write` unless effects go there. `allowed` is what SegmentFile takes.
    """
    summary = Summary()
    with closing(replay(path, summary, allowed)) as steps:
        for step in steps:
            if show_effects:
                write(step.line())
            if summary.difference is not None:
                break
    verdict = json.dumps(_verdict(summary)) if as_json else _sentence(summary)
    for note in summary.notes:
        tell(note)
    (tell if show_effects else write)(verdict)
    if summary.difference is not None or any(ending.obstacle for ending in summary.endings):
        return 1
    return CRASHED_EXIT if any(ending.is_reproducible for ending in summary.endings) else 0


def _verdict(summary: Summary) -> dict[str, Any]:
    different = summary.difference
    return {
        "same": different is None,
        "segments": summary.segments,
        "steps": summary.steps,
        "notes": summary.notes,
        "raised": [
            {
                "segment": ending.segment,
                "step": ending.step,
                "at_ns": ending.at_ns,
                "on": ending.on,
                "raised": ending.raised,
                "again": ending.is_reproducible,
                "obstacle": ending.obstacle,
            }
            for ending in summary.endings
        ],
        "difference": different
        and {
            "segment": different.segment,
            "step": different.step,
            "at_ns": different.at_ns,
            "event": codec.loads(codec.named(different.event)),
            "expected": different.recorded,
            "actual": different.digest,
        },
    }


def _sentence(summary: Summary) -> str:
    different = summary.difference
    if different is None:
        plural = "" if summary.segments == 1 else "s"
        steps = summary.steps - sum(ending.is_reproducible for ending in summary.endings)
        same = f"{steps} steps in {summary.segments} segment{plural} gave the recorded effects, byte for byte"
        return "\n".join([same, *(ending.sentence() for ending in summary.endings)])
    actual = f"the core raised {different.failure}" if different.failure else f"actual {different.digest}"
    expected = f"it raised {different.recorded} then" if different.raised else f"effects expected {different.recorded}"
    return (
        f"{different.segment}: step {different.step} ({type(different.event).__name__}) differs: {expected}, "
        f"{actual}; the {summary.steps - 1} steps before it were the same"
    )
