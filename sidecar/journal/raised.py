"""Exceptions of the core, an effect or ownership, as crash reports, the journal and the log describe them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sidecar.core.effects import Effect
from sidecar.core.events import Event

LENGTH_MAX = 500
_ADDRESS = re.compile("0x[0-9a-f]+")


def describe(error: BaseException) -> str:
    """Return an exception as a journal records it: short, and equal whenever the same exception is raised again."""
    return _ADDRESS.sub("0x…", f"{type(error).__name__}: {error}")[:LENGTH_MAX]


@dataclass(frozen=True)
class Raised:
    """An exception, and what raised it: an event of the core, an effect of that event, or an event of ownership."""

    error: BaseException
    at_ns: int
    event: Event | None = None
    effect: Effect | None = None
    ownership: str = ""

    @property
    def request(self) -> int | None:
        """The request concerned, if there is one."""
        for part in (self.effect, self.event):
            number = getattr(part, "request", None)
            if isinstance(number, int):
                return number
        return None

    @property
    def sentence(self) -> str:
        """What raised the exception, as a clause of a sentence."""
        if self.effect is not None:
            where = f"carrying out {type(self.effect).__name__}"
        elif self.event is not None:
            where = f"the core on {type(self.event).__name__}"
        else:
            where = f"ownership on {self.ownership}"
        return f"{where} raised {describe(self.error)}"
