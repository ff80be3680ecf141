"""Python processes that need no second to start: forks of one that has imported the product.

`await python("-m", "sidecar", "serve", …)` is `asyncio.create_subprocess_exec(sys.executable, "-m", "sidecar", …)`, and
so is `-c PROGRAM`; `Popen` is `subprocess.Popen` of such commands. The process has signals, exit status, working
directory, environment and streams of its own. What Python itself reads when it starts (PYTHONHASHSEED, PYTHONPATH, -S)
stays that of the process that it is forked from.

One process of that kind (`python -m tests.kit.forked`) serves all tests of a process, and ends with it. It takes an
order on a Unix socket, with the file descriptors of the new process; says its pid at once, and its status at its end.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path
from types import ModuleType
from typing import Any, AnyStr, NoReturn

from sidecar.backends.triton import loads
from sidecar.cli.commands import COMMANDS

ROOT = Path(__file__).parents[2]
ORDER_BYTES_MAX = 1 << 20
PRELOADED = [
    "sidecar.serve.app",
    "sidecar.cli.top.app",
    *sorted({place.partition(":")[0] for place, _ in COMMANDS.values()}),
]


class Forked:
    """A process, as `asyncio.subprocess.Process` is one."""

    def __init__(self, pid: int, ended: asyncio.StreamReader, link: asyncio.StreamWriter) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.stdin: asyncio.StreamWriter | None = None
        self.stdout: asyncio.StreamReader | None = None
        self.stderr: asyncio.StreamReader | None = None
        self._transports: list[asyncio.ReadTransport] = []
        self._link = link
        self._waiting = asyncio.create_task(self._wait(ended))

    async def _wait(self, ended: asyncio.StreamReader) -> int:
        self.returncode = int(await ended.readline())
        self._link.close()
        return self.returncode

    async def wait(self) -> int:
        return await asyncio.shield(self._waiting)

    async def communicate(self) -> tuple[bytes, bytes]:
        """Read both streams to their end and wait for that of the process."""

        async def rest(stream: asyncio.StreamReader | None) -> bytes:
            return await stream.read() if stream is not None else b""

        out, err, _ = await asyncio.gather(rest(self.stdout), rest(self.stderr), self.wait())
        self.close()
        return out, err

    def send_signal(self, number: int) -> None:
        """Send a signal. Raises ProcessLookupError when the process has ended."""
        if self.returncode is not None:
            raise ProcessLookupError(self.pid)
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Close the pipes that are open still."""
        if self.stdin is not None:
            self.stdin.close()
        for transport in self._transports:
            transport.close()


async def python(
    *arguments: str,
    stdin: int = DEVNULL,
    stdout: int | None = None,
    stderr: int | None = None,
    env: Mapping[str, str] | None = None,
    limit: int = 1 << 16,
) -> Forked:
    """Start a process. `arguments` begin with -m and a module, or with -c and a program; streams are PIPE, DEVNULL or
    None, for that of this process.
    """
    mine: dict[str, int] = {}
    theirs: list[int] = []
    try:
        for number, (name, asked) in enumerate((("stdin", stdin), ("stdout", stdout), ("stderr", stderr))):
            if asked == PIPE:
                ends = os.pipe()
                mine[name] = ends[not number]
                theirs.append(ends[bool(number)])
            else:
                theirs.append(os.open(os.devnull, os.O_RDWR) if asked == DEVNULL else os.dup(number))
        link = _ordered(arguments, env, theirs)
    finally:
        for end in theirs:
            os.close(end)
    link.setblocking(False)
    try:
        reader, writer = await asyncio.open_unix_connection(sock=link)
        process = Forked(int(await reader.readline()), reader, writer)
    except BaseException:
        link.close()
        for end in mine.values():
            os.close(end)
        raise
    loop = asyncio.get_running_loop()
    for name, end in mine.items():
        stream = asyncio.StreamReader(limit)
        protocol = asyncio.StreamReaderProtocol(stream)
        if name == "stdin":
            writing, _ = await loop.connect_write_pipe(lambda of=protocol: of, os.fdopen(end, "wb", buffering=0))
            process.stdin = asyncio.StreamWriter(writing, protocol, None, loop)
        else:
            reading, _ = await loop.connect_read_pipe(lambda of=protocol: of, os.fdopen(end, "rb", buffering=0))
            process._transports.append(reading)
            setattr(process, name, stream)
    return process


def _ordered(
    arguments: Sequence[str], env: Mapping[str, str] | None, streams: Sequence[int], own_session: bool = False
) -> socket.socket:
    """Order a process with these standard streams, and return the link by which its pid and its status come."""
    assert arguments[0] in ("-m", "-c"), arguments
    order = {
        "arguments": arguments,
        "env": dict(os.environ if env is None else env),
        "folder": str(Path.cwd()),
        "own_session": own_session,
    }
    link = socket.socket(socket.AF_UNIX)
    link.connect(_address())
    socket.send_fds(link, [json.dumps(order).encode() + b"\n"], streams)
    return link


