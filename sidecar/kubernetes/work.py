"""The work on one declared name: one step at a time, retried if it fails: after a pause, or once its files change."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Hashable
from contextlib import nullcontext
from pathlib import Path
from time import monotonic, time
from typing import Any

from sidecar.adapters.origins.files import files_of
from sidecar.adapters.origins.origin import is_url
from sidecar.errors import Dropped, Reason, Refused, SidecarError
from sidecar.kubernetes.deciding import Do, marked_gone, set_back
from sidecar.kubernetes.declarations import Declaration, Source
from sidecar.kubernetes.pauses import Pauses
from sidecar.kubernetes.reporting import Reporter
from sidecar.kubernetes.standings import Attempt, Phase, Standing
from sidecar.shell.catalogue import Catalogue
from sidecar.shell.managing import CLUSTER, CONFIRM, Wanted
from sidecar.state.records import Record
from sidecar.tasks import ended

logger = logging.getLogger(__name__)

FIRST_RETRY_S, LAST_RETRY_S = 1.0, 300.0
READ_AT_ONCE_MAX = 4
"""Adapters on disk that are read at a time: reading them takes threads that others need too."""

Step = Callable[[], Coroutine[Any, Any, object]]
Look = Callable[[], Coroutine[Any, Any, Hashable]]
MayChange = Callable[[str, "Declaration | None"], bool]
"""Returns True if a name's declaration (None: it has none) is unchanged since a step began."""


class Work:
    """The steps of one name. `changed` is called when a step has ended."""

    def __init__(self, name: str, changed: Callable[[], None]) -> None:
        self._name = name
        self._changed = changed
        self._pauses = Pauses(FIRST_RETRY_S, LAST_RETRY_S)
        self._task: asyncio.Task[None] | None = None
        self._look: asyncio.Task[None] | None = None
        self._seen: Hashable = None
        """What was seen before the last step."""
        self._about: Hashable = None
        self._error: SidecarError | None = None
        self.due_s = 0.0
        """The earliest time (monotonic seconds) of a retry."""

    @property
    def attempt(self) -> Attempt:
        return Attempt(self.is_running, self._error)

    @property
    def is_running(self) -> bool:
        return self._task is not None and not self._task.done()

    @property
    def is_unknown_to_others(self) -> bool:
        """True if the last step may have been stored without reaching every replica."""
        return self._error is not None and self._error.reason is Reason.STATE_UNAVAILABLE

    def about(self, wish: Hashable) -> None:
        """Set the wanted declaration. If it has changed, cancel a step towards the former one."""
        if wish == self._about:
            return
        self._about = wish
        self._error, self.due_s = None, 0.0
        self._pauses.end()
        for task in self._tasks:
            task.cancel()

    def begin(self, step: Step, look: Look | None = None) -> None:
        """Start a step, unless one is running. In the pause after a failed one, look whether it can end now."""
        if self.is_running:
            return
        if monotonic() >= self.due_s:
            self._task = asyncio.create_task(self._take(step, look))
        elif look is not None and (self._look is None or self._look.done()):
            self._look = asyncio.create_task(self._look_again(look))

    def rest(self) -> None:
        """Note that nothing is to be done."""
        self._error = None

    async def stop(self) -> None:
        await ended(*self._tasks)

    @property
    def _tasks(self) -> list[asyncio.Task[None]]:
        return [task for task in (self._task, self._look) if task is not None]

    async def _look_again(self, look: Look) -> None:
        """End the pause if something else is seen than before the step that failed."""
        if await look() != self._seen:
            self.due_s = 0.0
            self._changed()

    async def _take(self, step: Step, look: Look | None) -> None:
        try:
            self._seen = None if look is None else await look()
            await step()
        except SidecarError as error:
            self._failed(error)
        except Exception as error:
            logger.error("the work on %s broke", self._name, exc_info=error)
            self._failed(Refused(Reason.ADAPTER_UNAVAILABLE, f"{self._name}: {error!r}; the log has more"))
        else:
            self._error, self.due_s = None, 0.0
            self._pauses.end()
        finally:
            asyncio.get_running_loop().call_soon(self._changed)

    def _failed(self, error: SidecarError) -> None:
        self._error = error
        self.due_s = monotonic() + self._pauses.next_s(error.retry_after_s or 0.0)


class Steps:
    """Carries out steps in the registry, checking `may_change` right before each write."""

    def __init__(self, catalogue: Catalogue, may_change: MayChange, reporter: Reporter) -> None:
        self._catalogue = catalogue
        self._may_change = may_change
        self._reporter = reporter
        self._reading = asyncio.Semaphore(READ_AT_ONCE_MAX)

    async def towards(self, do: Do, declaration: Declaration) -> None:
        """Carry out one step towards a declaration."""
        name, owner = declaration.name, declaration.source.owner
        CONFIRM.set(lambda: self._confirm(name, declaration))
        if do is Do.SET:
            await self._catalogue.change_declared(name, owner, lambda record: set_back(declaration, record))
            return
        wanted = Wanted(
            allow=declaration.tenants,
            pin=declaration.pinned,
            managed_by=owner,
            digest=declaration.digest,
            take_over=declaration.take_over,
            declared=declaration.declared,
        )
        limit = nullcontext() if is_url(declaration.origin) else self._reading  # downloads have their own limit
        async with limit:
            await self._catalogue.register(name, declaration.origin, wanted)

    async def seen_of(self, declaration: Declaration) -> Hashable:
        """Return what, if it changes, is a reason to try a failed declaration again."""
        if is_url(declaration.origin):
            return declaration.retry
        async with self._reading:
            return declaration.retry, await asyncio.to_thread(_marks_of, Path(declaration.origin))

    async def away(self, do: Do, record: Record) -> None:
        """Carry out one step towards forgetting a name."""
        name, owner = record.name, record.managed_by
        CONFIRM.set(lambda: self._confirm(name, None))
        if do is Do.MARK:
            gone = await self._catalogue.change_declared(name, owner, lambda found: marked_gone(found, time()))
            grace_s = 0.0 if gone.declared is None else gone.declared.grace_s
            self._say(record, "Removing", f"its declaration has gone; {name} is refused in {grace_s:.0f} s")
            return
        await self._catalogue.unregister(name, managed_by=owner)
        self._say(record, "Removed", f"{name} is forgotten")
        self._reporter.gone(owner, name)

    def _confirm(self, name: str, declaration: Declaration | None) -> None:
        """Raise Dropped if the name's declaration has changed."""
        if not self._may_change(name, declaration):
            raise Dropped(Reason.CANCELLED, f"{name} is not declared so any more")

    def _say(self, record: Record, reason: str, message: str) -> None:
        namespace, kind, name = record.managed_by.removeprefix(CLUSTER).split("/", 2)
        self._reporter.say(Source(kind, namespace, name), record.name, Standing(Phase.REMOVING, reason, message))


def _marks_of(folder: Path) -> Hashable:
    """Return what changes with an adapter's files, or None as long as one that it needs is missing. Blocks."""
    try:
        found = [path.stat() for path in files_of(folder)]
    except (OSError, ValueError):
        return None
    return tuple((file.st_ino, file.st_size, file.st_mtime_ns) for file in found)
