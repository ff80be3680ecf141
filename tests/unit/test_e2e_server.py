"""A server that crashes while it starts, as Triton 24.10 does now and then: tried again, counted, but not for ever."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e import foreground
from tests.e2e.installed import ROOT
from tests.e2e.server import Server, StartFailed
from tests.e2e.triton import guard
from tests.e2e.triton.server import TritonServer
from tests.kit.serving import until

SERVER = """
import http.server, os, pathlib, sys
count = pathlib.Path(sys.argv[1])
starts = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(starts))
if starts <= int(sys.argv[2]):
    print(sys.argv[4], file=sys.stderr, flush=True)
    os.abort()
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[3])), Ready).serve_forever()
"""
ABORT = "terminate called after throwing an instance of 'boost::interprocess::lock_exception'"


class Crashing(Server):
    NAME = "crashing"
    START_S = 60.0
    PORTS = 1
    NOISE = re.compile(r"(?!)")
    CRASH = TritonServer.CRASH
    GUARD = guard

    def __init__(self, folder: Path, crashes: int, words: str = ABORT) -> None:
        super().__init__(folder, None)
        self._crashes_first = crashes
        self._words = words

    @property
    def starts(self) -> int:
        return int((self.folder / "starts").read_text())

    @property
    def _mark(self) -> str:
        return f"no_region_{os.getpid()}_"

    @property
    def _ready_url(self) -> str:
        return f"http://{self._address(0)}/"

    def _prepare(self) -> Path:
        return self.folder

    def _command(self) -> list[str]:
        assert self._ports is not None
        count, port = str(self.folder / "starts"), str(self._ports[0])
        return [sys.executable, "-c", SERVER, count, str(self._crashes_first), port, self._words]

    def _environment(self) -> dict[str, str]:
        return dict(os.environ)


@pytest.fixture(autouse=True)
def _counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "crashes", [])


async def test_a_known_crash_is_tried_again_and_counted(tmp_path: Path) -> None:
    """Twice aborted, then it serves; both are in the summary."""
    async with Crashing(tmp_path, 2) as server:
        assert server.starts == 3
        assert Server.crashes == [f"crashing: {ABORT[:-1]}"] * 2


async def test_one_that_never_starts_fails_with_its_log(tmp_path: Path) -> None:
    """It is not tried for ever."""
    server = Crashing(tmp_path, 99)
    with pytest.raises(StartFailed, match="lock_exception"):
        await server.start()
    assert server.starts == 3


async def test_any_other_crash_is_not_tried_again(tmp_path: Path) -> None:
    """A server that ends for another reason is what the tests are there to find."""
    server = Crashing(tmp_path, 1, "segmentation fault")
    with pytest.raises(StartFailed, match="segmentation fault"):
        await server.start()
    assert server.starts == 1
    assert Server.crashes == []


async def test_a_server_in_the_foreground_says_that_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """How long it may take and where its log is, then the last line of that, until it is ready; SIGTERM ends it."""
    monkeypatch.setattr(foreground, "TOLD_EVERY_S", 0.01)
    started, said = asyncio.Event(), ""

    class Slow(Crashing):
        async def start(self) -> None:
            self.log_path.write_text("first\nloading models\n")
            await started.wait()

    running = asyncio.create_task(foreground._serve("slow-", lambda folder: (Slow(folder, 0), "it is ready")))

    def has_said(words: str) -> bool:
        nonlocal said
        said += capsys.readouterr().out
        return words in said

    await until(lambda: has_said("crashing is starting, 0 s: loading models\n"))
    started.set()
    await until(lambda: has_said("it is ready\n"))
    assert said.startswith("crashing starts, within 60 s; its log is ")
    os.kill(os.getpid(), signal.SIGTERM)
    await running


@pytest.mark.parametrize(
    ("target", "options"),
    [("triton", "--grpc-port 18001 --http-port 18000 --metrics-port 8002"), ("vllm", "--http-port 18000")],
)
def test_the_ports_of_a_real_server_are_ones_choice(target: str, options: str) -> None:
    """Variables of make reach the server's command line; without them it is on the usual ports."""
    command = ("make", "--dry-run", "--always-make", "--no-print-directory", target, "VLLM_VENV=x")
    run = subprocess.run(
        [*command, "GRPC_PORT=18001", "HTTP_PORT=18000"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[-1].endswith(f"-m tests.e2e.{target} {options}")
    usual = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--http-port 8000" in usual.splitlines()[-1]
