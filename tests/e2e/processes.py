"""Processes and what they listen on, as /proc shows them."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_LISTEN = "0A"


@dataclass(frozen=True)
class Process:
    """A running process and its command line."""

    pid: int
    command: tuple[str, ...]


def group_of(leader: int) -> list[Process]:
    """Return the living processes of a process group; those that have ended but were not waited for are not."""
    return [process for pid in _pids() if (process := _member(pid, leader)) is not None]


def signal_group(leader: int, number: signal.Signals) -> None:
    """Send a signal to a process group, if there is one."""
    with suppress(ProcessLookupError):
        os.killpg(leader, number)


def state_of(pid: int) -> str:
    """Return the letter of a process's state, Z when it has ended and was not waited for, X when it is gone."""
    try:
        return _stat(pid)[0]
    except OSError:
        return "X"


def ports_of(pid: int) -> set[int]:
    """Return the TCP ports that a process listens on."""
    held = set()
    for link in (_PROC / str(pid) / "fd").iterdir():
        with suppress(OSError):
            held.add(str(link.readlink()))
    ports = set()
    # gRPC listens on IPv6 sockets, also for an address of IPv4.
    for table in ("tcp", "tcp6"):
        for line in (_PROC / str(pid) / "net" / table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN and f"socket:[{fields[9]}]" in held:
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


def _pids() -> list[int]:
    return [int(folder.name) for folder in _PROC.iterdir() if folder.name.isdigit()]


def _member(pid: int, leader: int) -> Process | None:
    try:
        state, _, group = _stat(pid)
        if int(group) != leader or state in "ZX":
            return None
        command = (_PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return None
    return Process(pid, tuple(command))


def _stat(pid: int) -> list[str]:
    """Return state, parent and group; the name before them, in parentheses, may hold anything."""
    return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[:3]
