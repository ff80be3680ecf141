"""What raised, and on what, as crashes, the journal and the log say it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sidecar.core.effects import Effect
from sidecar.core.events import Event

WORDS_MAX = 500
_ADDRESS = re.compile("0x[0-9a-f]+")


def words_of(error: BaseException) -> str:
    """Return an exception in the words that a journal has of it: short, and the same whenever it is raised again."""
    return _ADDRESS.sub("0x…", f"{type(error).__name__}: {error}")[:WORDS_MAX]


@dataclass(frozen=True)
class Raised:
    """What raised, and on what: an event of the core, an effect of that event, or an event of ownership by name."""

    error: BaseException
    at_ns: int
    event: Event | None = None
    effect: Effect | None = None
    ownership: str = ""

    @property
    def request(self) -> int | None:
        """The request that it happened with, if there is one."""
        for part in (self.effect, self.event):
            number = getattr(part, "request", None)
            if isinstance(number, int):
                return number
        return None

    @property
    def words(self) -> str:
        """What raised what, as a part of a sentence."""
        if self.effect is not None:
            where = f"carrying out {type(self.effect).__name__}"
        elif self.event is not None:
            where = f"the core on {type(self.event).__name__}"
        else:
            where = f"ownership on {self.ownership}"
        return f"{where} raised {words_of(self.error)}"