class Popen(subprocess.Popen[AnyStr]):
    """`subprocess.Popen` of this interpreter. Of its other options, standard streams, text, env and start_new_session
    are kept.
    """

    def _execute_child(self, args: Sequence[str], *given: Any) -> None:
        env, streams, own_session = given[5], given[9:15], given[20]
        assert args[0] == sys.executable
        theirs = [number if end == -1 else end for number, end in enumerate((streams[0], streams[3], streams[5]))]
        self._link = _ordered(args[1:], env, theirs, own_session)
        self._told = self._link.makefile("rb")
        self.pid = int(self._told.readline())
        self._child_created = True
        self._close_pipe_fds(*streams)  # type: ignore[attr-defined]

    def _wait(self, timeout: float | None) -> int:
        if self.returncode is None:
            if not wait([self._link], timeout):
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            self.returncode = int(self._told.readline())
            self._told.close()
            self._link.close()
        return self.returncode

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self._wait(0)
        return self.returncode


async def loader() -> Forked:
    """Start what `sidecar.backends.triton.loads` starts."""
    return await python("-m", "sidecar.backends.triton.loader", stdin=PIPE, stdout=PIPE, limit=loads.LINE_BYTES_MAX)


def large_reader() -> Popen[bytes]:
    """Start what `sidecar.fronts.openai.large` starts."""
    command = (sys.executable, "-m", "sidecar.fronts.openai.large_reader")
    return Popen(command, stdin=PIPE, stdout=PIPE)


@cache
def begin() -> tuple[str, subprocess.Popen[bytes]]:
    """Start the process that is forked, unless it was started. It takes its second beside the tests that come first."""
    path = str(Path(tempfile.mkdtemp(prefix="forked-")) / "socket")
    # It ends when its standard input does: with this process.
    command = (sys.executable, "-m", "tests.kit.forked", path)
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # a thread of it would not be there after a fork
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    atexit.register(server.communicate, timeout=10)  # else the interpreter warns of a process that is still running
    return path, server


@cache
def _address() -> str:
    path, server = begin()
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n", "the process to fork from did not start"
    return path


def _serve(path: str) -> dict[str, Any] | None:
    """Take orders until standard input ends. Returns None then, and in each new process its order."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen()
    woken, wake = socket.socketpair()
    woken.setblocking(False)
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(BrokenPipeError):  # the tests may have ended meanwhile: standard input has ended then, too
        os.write(1, b"ready\n")
    os.dup2(2, 1)
    links: dict[int, socket.socket] = {}
    asking: set[socket.socket] = set()
    """Links that have brought no order yet. Whoever connects may first wait for the end of another process: collected
    garbage may have one."""
    with selectors.DefaultSelector() as selector:
        for source in (server, woken, sys.stdin):
            selector.register(source, selectors.EVENT_READ)
        while True:
            sources = {key.fileobj for key, _ in selector.select()}
            if sys.stdin in sources:
                Path(path).unlink()
                Path(path).parent.rmdir()
                return None
            if woken in sources:
                with suppress(BlockingIOError):
                    woken.recv(4096)
                _reap(links)
            if server in sources:
                link, _ = server.accept()
                asking.add(link)
                selector.register(link, selectors.EVENT_READ)
            elif link := next((each for each in asking if each in sources), None):
                asking.remove(link)
                selector.unregister(link)
                order, streams = _read(link)
                if not order:
                    link.close()
                    continue
                pid = os.fork()
                if pid == 0:
                    break
                for end in streams:
                    os.close(end)
                link.sendall(b"%d\n" % pid)
                links[pid] = link
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, end in enumerate(streams):
        os.dup2(end, number)
        os.close(end)
    for each in (server, woken, wake, link, *links.values(), *asking):
        each.close()
    return order


def _read(link: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Return an order and the streams that came with it; an empty one if its sender is gone."""
    text, streams, _, _ = socket.recv_fds(link, ORDER_BYTES_MAX, 3)
    while text and not text.endswith(b"\n"):
        text += link.recv(ORDER_BYTES_MAX)
    return json.loads(text or "{}"), streams


def _reap(links: dict[int, socket.socket]) -> None:
    while links:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with links.pop(pid) as link, suppress(BrokenPipeError):
            link.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def _become(order: dict[str, Any]) -> None:
    """Run what was ordered, as the interpreter would."""
    os.environ.clear()
    os.environ.update(order["env"])
    if order["own_session"]:
        os.setsid()
    os.chdir(order["folder"])
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    kind, what, *rest = order["arguments"]
    sys.argv = [kind, *rest]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        module = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), module.__dict__)


def _end_as(order: dict[str, Any]) -> NoReturn:
    """Run what was ordered, and end without giving back all that was imported: that takes as long as importing it.

    Threads, `atexit` and streams end as in any interpreter. An error is told by the interpreter itself.
    """
    try:
        _become(order)
    except SystemExit as left:
        if not (left.code is None or isinstance(left.code, int)):
            raise
        status = left.code or 0
    else:
        status = 0
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    gc.collect()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    for name in PRELOADED:
        import_module(name)
    tasks = Path("/proc/self/task")
    assert not tasks.exists() or len(list(tasks.iterdir())) == 1, "a thread would not be there after a fork"
    gc.collect()
    gc.freeze()  # collections of a new process would copy every page of what was imported
    order = _serve(sys.argv[1])
    if order is not None:
        _end_as(order)


if __name__ == "__main__":
    main()
