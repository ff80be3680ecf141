"""Run the commands of the documentation, page by page, as a reader would.

A page's blocks run in order in one shell, in a copy of the repository; only the environments (`.venv*`) are links. Each
command of a pipe must succeed. Where the system allows it, the blocks run in their own network namespace, so that ports
are free and nothing is fetched. A block that cannot run gives the reason in a comment before it:
`<!-- not run: needs a GPU -->`. A block after `<!-- file: NAME -->` is written to that file. A page with a block that
is not understood does not run.

What a `console` block shows below its commands must be what they print. In it "…" stands for any text, and lines may be
folded.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tools.docs.pages import COMMANDS, ROOT, Block, blocks, named, pages

PAGE_TIMEOUT_S = 900
OUTPUT_LINES = 40
NOT_READ = ("CHANGELOG.md",)
"""Pages about earlier releases."""
NOT_COPIED = (".git", ".hypothesis", ".mypy_cache", ".ruff_cache", ".pytest_cache", "build", "dist")


def run(chosen: Sequence[Path] = ()) -> int:
    """Run the chosen pages, or all of them. Return 1 if a command failed, 2 if there is no such page."""
    missing = [page for page in chosen if not page.is_file()]
    for page in missing:
        print(f"{named(page)}: there is no such page", file=sys.stderr)
    if missing:
        return 2
    failed = ran = skipped = 0
    for page in chosen or [page for page in pages() if page not in [ROOT / name for name in NOT_READ]]:
        among = list(blocks(page))
        to_run = [block for block in among if block.runs]
        faults = [f"{block.at}: {block.fault}" for block in among if block.fault]
        for fault in faults:
            print(f"FAILED   {fault}", file=sys.stderr, flush=True)
        if faults:
            failed += 1
            continue
        for block in among:
            if block.language in COMMANDS and block.marker == "not run":
                print(f"skipped  {block.at}: {block.value}", flush=True)
                skipped += 1
        if to_run:
            done = _run_page([block for block in among if block.runs or block.marker == "file"], len(to_run))
            ran += done
            failed += done < len(to_run)
    print(f"{ran} blocks ran, {skipped} were skipped, {failed} pages failed")
    return 1 if failed else 0


def _run_page(among: Sequence[Block], count: int) -> int:
    """Run the blocks of one page; return how many succeeded."""
    with tempfile.TemporaryDirectory(prefix="docs-") as folder:
        sandbox = Path(folder)
        _copy_repository(sandbox)
        script = _script(among, sandbox)
        output = sandbox / ".output"
        done = _watch(script, output, sandbox, [block for block in among if block.runs])
        if done < count:
            print("".join(output.read_text(errors="replace").splitlines(keepends=True)[-OUTPUT_LINES:]))
    return done


def _printed(sandbox: Path, block: Block) -> Path:
    """Return the file of what a block's commands print, if it shows that."""
    return sandbox / ".blocks" / f"{block.line}.printed"


def _shows(block: Block, printed: str) -> bool:
    """Return True if what a block shows is what was printed."""
    parts = [re.escape("".join(part.split())) for part in block.shown.split("…")]
    return re.fullmatch(".*?".join(parts), "".join(printed.split())) is not None


def _copy_repository(sandbox: Path) -> None:
    """Copy the repository's files, so that no page changes them; environments are too large for that."""
    for entry in ROOT.iterdir():
        if entry.name.startswith(".venv"):
            (sandbox / entry.name).symlink_to(entry)
        elif entry.name in NOT_COPIED:
            continue
        elif entry.is_dir():
            shutil.copytree(entry, sandbox / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, sandbox)


def _script(among: Sequence[Block], sandbox: Path) -> Path:
    lines = ["set -e -o pipefail", *(["ip link set lo up"] if _isolates() else [])]
    texts = sandbox / ".blocks"
    texts.mkdir()
    for block in among:
        text = texts / str(block.line)
        text.write_text(block.text if block.marker == "file" else block.commands)
        if block.marker == "file":
            lines.append(f"cp {text} {shlex.quote(block.value)}")
        else:
            lines.append(f". {text}{f' > {_printed(sandbox, block)} 2>&1' if block.shown else ''}; echo >&3")
    script = texts / "script"
    script.write_text("\n".join(lines) + "\n")
    return script


def _watch(script: Path, output: Path, sandbox: Path, among: Sequence[Block]) -> int:
    """Run a script and print each block as it ends; a block that has succeeded writes one line into a pipe."""
    reading, writing = os.pipe()
    isolation = ["unshare", "--map-root-user", "--net"] if _isolates() else []
    command = [*isolation, "bash", "-c", f"exec 3>&{writing}; . {script}"]
    with output.open("wb") as log:
        process = subprocess.Popen(
            command, cwd=sandbox, stdout=log, stderr=log, stdin=subprocess.DEVNULL, pass_fds=[writing],
            start_new_session=True,
        )  # fmt: skip
    os.close(writing)
    done, began = 0, time.monotonic()
    deadline = began + PAGE_TIMEOUT_S
    os.set_blocking(reading, False)
    try:
        while done < len(among):
            ended = process.poll() is not None
            told = _read(reading).count(b"\n")
            for block in among[done : done + told]:
                printed = _printed(sandbox, block)
                if block.shown and not _shows(block, printed.read_text(errors="replace")):
                    print(f"FAILED   {block.at}: it prints\n{printed.read_text()}", file=sys.stderr, flush=True)
                    return done
                print(f"ran      {block.at} ({time.monotonic() - began:.1f} s)", flush=True)
                done += 1
            if not told and (ended or time.monotonic() > deadline):
                why = f"exit {process.returncode}" if ended else f"not done after {PAGE_TIMEOUT_S} s"
                printed = _printed(sandbox, among[done])
                said = f"; it prints\n{printed.read_text(errors='replace')}" if printed.exists() else ""
                print(f"FAILED   {among[done].at}: {why}{said}", file=sys.stderr, flush=True)
                break
            time.sleep(0.05)
    finally:
        os.close(reading)
        _end(process)
    return done


def _read(pipe: int) -> bytes:
    try:
        return os.read(pipe, 4096)
    except BlockingIOError:
        return b""


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the shell and the processes that it left running: SIGTERM first, then SIGKILL."""
    for end in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, end)
        except ProcessLookupError:
            break
        for _ in range(100):
            if process.poll() is not None and not _group_lives(process.pid):
                break
            time.sleep(0.05)
    process.wait()


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _isolates() -> bool:
    """Return True if the system allows a network namespace."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    return subprocess.run(["unshare", "--map-root-user", "--net", "true"], capture_output=True).returncode == 0
