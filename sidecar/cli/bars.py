"""Progress bars for work that takes its time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn


@contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """Give a progress callback (bytes done, bytes in all) that draws a bar on stderr; none when nobody looks."""
    errors = Console(stderr=True)
    if not errors.is_terminal:
        yield None
        return
    with Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), console=errors, transient=True
    ) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
