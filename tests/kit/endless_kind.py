"""A backend kind, as another package may bring one, of which a part never ends when its process stops."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from sidecar.backends.api import Backend
from sidecar.backends.kind import Wiring, with_kind
from sidecar.core.facts import EngineFacts
from tests.conformance.toy.backend import ToyBackend
from tests.conformance.toy.kind import TOY, ToyEntry

DAY_S = 86_400.0


class EndlessEntry(ToyEntry):
    """An engine that need not be there. `hangs` is what does not end."""

    SCHEMES: ClassVar = {"endless": False}

    hangs: Literal["task", "loop", "thread"]


class EndlessBackend(ToyBackend):
    async def stop(self) -> None:
        assert isinstance(self.entry, EndlessEntry)
        if self.entry.hangs == "loop":
            time.sleep(DAY_S)  # noqa: ASYNC251
        elif self.entry.hangs == "thread":
            threading.Thread(target=sleep_a_day, name="endless").start()
        while self.entry.hangs == "task":
            try:
                await asyncio.sleep(DAY_S)
            except asyncio.CancelledError:
                continue
        await super().stop()


def sleep_a_day() -> None:
    time.sleep(DAY_S)


def _connect(entry: EndlessEntry, declared: EngineFacts, wiring: Wiring) -> tuple[Backend, EngineFacts]:
    return EndlessBackend(entry, declared), declared


def _declare(entry: EndlessEntry, declared: EngineFacts, all_of_kind: Sequence[EndlessEntry]) -> EngineFacts:
    return with_kind(declared, entry.model)


ENDLESS = replace(TOY, name="endless", section=EndlessEntry, connect=_connect, declare=_declare)
