"""The steps that bring a name to what is declared of it. Each may take a while, and is taken back by the next look."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import nullcontext
from time import time

from sidecar.adapters.origins.origin import is_url
from sidecar.errors import Dropped, Reason
from sidecar.kubernetes.deciding import Do, marked_gone, set_back
from sidecar.kubernetes.declarations import Declaration, Source
from sidecar.kubernetes.reporting import Reporter
from sidecar.kubernetes.standings import Phase, Standing
from sidecar.shell.catalogue import Catalogue
from sidecar.shell.managing import CLUSTER, Wanted
from sidecar.state.records import Record

READ_AT_ONCE_MAX = 4
"""Adapters on disk that are read at once: every byte of each is, in threads that others need, too."""

MayChange = Callable[[str, "Declaration | None"], bool]
"""Whether a name is still to be brought to a declaration, None if it is to have none."""


class Steps:
    """Takes steps in the registry. `may_change` is asked right before anything is written down."""

    def __init__(self, catalogue: Catalogue, may_change: MayChange, reporter: Reporter) -> None:
        self._catalogue = catalogue
        self._may_change = may_change
        self._reporter = reporter
        self._reading = asyncio.Semaphore(READ_AT_ONCE_MAX)

    async def towards(self, do: Do, declaration: Declaration) -> None:
        """Take one step towards a declaration."""
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
        turn = nullcontext() if is_url(declaration.origin) else self._reading  # downloads have a bound of their own
        async with turn:
            await self._catalogue.register(name, declaration.origin, wanted)

    async def away(self, do: Do, record: Record) -> None:
        """Take one step towards forgetting a name."""
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
        """Raise Dropped if this is not what is wanted any more."""
        if not self._may_change(name, declaration):
            raise Dropped(Reason.CANCELLED, f"{name} is not declared so any more")

    def _say(self, record: Record, reason: str, message: str) -> None:
        namespace, kind, name = record.managed_by.removeprefix(CLUSTER).split("/", 2)
        self._reporter.say(Source(kind, namespace, name), record.name, Standing(Phase.REMOVING, reason, message))
