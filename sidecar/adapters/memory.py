"""How much memory there is to reserve: the kernel grants memory files beyond it and then kills processes."""

from __future__ import annotations

from pathlib import Path

_MACHINE = Path("/proc/meminfo")
_CONTAINER = Path("/sys/fs/cgroup")


def available_bytes(machine: Path = _MACHINE, container: Path = _CONTAINER) -> int | None:
    """Return what could be had now: Linux's estimate, within the container's limit (cgroup v2); None if
    unknown.
    """
    known = [value for value in (_of_machine(machine), _of_container(container)) if value is not None]
    return min(known, default=None)


def _of_machine(path: Path) -> int | None:
    available_kb = _field(path, "MemAvailable:")
    return None if available_kb is None else available_kb * 1024


def _of_container(folder: Path) -> int | None:
    limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
    if limit is None or used is None:
        return None
    # Cached file pages count as used and are given up when memory is asked for.
    return max(0, limit - used + (_field(folder / "memory.stat", "inactive_file") or 0))


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None  # "max" where there is no limit


def _field(path: Path, name: str) -> int | None:
    rows = (line.split() for line in _text(path).splitlines())
    return next((int(row[1]) for row in rows if row[:1] == [name]), None)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
