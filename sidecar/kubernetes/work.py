"""The work on one declared name: one step at a time, retried after a pause if it fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Hashable
from contextlib import nullcontext
from time import monotonic, time
from typing import Any

from sidecar.adapters.origins.origin import is_url
from sidecar.errors import Dropped, Reason, Refused, SidecarError
from sidecar.kubernetes.deciding import Do, marked_gone, set_back
from sidecar.kubernetes.declarations import Declaration, Source
from sidecar.kubernetes.pauses import Pauses
from sidecar.kubernetes.reporting import Reporter
from sidecar.kubernetes.standings import Attempt, Phase, Standing
from sidecar.shell.catalogue import Catalogue
from sidecar.shell.managing import CLUSTER, Wanted
from sidecar.state.records import Record
from sidecar.tasks import ended

logger = logging.getLogger(__name__)

FIRST_RETRY_S, LAST_RETRY_S = 1.0, 300.0
READ_AT_ONCE_MAX = 4
"""Adapters on disk that are read at a time: reading them takes threads that others need too."""

MayChange = Callable[[str, "Declaration | None"], bool]
"""Returns True if a name's declaration (None: it has none) is unchanged since a step began."""


class Work:
    """The steps of one name. `changed` is called when a step has ended."""

    def __init__(self, name: str, changed: Callable[[], None]) -> None:
        self._name = name
        self._changed = changed
        self._pauses = Pauses(FIRST_RETRY_S, LAST_RETRY_S)
        self._task: asyncio.Task[None] | None = None
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
        if self._task is not None:
            self._task.cancel()

    def begin(self, step: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Start a step, unless one is running or the pause after a failed one lasts."""
        if not self.is_running and monotonic() >= self.due_s:
            self._task = asyncio.create_task(self._take(step))

    def rest(self) -> None:
        """Note that nothing is to be done."""
        self._error = None

    async def stop(self) -> None:
        await ended(self._task)

    async def _take(self, step: Callable[[], Coroutine[Any, Any, object]]) -> None:
        try:
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
        if do is Do.SET:

            def changed(record: Record) -> Record:
                self._confirm(name, declaration)
                return set_back(declaration, record)

            await self._catalogue.change_declared(name, owner, changed)
            return
        wanted = Wanted(
            allow=declaration.tenants,
            pin=declaration.pinned,
            managed_by=owner,
            digest=declaration.digest,
            take_over=declaration.take_over,
            declared=declaration.declared,
            confirm=lambda: self._confirm(name, declaration),
        )
        limit = nullcontext() if is_url(declaration.origin) else self._reading  # downloads have their own limit
        async with limit:
            await self._catalogue.register(name, declaration.origin, wanted)

    async def away(self, do: Do, record: Record) -> None:
        """Carry out one step towards forgetting a name."""
        name, owner = record.name, record.managed_by
        if do is Do.MARK:

            def marked(found: Record) -> Record:
                self._confirm(name, None)
                return marked_gone(found, time())

            gone = await self._catalogue.change_declared(name, owner, marked)
            grace_s = 0.0 if gone.declared is None else gone.declared.grace_s
            self._say(record, "Removing", f"its declaration has gone; {name} is refused in {grace_s:.0f} s")
            return
        self._confirm(name, None)
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
