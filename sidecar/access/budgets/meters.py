"""Count what is taken of one number of a limit, in windows of the clock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, Protocol


@dataclass(frozen=True, slots=True)
class Number:
    """A number of a limit that counts in windows: `unit` a `word`, for instance tokens a minute."""

    name: str
    unit: str
    word: str
    seconds: int


NUMBERS = tuple(
    Number(f"{unit}_per_{word}", unit, word, seconds)
    for unit in ("requests", "tokens")
    for word, seconds in (("minute", 60), ("hour", 3600), ("day", 86_400))
)


SECONDS = {number.name: number.seconds for number in NUMBERS}

Taken = tuple[str, int, int]
"""A meter's key, a window, and what is taken in it."""


def seconds_of(key: str) -> int:
    """Return how long the windows of a meter are: its key ends with the name of its number."""
    return SECONDS[key.rpartition(":")[2]]


@dataclass(frozen=True, slots=True)
class Former:
    """What is known of a budget in a `window` from before this process began.

    `taken` was taken, of which `held` was leased and `cleared` is no debt; all replicas held `total`. Without Redis
    nothing was leased and `total` is None.
    """

    window: int
    taken: int
    held: int
    cleared: int
    total: int | None


class Sharing(Protocol):
    """Says how much of each budget this replica may take."""

    @property
    def replicas(self) -> int:
        """How many replicas share the budgets, with this one."""

    @property
    def gets_more(self) -> bool:
        """True if this replica may get more of a budget before its window turns."""

    def allowance(self, meter: Meter) -> int:
        """Return how much this replica may take in the meter's window."""

    def cleared(self, meter: Meter) -> int:
        """Return how much of what was taken in the meter's window, which is over, is no debt."""

    def held_by_others(self, meter: Meter) -> int:
        """Return what other replicas have taken or leased, as far as this one knows."""

    def former(self, key: str) -> Sequence[Former]:
        """Return what is known of a budget from before this process began, once, the oldest first."""

    def touched(self, meter: Meter, missed: int = 0) -> None:
        """Note that a meter was used, or that `missed` of what remains could not be taken here."""


async def rounds(woken: asyncio.Event, each_s: float, gather_s: Callable[[], float]) -> AsyncIterator[bool]:
    """Yield for ever: soon after `woken`, and each `each_s` seconds; True if it is time for all meters.

    `gather_s()` is how long others may join those that woke it.
    """
    loop = asyncio.get_running_loop()
    all_at_s = loop.time()
    while True:
        with suppress(TimeoutError):
            async with asyncio.timeout_at(all_at_s):
                await woken.wait()
        await asyncio.sleep(gather_s())
        woken.clear()
        is_time = loop.time() >= all_at_s
        if is_time:
            all_at_s = loop.time() + each_s
        yield is_time


class Alone:
    """There is one replica: the whole limit is its own."""

    replicas = 1
    gets_more = False

    def allowance(self, meter: Meter) -> int:
        return meter.limit

    def cleared(self, meter: Meter) -> int:
        return meter.ceiling

    def held_by_others(self, meter: Meter) -> int:
        return 0

    def former(self, key: str) -> Sequence[Former]:
        return ()

    def touched(self, meter: Meter, missed: int = 0) -> None:
        """Do nothing: nobody else is told."""


@dataclass(slots=True)
class Lease:
    """What a replica knows of a shared budget in the meter's window.

    It `held` so much of it, and all replicas `total`, when Redis last answered; None if it has not yet. `recent` is
    what was wanted within about the last second before `asked_s`, of which `counted` was then taken. `missed` could not
    be taken since, and the largest such amount is kept until `largest_until_s`.
    """

    held: int = 0
    total: int | None = None
    recent: float = 0.0
    counted: int = 0
    asked_s: float = 0.0
    missed: int = 0
    largest: int = 0
    largest_until_s: float = 0.0


class Left(NamedTuple):
    """A window as a meter left it; of what was taken, so much was `carried` into it and `cleared` is no debt."""

    window: int
    taken: int
    carried: int
    cleared: int


