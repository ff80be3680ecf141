"""A dialect whose backend never ends when its process stops: all backends of a process that names it."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from typing import ClassVar, Literal

from sidecar.backends.openai import registered
from sidecar.backends.openai.registered import RegisteringBackend
from sidecar.backends.openai.vllm import MODEL, Vllm, VllmEntry

DAY_S = 86_400.0


class EndlessEntry(VllmEntry):
    """An engine that need not be there. `hangs` is what does not end."""

    SCHEMES: ClassVar = {"endless": False}

    hangs: Literal["task", "loop", "thread"]


class EndlessBackend(RegisteringBackend):
    async def stop(self) -> None:
        hangs = self._entry.hangs
        if hangs == "loop":
            time.sleep(DAY_S)  # noqa: ASYNC251
        elif hangs == "thread":
            threading.Thread(target=sleep_a_day, name="endless").start()
        while hangs == "task":
            try:
                await asyncio.sleep(DAY_S)
            except asyncio.CancelledError:
                continue
        await super().stop()


def sleep_a_day() -> None:
    time.sleep(DAY_S)


class Endless(Vllm):
    model = replace(MODEL, name="endless", title="endless")
    section = EndlessEntry


DIALECT = Endless()
registered.RegisteringBackend = EndlessBackend  # type: ignore[misc]
