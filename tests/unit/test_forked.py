"""Processes that are forked behave as those that the interpreter starts."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest

from tests.kit.forked import Popen, _address, python


async def test_streams_arguments_and_status() -> None:
    program = "import sys; print(sys.argv, input()); print('no', file=sys.stderr); sys.exit(7)"
    process = await python("-c", program, "a", stdin=PIPE, stdout=PIPE, stderr=PIPE)
    assert process.stdin is not None
    process.stdin.write(b"b\n")
    assert await process.communicate() == (b"['-c', 'a'] b\n", b"no\n")
    assert process.returncode == 7


async def test_its_own_environment_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program = "import json, os; print(json.dumps([os.getcwd(), dict(os.environ)]))"
    out, _ = await (await python("-c", program, stdout=PIPE, env={"ONLY": "this"})).communicate()
    assert json.loads(out) == [str(tmp_path), {"ONLY": "this"}]


async def test_a_signal_ends_it() -> None:
    process = await python("-c", "print(1, flush=True); import time; time.sleep(600)", stdout=PIPE)
    assert process.stdout is not None
    await process.stdout.readline()
    process.kill()
    assert await process.wait() == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        process.terminate()
    process.close()


async def test_an_error_is_told_and_is_one() -> None:
    process = await python("-c", "1/0", stderr=PIPE)
    _, error = await process.communicate()
    assert process.returncode == 1
    assert error.rstrip().endswith(b"ZeroDivisionError: division by zero")


async def test_it_ends_after_its_threads_and_exit_handlers() -> None:
    program = (
        "import atexit, sys, threading, time\natexit.register(print, 'handler')\n"
        "threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()\nsys.exit(3)"
    )
    process = await python("-c", program, stdout=PIPE)
    assert await process.communicate() == (b"thread\nhandler\n", b"")
    assert process.returncode == 3


async def test_a_text_to_exit_with_is_told() -> None:
    process = await python("-c", "import sys; sys.exit('why')", stderr=PIPE)
    assert await process.communicate() == (b"", b"why\n")
    assert process.returncode == 1


async def test_a_module_runs_as_main() -> None:
    out, _ = await (await python("-m", "sidecar", "--version", stdout=PIPE)).communicate()
    assert out.startswith(b"lora-sidecar ")


def test_as_a_popen() -> None:
    """What callers of `subprocess.Popen` use is there: streams as text, waiting with a bound, signals, status."""
    program = "import os, sys; print(os.getsid(0) == os.getpid(), flush=True); print(input(), file=sys.stderr); input()"
    with Popen(
        (sys.executable, "-c", program), stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate("b\n", timeout=0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL == process.poll()
    with Popen((sys.executable, "-c", "print(input()); exit(3)"), stdin=PIPE, stdout=PIPE, text=True) as process:
        assert process.communicate("c\n") == ("c\n", None)
    assert process.returncode == 3


def test_it_starts_whatever_started_this_process() -> None:
    """Benches and soaks have no conftest, which keeps numpy from starting threads."""
    program = "from tests.kit.forked import _address; print(_address())"
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_who_connects_and_asks_later_keeps_nobody_waiting() -> None:
    """Garbage may be collected between the two, and wait for the end of another process."""
    with socket.socket(socket.AF_UNIX) as late, socket.socket(socket.AF_UNIX) as gone:
        for link in (late, gone):
            link.connect(_address())
        gone.close()
        assert Popen([sys.executable, "-c", "pass"]).wait(60) == 0
