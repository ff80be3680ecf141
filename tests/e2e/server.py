"""A real server in a process group of its own, for tests: start, stop, kill, freeze, start again on the same ports.

Nothing of it stays: what it leaves is removed when it ends, by a guard if the tests that started it are gone.
"""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from time import monotonic
from types import ModuleType
from typing import ClassVar, Self

import httpx

from tests.e2e.guard import RELEASED, remove
from tests.e2e.installed import ROOT
from tests.e2e.processes import Process, group_of, ports_of, signal_group
from tests.kit.ports import free_port

STOP_S = 60.0
_TAIL_LINES = 40
_LOOK_S = 0.02
_TRIES = 3


class StartFailed(Exception):
    """The server ended, or was not ready in time; the text has the end of its log."""


class Server(ABC):
    """One server, whose log is in `folder`; `ports` are chosen at the first start and kept if they are not given."""

    NAME: ClassVar[str]
    START_S: ClassVar[float]
    """How long a start may take."""
    PORTS: ClassVar[int]
    """How many ports it listens on."""
    NOISE: ClassVar[re.Pattern[str]]
    """What is in the lines of the log that say nothing."""
    CRASH: ClassVar[re.Pattern[str]] = re.compile(r"(?!)")
    """What a start fails with that is the server's own fault and goes well when it is tried again."""
    crashes: ClassVar[list[str]] = []
    """Of all servers' starts that were tried again for that, what was said; for the summary."""
    GUARD: ClassVar[ModuleType]
    """Its `leftovers(pid, mark)` are what the server leaves; run as a script it guards the server."""

    def __init__(self, folder: Path, ports: tuple[int, ...] | None) -> None:
        self.folder = folder
        self.log_path = folder / f"{self.NAME.lower()}.log"
        self._ports = ports
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._left: set[Path] = set()

    @property
    def pid(self) -> int:
        """The server's process, which leads the group of its others."""
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def processes(self) -> list[Process]:
        """The running processes of the group."""
        return group_of(self.pid)

    def log_tail(self, lines: int = _TAIL_LINES) -> str:
        """Return the end of the server's log, without the lines that say nothing."""
        text = self.log_path.read_text(errors="replace") if self.log_path.exists() else ""
        return "\n".join([line for line in text.splitlines() if not self.NOISE.search(line)][-lines:])

    async def start(self) -> None:
        """Start and return when it is ready. Raises StartFailed with the end of the log.

        A start that crashes as this server is known to is tried again, a few times, and counted.
        """
        assert not self.is_running, "it runs already"
        self.folder.mkdir(parents=True, exist_ok=True)
        first = self._ports is None
        for left in reversed(range(_TRIES)):
            self._ports = self._ports or tuple(free_port() for _ in range(self.PORTS))
            try:
                await self._start_once()
            except StartFailed as failed:
                if left and (crash := self.CRASH.search(str(failed))):
                    self.crashes.append(f"{self.NAME}: {crash.group(0).splitlines()[-1]}")
                    continue
                if not (first and left and "already in use" in str(failed)):
                    raise
                self._ports = None
            else:
                return

    async def stop(self) -> None:
        """Ask the server to end, as SIGTERM does, and wait until all its processes have."""
        if self._process is not None and self.is_running:
            self._process.terminate()
            with suppress(TimeoutError):
                await self.ended()
        await self.kill()

    async def kill(self) -> None:
        """End all its processes as `kill -9` does, and leave nothing of them."""
        if self._process is None:
            return
        signal_group(self.pid, signal.SIGKILL)
        async with asyncio.timeout(STOP_S):
            while self.is_running or self.processes:
                await asyncio.sleep(_LOOK_S)
        remove(self._left | self._leftovers())
        if self._guard is not None:
            self._guard.communicate(RELEASED)
            self._guard = None

    async def ended(self, patience_s: float = STOP_S) -> int:
        """Wait until the server ends by itself and return its exit status. Raises TimeoutError."""
        assert self._process is not None, "not started"
        async with asyncio.timeout(patience_s):
            while (status := self._process.poll()) is None:
                await asyncio.sleep(_LOOK_S)
        return status

    def freeze(self) -> None:
        """Stop all its processes where they are; connections stay open and silent."""
        signal_group(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen server go on."""
        signal_group(self.pid, signal.SIGCONT)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    @property
    @abstractmethod
    def _mark(self) -> str:
        """By which what it leaves is told from what others do, known when it is prepared."""

    @property
    @abstractmethod
    def _ready_url(self) -> str:
        """What answers 200 when it is ready."""

    @abstractmethod
    def _prepare(self) -> Path:
        """Make what a start needs, and return the folder that it runs in."""

    @abstractmethod
    def _command(self) -> list[str]:
        """Return its command line; the ports are known."""

    @abstractmethod
    def _environment(self) -> dict[str, str]:
        """Return the variables that it runs with."""

    def _address(self, index: int) -> str:
        assert self._ports is not None, "not started"
        return f"127.0.0.1:{self._ports[index]}"

    async def _start_once(self) -> None:
        try:
            self._launch(self._prepare())
            try:
                await self._ready_in_time()
            finally:
                # Looked up now, so that a kill comes as suddenly as it should.
                self._left = self._leftovers()
        except BaseException:
            await self.kill()
            raise

    def _launch(self, folder: Path) -> None:
        """Start its process, in our session: Linux weighs sessions before it looks at what is nice. Start the guard.

        They are no event loop's, since a server may be shared by tests that have one each.
        """
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=self._environment(), cwd=folder, process_group=0,
            )  # fmt: skip
        # In a session of its own, it stays when ours is ended.
        self._guard = subprocess.Popen(
            [sys.executable, "-S", "-m", self.GUARD.__name__, str(self.pid), self._mark],
            stdin=subprocess.PIPE, cwd=ROOT, start_new_session=True,
        )  # fmt: skip

    async def _ready_in_time(self) -> None:
        try:
            async with asyncio.timeout(self.START_S):
                await self._ready()
        except TimeoutError as error:
            raise StartFailed(self._failure(f"was not ready after {self.START_S:.0f} s")) from error

    async def _ready(self) -> None:
        """Wait until this process listens and says that it is ready: till then somebody else may answer at its port."""
        assert self._process is not None
        started = monotonic()
        async with httpx.AsyncClient(trust_env=False, timeout=5.0) as client:
            while not (self._listens() and await self._says_ready(client)):
                if (status := self._process.poll()) is not None:
                    raise StartFailed(self._failure(f"ended with {status} after {monotonic() - started:.0f} s"))
                await asyncio.sleep(_LOOK_S)

    def _failure(self, what: str) -> str:
        return f"{self.NAME} {what}; its log ends with\n{self.log_tail()}"

    def _listens(self) -> bool:
        try:
            return set(self._ports or ()) <= ports_of(self.pid)
        except OSError:
            return False

    async def _says_ready(self, client: httpx.AsyncClient) -> bool:
        try:
            reply = await client.get(self._ready_url)
        except httpx.HTTPError:
            return False
        return reply.status_code == httpx.codes.OK

    def _leftovers(self) -> set[Path]:
        found: set[Path] = self.GUARD.leftovers(self.pid, self._mark)
        return found
