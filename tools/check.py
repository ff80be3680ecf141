"""Check what was edited, in half a minute: lint, types, and the tests that are nearest to it.

    python -m tools.check [--since COMMIT] [--seconds 20] [--list]

Edited is what differs from COMMIT, files that git does not know yet included; the default is HEAD, or the commit before
it when nothing differs from HEAD. Side by side run ruff on the edited files, the import contract, mypy with its cache,
and pytest: first the edited test files of any folder, then those of tests/unit that import an edited module, directly
or by way of others, the nearest first. After --seconds no further test begins, and the last line says how many
were left: `make test` runs them all.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("policies", "sidecar", "tests", "tools")
NEAREST = "tests.unit.test_"
FILES_MAX = 40
"""Each test file that is looked at has to be imported, whether its tests are reached in time or not."""


def edited(since: str | None) -> list[str]:
    """Return the paths of edited Python files, deleted ones included. Raises SystemExit for an unknown commit."""
    for commit in (since,) if since else ("HEAD", "HEAD~1"):
        found = _git("diff", "--name-only", commit, "--") + _git("ls-files", "--others", "--exclude-standard")
        if found:
            return [path for path in found if path.endswith(".py") and path.startswith(FOLDERS)]
    return []


def _git(*arguments: str) -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"git {arguments[0]}: {done.stderr.strip()}")
    return done.stdout.splitlines()


def tests_of(paths: Iterable[str], graph: grimp.ImportGraph) -> list[str]:
    """Return the test files to run for edited files, the nearest first.

    How near one is: the number of imports between it and an edited module, less one for each part of that module's name
    (the room, the module) that the test file's name has too.
    """
    front = [path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in paths]
    words = {word for name in front for word in re.split(r"[._]", name)}
    far = {name: -len(words) for name in front if _is_test(name)}
    seen, steps = set(front), 0
    while front:
        known = [name for name in front if name in graph.modules]
        front = sorted({each for name in known for each in graph.find_modules_that_directly_import(name)} - seen)
        seen.update(front)
        steps += 1
        for name in front:
            if name.startswith(NEAREST):
                far[name] = steps - len(words & set(name.removeprefix(NEAREST).split("_")))
    files = [f"{name.replace('.', '/')}.py" for name in sorted(far, key=far.__getitem__)]
    return [file for file in files if (ROOT / file).exists()][:FILES_MAX]


def _is_test(name: str) -> bool:
    return name.startswith("tests.") and name.rpartition(".")[2].startswith("test_") and ".e2e." not in name


class TimeBox:
    """A plugin that begins no test after a while."""

    def __init__(self, seconds: float) -> None:
        self.is_over = False
        self._until = time.monotonic() + seconds

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._session = session
        self._left = len(session.items)

    def pytest_runtest_logfinish(self) -> None:
        self._left -= 1
        if self._left and time.monotonic() > self._until:
            self.is_over = True
            self._session.shouldstop = f"the time is over, {self._left} tests were not run"


def _run(name: str, *command: str) -> tuple[str, int, str, float]:
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return name, done.returncode, done.stdout, time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description="Check what was edited.")
    parser.add_argument("--since", metavar="COMMIT")
    parser.add_argument("--seconds", type=float, default=20.0, help="when to begin no more tests")
    parser.add_argument("--list", action="store_true", help="name the test files and run nothing")
    options = parser.parse_args()
    began = time.monotonic()
    paths = edited(options.since)
    tests = tests_of(paths, grimp.build_graph(*FOLDERS, cache_dir=str(ROOT / ".import_linter_cache")))
    if options.list:
        print(*tests, sep="\n")
        return 0
    here = [path for path in paths if (ROOT / path).exists()]
    tools = Path(sys.executable).parent
    commands = {"import contract": ("lint-imports",), "types": ("mypy",)}
    if here:
        commands |= {"format": ("ruff", "format", "--check", *here), "lint": ("ruff", "check", *here)}
    with ThreadPoolExecutor(len(commands)) as pool:
        running = [pool.submit(_run, name, str(tools / command), *rest) for name, (command, *rest) in commands.items()]
        box = TimeBox(options.seconds)
        code = pytest.main([*tests, "-x"], plugins=[box]) if tests else pytest.ExitCode.OK
        results = [each.result() for each in running]
    failed = [] if code == pytest.ExitCode.OK or (box.is_over and code == pytest.ExitCode.INTERRUPTED) else ["tests"]
    for name, status, told, took in results:
        print(f"{name}: {'failed' if status else 'ok'}, {took:.1f} s")
        if status:
            failed.append(name)
            print(told)
    print(
        f"{len(paths)} edited files, {len(tests)} test files, {time.monotonic() - began:.0f} s:",
        ", ".join(failed) or "ok",
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
