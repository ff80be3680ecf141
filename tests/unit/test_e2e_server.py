"""A server that crashes while it starts, as Triton 24.10 does now and then: tried again, counted, but not for ever."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from tests.e2e.server import Server, StartFailed
from tests.e2e.triton import guard
from tests.e2e.triton.server import TritonServer

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