class Meter:
    """What is taken of one budget in the current window.

    Windows begin at multiples of their length, so that all replicas have the same ones and a day is a day of UTC. What
    is taken above the limit is a debt: the next window begins with it.

    A clock that is set back takes the meter back with it, to a window that ends when the clock says. What was taken
    while the clock was ahead counts there, so that nothing is given; what was allowed then is no debt.
    """

    __slots__ = (
        "__weakref__",
        "carried",
        "ceiling",
        "counted",
        "excused",
        "key",
        "lease",
        "left",
        "limit",
        "number",
        "pending",
        "sharing",
        "taken",
        "window",
        "written",
        "written_window",
    )

    def __init__(self, number: Number, key: str, limit: int, sharing: Sharing, now_s: float) -> None:
        self.number = number
        self.key = key
        """Names the budget in every replica."""
        self.limit = self.ceiling = limit
        self.sharing = sharing
        self.window = int(now_s // number.seconds)
        self.taken = self.carried = 0
        """What is taken, and what of it in other windows: a debt, or what was taken while the clock was ahead."""
        self.excused = 0
        """What of it is no debt: an earlier process, or the clock when it was ahead, has allowed it."""
        self.left = Left(self.window, 0, 0, 0)
        self.pending = 0
        """What the answers under way will take beyond what they have reserved."""
        self.lease = Lease()
        self.written = self.written_window = self.counted = 0
        """What a file has of it in which window, and what was taken when that was last looked at."""
        for former in sharing.former(key):
            self._resume(former)
        self.counted, self.written_window = self.taken, self.window  # none of it was used in the last second

    def _resume(self, former: Former) -> None:
        """Go on from what is known from before.

        Redis counts what that one held as taken until the window turns, so only the rest is taken here.
        """
        if former.window < self.window:
            self._owe(former.taken - former.cleared, self.window - former.window)
        elif former.window == self.window:
            self.taken += max(0, former.taken - former.held)
            self.excused += max(0, former.cleared - former.held)
            self.lease.total = former.total
        else:  # the clock was ahead then
            self.taken += former.taken
            self.carried += former.taken
            self.excused += former.cleared

    def set(self, limit: int) -> None:
        """Change the limit at once. What was allowed before the change is no debt after it."""
        self.limit = limit
        self.ceiling = max(self.ceiling, limit)

    def turn(self, now_s: float) -> None:
        """Begin the window of this time, or go back to it."""
        window = int(now_s // self.number.seconds)
        if window == self.window:
            return
        left = Left(self.window, self.taken, self.carried, self.cleared)
        if window > self.window:
            self.taken = self.carried = self.excused = 0
            self._owe(left.taken - left.cleared, window - self.window)
            self.ceiling = self.limit
        else:
            known = self.left if self.left.window == window else Left(window, 0, 0, 0)
            ahead = left.taken - (left.carried if known is self.left else 0)
            debts = max(0, known.taken - known.cleared) + max(0, ahead - left.cleared)
            self.taken, self.carried = known.taken + ahead, known.carried + ahead
            self.excused = self.taken - debts
        self.left = left
        self.window = window
        self.lease = Lease(recent=self.lease.recent, counted=self.taken, asked_s=self.lease.asked_s)
        if left.window > window:
            self.sharing.touched(self)

    @property
    def cleared(self) -> int:
        """How much of what was taken in the window is no debt, once it is over."""
        return max(self.excused, self.sharing.cleared(self))

    def _owe(self, debt: int, windows: int) -> None:
        """Begin with what is left of a debt of so many windows ago: the unused ones between have paid for it."""
        owed = debt - (windows - 1) * (self.limit // self.sharing.replicas)
        self.taken = self.carried = max(self.taken, owed)

    def resets_s(self, now_s: float) -> float:
        """Return the seconds until the window turns."""
        return max(0.0, (self.window + 1) * self.number.seconds - now_s)

    @property
    def allowance(self) -> int:
        """How much this replica may take in the window."""
        return self.sharing.allowance(self)

    @property
    def remaining(self) -> int:
        """What can still be taken by all replicas, as far as this one knows."""
        return max(0, self.limit - self.taken_by_all)

    @property
    def taken_by_all(self) -> int:
        """What all replicas have taken or leased, as far as this one knows."""
        return self.taken + self.pending + self.sharing.held_by_others(self)

    def take(self, amount: int) -> None:
        self.taken += amount
        self.sharing.touched(self)

    def correct(self, window: int, by: int) -> None:
        """Correct what was taken in a window by `by`, now that the answer's length is known.

        More is charged to the current window, even if the request began in an earlier one. Less comes back, and in
        another window it only makes smaller what was carried from there.
        """
        if by < 0 and window != self.window:
            by = max(by, -self.carried) if window >= self.window - 1 else 0
            self.carried += by
        self.take(max(by, -self.taken))
