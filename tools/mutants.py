"""Measure which faults a room's tests detect: plant small faults in its code, one at a time, and run the tests.

    python -m tools.mutants --write before.json                 40 mutants a room, 200 in all
    python -m tools.mutants --like before.json --compare before.json --write after.json
    python -m tools.mutants --room core --per-room 5 --list     name them only

Which mutants: all of a room's sources (ROOMS, below) are enumerated by `tools.mutating`, and those are taken whose id
hashes lowest with --seed. So a sample stays as it is when code elsewhere changes or files move: an id is the room, the
function, the operator, the expression before and after, and an ordinal; no file and no line. --like FILE takes the
mutants of an earlier run instead, and says which of them are gone. --words FILE is a JSON object of identifiers that
were renamed since, {"old": "new"}, by which ids of --like and --compare are translated.

Which tests: those of SUITES in the room, or the globs of --tests; with --suite after only those that `make test` runs.
--tree DIR has source and tests, this repository by default; --tests-from DIR takes the folder `tests` from another one,
so that the same mutants meet other tests.

How: in copies of the tree, one for each of --jobs, never in place. First the room's tests run as they are: they must
pass. By `tools.reach` that run says how long each test takes and which functions each file calls. A mutant meets the
files that call its function, the quickest first, until a test fails; one outside of functions, or in a function that
no test calls in its own process, meets all of them. A test that takes more than three times the CPU time that it took,
and five seconds, ends the run; so does one that takes three times as long by the clock, and half a minute. That is a
timeout, and counts as killed. On a machine that is busy with other things the clock may lie: look at who timed out.

Printed: a table by room and each survivor with file:line and what was changed. --write has everything as JSON, also by
which test each mutant was killed. --compare FILE lists the survivors that FILE killed or did not have.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tools.mutating import Mutant, apply, mutants_of, numbered
from tools.reach import TIMEOUT, instrumented, limit_s

ROOMS: dict[str, tuple[str, ...]] = {
    "core": ("sidecar/core/*.py",),
    "ordering": ("policies/ordering/*.py",),
    "packing": tuple(
        f"sidecar/adapters/{name}.py"
        for name in (
            "packed",
            "rows",
            "cast",
            "balance",
            "writing",
            "layout",
            "buffers",
            "builder",
            "values",
            "convert",
        )
    ),
    "kserve": (
        "sidecar/fronts/kserve/structure.py",
        "sidecar/fronts/kserve_structure.py",
        "sidecar/fronts/kserve/tensors.py",
        "sidecar/fronts/kserve_tensors.py",
        "sidecar/fronts/kserve/parameters.py",
        "sidecar/fronts/kserve_parameters.py",
        "sidecar/fronts/kserve/request.py",
        "sidecar/fronts/kserve_request.py",
        "sidecar/fronts/message_fields.py",
        "sidecar/fronts/checked_messages.py",
    ),
    "ownership": ("sidecar/ownership/*.py",),
}
"""The sources of each room. A file that is not there is passed over; a room without any is an error."""

SUITES: dict[str, dict[str, tuple[str, ...]]] = {
    "before": {
        "core": (
            "tests/unit/test_core_*.py",
            "tests/unit/test_places.py",
            "tests/unit/test_prefetch_*.py",
            "tests/unit/test_queries.py",
            "tests/unit/test_explain*.py",
            "tests/unit/test_suspicion.py",
            "tests/properties/test_core_world.py",
            "tests/properties/test_store_index.py",
            "tests/properties/test_state_copies.py",
            "tests/properties/test_codec.py",
        ),
        "ordering": (
            "tests/unit/test_ordering_policies.py",
            "tests/unit/test_core_promises.py",
            "tests/properties/test_shares.py",
            "tests/conformance/test_policies.py",
        ),
        "packing": (
            "tests/unit/test_adapters_*.py",
            "tests/properties/test_packing.py",
            "tests/properties/test_balance.py",
            "tests/golden/test_peft.py",
        ),
        "kserve": (
            "tests/unit/test_kserve_*.py",
            "tests/integration/test_kserve_requests.py",
            "tests/integration/test_kserve_rules.py",
            "tests/integration/test_kserve_errors.py",
            "tests/integration/test_kserve_tenants.py",
            "tests/attack/test_small_fields.py",
            "tests/attack/test_two_readings.py",
            "tests/attack/test_words_beside_the_request.py",
            "tests/attack/test_words_without_end.py",
        ),
        "ownership": (
            "tests/unit/test_ownership.py",
            "tests/sim/ownership/test_ownership.py",
            "tests/worlds/ownership/test_ownership.py",
        ),
    },
}
"""The tests of each room, before and after they were made quicker."""
SUITES["after"] = SUITES["before"] | {}
MARKS = {"before": "", "after": "not slow"}
"""Which tests of those files: all, or those of `make test`."""

HERE = Path(__file__).parents[1]
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


@dataclass
class Result:
    """The outcome of a mutant: "killed", "timeout" or "survived", and the test that killed it."""

    mutant: Mutant
    outcome: str
    seconds: float
    by: str = ""

    def record(self) -> dict[str, Any]:
        place = {name: value for name, value in asdict(self.mutant).items() if name not in ("start", "end", "text")}
        return {
            "id": self.mutant.id,
            **place,
            "outcome": self.outcome,
            "seconds": round(self.seconds, 2),
            "by": self.by,
        }


@dataclass
class Reach:
    """What a room's tests take and call: seconds by test file, and test files by function ("path:line"); and the record
    of it that `tools.reach` wrote.
    """

    seconds: dict[str, float]
    files: dict[str, set[str]]
    record: str

    def of(self, mutant: Mutant) -> list[str]:
        """Return the test files for a mutant, the quickest first."""
        known = self.files.get(f"{mutant.file}:{mutant.defined}", set()) if mutant.defined else set()
        return sorted(known or self.seconds, key=self.seconds.__getitem__)


class Tree:
    """A copy of a tree in which tests run; `close` removes it."""

    def __init__(self, tree: Path, tests_from: Path | None, marks: str = "") -> None:
        self._marks = ("-m", marks) if marks else ()
        self._folder = Path(tempfile.mkdtemp(prefix="mutants-"))
        self.reached = self._folder / "reach.json"
        self.path = self._folder / "tree"
        _copy(tree, self.path, "" if tests_from is None else "tests/")
        if tests_from is not None:
            _copy(tests_from, self.path, "", "tests/")

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def find(self, globs: Iterable[str]) -> list[str]:
        found = [str(path.relative_to(self.path)) for pattern in globs for path in sorted(self.path.glob(pattern))]
        return list(dict.fromkeys(found))

    def run(self, files: Sequence[str], within_s: float | None = None, *more: str) -> tuple[int | None, str]:
        """Run tests; return pytest's exit code, None at the limit, and what it printed. `more` are options."""
        shutil.rmtree(self.path / ".hypothesis", ignore_errors=True)  # a failure that is remembered would help the next
        paths = os.pathsep.join((str(self.path), str(HERE)))
        environment = os.environ | {
            "PYTHONPATH": paths,
            "REACH_FILE" if within_s is None else "LIMITS": str(self.reached),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=no", "-rfE"]
        command += ["--hypothesis-seed=0", f"--basetemp={self._folder / 'tmp'}"]
        process = subprocess.Popen(
            [*command, *self._marks, *more, *files],
            cwd=self.path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            text, _ = process.communicate(timeout=within_s)
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            _end_group(process)
        return process.returncode, text

    def reach(self, room: str, sources: Sequence[str], files: Sequence[str], say: Callable[[str], None]) -> Reach:
        """Run a room's tests on instrumented sources. Raises SystemExit when they fail without any mutant."""
        plain = {source: (self.path / source).read_text() for source in sources}
        try:
            for source, text in plain.items():
                (self.path / source).write_text(instrumented(text, source))
            code, told = self.run(files, None, "-p", "tools.reach")
        finally:
            for source, text in plain.items():
                (self.path / source).write_text(text)
                _forget(self.path / source)
        if code != 0:
            failed = ", ".join(FAILED.findall(told))
            say(f"{room}: with instrumented sources these fail: {failed or told}")
            code, told = self.run(files)
            if code != 0:
                raise SystemExit(f"the tests of {room} fail without any mutant:\n{told}")
        record = json.loads(self.reached.read_text())
        seconds = dict.fromkeys(files, 0.0)
        for test, (took, _) in record["seconds"].items():
            seconds[test.partition("::")[0]] += took
        called: dict[str, set[str]] = {}
        for file, functions in record["functions"].items():
            for function in functions:
                called.setdefault(function, set()).add(file)
        say(f"{room}: {len(files)} test files take {sum(seconds.values()):.1f} s")
        return Reach(seconds, called, self.reached.read_text())

    def meet(self, mutant: Mutant, reach: Reach) -> Result:
        """Plant a mutant, run tests, and put the source back."""
        files = reach.of(mutant)
        self.reached.write_text(reach.record)
        path = self.path / mutant.file
        source = path.read_text()
        path.write_text(apply(source, mutant))
        _forget(path)
        started = time.monotonic()
        try:
            code, text = self.run(files, limit_s(sum(reach.seconds[file] for file in files)), "-x", "-p", "tools.reach")
        finally:
            path.write_text(source)
            _forget(path)
        seconds = time.monotonic() - started
        if code in (None, TIMEOUT):
            return Result(mutant, "timeout", seconds)
        if code == 0:
            return Result(mutant, "survived", seconds)
        if code not in (1, 2, 3, 4):  # failed, interrupted by an error at import, broke, a conftest that does not load
            raise SystemExit(f"pytest ended with {code} for {mutant.id}:\n{text}")
        failed = FAILED.search(text)
        return Result(mutant, "killed", seconds, failed[1] if failed else text.strip().splitlines()[-1])


def _forget(path: Path) -> None:
    """Remove a source's compiled file, which Python would reuse for a new source of the same second and size."""
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()


def _copy(tree: Path, into: Path, without: str = "", only: str = "") -> None:
    """Copy the files that git tracks or would."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=tree, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in names:
        source = tree / name
        if name.startswith(only) and not (without and name.startswith(without)) and source.is_file():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, into / name)


def _end_group(process: subprocess.Popen[str]) -> None:
    """End a run and the processes that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def all_mutants(tree: Path, rooms: Iterable[str]) -> list[Mutant]:
    """Return every mutant of some rooms. Raises SystemExit for a room without sources."""
    found = []
    for room in rooms:
        paths = [path for pattern in ROOMS[room] for path in sorted(tree.glob(pattern))]
        if not paths:
            raise SystemExit(f"room {room}: there is no file {', '.join(ROOMS[room])}")
        for path in paths:
            found += mutants_of(path.read_text(), room, str(path.relative_to(tree)))
    return numbered(found)


def sample(mutants: Iterable[Mutant], seed: int, per_room: int) -> list[Mutant]:
    """Return the mutants of each room whose ids hash lowest."""
    taken = Counter[str]()
    found = []
    for mutant in sorted(mutants, key=lambda mutant: hashlib.sha256(f"{seed} {mutant.id}".encode()).digest()):
        if taken[mutant.room] < per_room:
            taken[mutant.room] += 1
            found.append(mutant)
    return sorted(
        found, key=lambda mutant: (list(ROOMS).index(mutant.room), mutant.file, mutant.start, mutant.operator)
    )


def renamed(id_: str, words: Mapping[str, str]) -> str:
    return re.sub(r"\w+", lambda match: words.get(match[0], match[0]), id_)


def run(
    mutants: Sequence[Mutant], trees: Sequence[Tree], suite: Mapping[str, Sequence[str]], say: Callable[[str], None]
) -> list[Result]:
    """Run each mutant against its room's tests."""
    reaches = {}
    for room in dict.fromkeys(mutant.room for mutant in mutants):
        files = trees[0].find(suite[room])
        if not files:
            raise SystemExit(f"room {room}: there is no test file {', '.join(suite[room])}")
        reaches[room] = trees[0].reach(room, trees[0].find(ROOMS[room]), files, say)
    free = SimpleQueue[Tree]()
    for tree in trees:
        free.put(tree)

    def meet(mutant: Mutant) -> Result:
        tree = free.get()
        try:
            result = tree.meet(mutant, reaches[mutant.room])
        finally:
            free.put(tree)
        say(f"{result.outcome:9}{result.seconds:6.1f} s  {_place(mutant)} {mutant.operator}")
        return result

    with ThreadPoolExecutor(len(trees)) as pool:
        return list(pool.map(meet, mutants))


def _place(mutant: Mutant) -> str:
    return f"{mutant.file}:{mutant.line} {mutant.function}"


def tell(results: Sequence[Result]) -> None:
    print(f"\n{'room':12}{'mutants':>8}{'killed':>8}{'timeout':>8}{'survived':>9}{'seconds':>9}")
    rooms = [*dict.fromkeys(result.mutant.room for result in results), ""]
    for room in rooms:
        here = [result for result in results if room in ("", result.mutant.room)]
        counts = Counter(result.outcome for result in here)
        seconds = sum(result.seconds for result in here)
        row = f"{len(here):8}{counts['killed']:8}{counts['timeout']:8}{counts['survived']:9}{seconds:9.0f}"
        print(f"{room or 'total':12}{row}")
    print()
    for result in results:
        if result.outcome == "survived":
            tell_of(result.mutant)


def tell_of(mutant: Mutant) -> None:
    print(f"{_place(mutant)}: {mutant.operator}\n    - {mutant.before}\n    + {mutant.after}")


def compare(results: Sequence[Result], other: Mapping[str, Any], words: Mapping[str, str]) -> int:
    """Print the survivors that an earlier run killed or did not have; return their number."""
    before = {renamed(record["id"], words): record for record in other["mutants"]}
    survivors = [result for result in results if result.outcome == "survived"]
    new = [result for result in survivors if before.get(result.mutant.id, {}).get("outcome") != "survived"]
    print(f"new survivors: {len(new)}")
    for result in new:
        record = before.get(result.mutant.id)
        print(f"was {record['outcome']} by {record['by']}" if record else "was not in the other run")
        tell_of(result.mutant)
    known = {result.mutant.id: result.outcome for result in results}
    killed_now = [
        id_
        for id_, record in before.items()
        if record["outcome"] == "survived" and known.get(id_, "") in ("killed", "timeout")
    ]
    print(f"survived then and are killed now: {len(killed_now)}; not run now: {len(before.keys() - known.keys())}")
    return len(new)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Plant faults and see whether tests notice.")
    parser.add_argument("--room", action="append", choices=list(ROOMS), help="one room; repeat it (default: all)")
    parser.add_argument("--per-room", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--suite", choices=list(SUITES), default="after")
    parser.add_argument("--tests", nargs="+", metavar="GLOB", help="test files in place of the suite's, for all rooms")
    parser.add_argument("--tree", type=Path, default=HERE, metavar="DIR")
    parser.add_argument("--tests-from", type=Path, metavar="DIR")
    parser.add_argument("--like", type=Path, metavar="FILE", help="the mutants of an earlier run")
    parser.add_argument("--words", type=Path, metavar="FILE", help="identifiers that were renamed since")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="exit 1 if there are new survivors")
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--list", action="store_true", help="name the mutants and run none")
    return parser.parse_args()


def _chosen(options: argparse.Namespace, words: Mapping[str, str]) -> list[Mutant]:
    mutants = all_mutants(options.tree, options.room or ROOMS)
    if options.like is None:
        return sample(mutants, options.seed, options.per_room)
    records = [one for one in json.loads(options.like.read_text())["mutants"] if one["room"] in (options.room or ROOMS)]
    wanted = [renamed(record["id"], words) for record in records]
    known = {mutant.id: mutant for mutant in mutants}
    for id_ in wanted:
        if id_ not in known:
            print(f"gone: {id_}")
    return [known[id_] for id_ in wanted if id_ in known]


def _ended(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    signal.signal(signal.SIGTERM, _ended)  # so that copies and tests that run do not stay behind
    options = _options()
    words = json.loads(options.words.read_text()) if options.words is not None else {}
    mutants = _chosen(options, words)
    if options.list:
        for mutant in mutants:
            tell_of(mutant)
        return 0
    suite = {room: options.tests or SUITES[options.suite][room] for room in ROOMS}
    trees = [
        Tree(options.tree, options.tests_from, "" if options.tests else MARKS[options.suite])
        for _ in range(options.jobs)
    ]
    started = time.monotonic()
    try:
        results = run(mutants, trees, suite, lambda line: print(line, file=sys.stderr, flush=True))
    finally:
        for tree in trees:
            tree.close()
    tell(results)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime
    print(f"\n{len(results)} mutants in {time.monotonic() - started:.0f} s, {cpu:.0f} s of CPU")
    if options.write is not None:
        record = {"seed": options.seed, "suite": options.suite, "mutants": [result.record() for result in results]}
        options.write.write_text(json.dumps(record, indent=1) + "\n")
    if options.compare is not None:
        return 1 if compare(results, json.loads(options.compare.read_text()), words) else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
