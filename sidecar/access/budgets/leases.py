"""Share budgets among replicas: each leases from Redis, in the background, about a second of its use ahead.

Requests never wait for Redis. A replica may take what it holds and, between two answers of Redis, its part of what was
left at the last one; what then turns out too much is a debt in the next window. While Redis is away that part is all it
gets, and never more than its share of the limit. Before it hears of a window, all of it counts as left: so a process
that starts asks first what is taken of each.

What is leased counts as taken until it is given back. So a replica that is killed costs its tenants up to a second of
use, and gives them nothing.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from secrets import token_hex
from weakref import WeakSet

from sidecar.access.budgets.meters import Former, Left, Meter, Taken, rounds, seconds_of
from sidecar.state.redis.link import FAULTS, Link
from sidecar.state.redis.scripts import Script

logger = logging.getLogger(__name__)

EACH_S = 1.0
"""How often Redis is asked about all budgets in use."""
GATHER_S = 0.02
"""How long urgent questions are gathered, which are about budgets of which a lease is nearly used up."""
AWAY_S = 0.5
"""How often a Redis that is away is asked."""
ANSWER_S = 1.0
"""A Redis that has not answered within this time is away."""
LARGEST_S = 3.0
"""How long the room for a request that was refused is kept ahead: its client tries again."""
BUDGETS_AT_ONCE = 200
LEARNED_MAX = 100_000
"""Of how many budgets a process that starts learns."""

LEASE = Script(
    ("budgets",),
    """
local function number(key, field) return tonumber(redis.call('HGET', key, field) or '0') end
local function digits(value) return string.format('%.0f', value) end

redis.call('SET', KEYS[1], ARGV[2], 'NX')
local answer = {redis.call('GET', KEYS[1])}
local in_use, now_s = KEYS[1] .. ':in_use', tonumber(redis.call('TIME')[1])
redis.call('ZREMRANGEBYSCORE', in_use, '-inf', now_s)
for index = 2, #KEYS do
  local key, at = KEYS[index], 4 * index - 5
  local limit, spent, want = tonumber(ARGV[at]), tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
  local mine = number(key, ARGV[1])
  local others = number(key, 'total') - mine
  local held = math.max(spent, math.min(want, math.max(mine, limit - others)))
  redis.call('HSET', key, ARGV[1], digits(held), 'total', digits(others + held))
  redis.call('EXPIRE', key, ARGV[at + 3])
  redis.call('ZADD', in_use, now_s + ARGV[at + 3], key)
  answer[#answer + 1] = held
  answer[#answer + 1] = others + held
end
return answer
""",
)
"""Lease parts of budgets, or give parts back. The keys after the first are one budget's window each.

The arguments are the replica, a mark, and for each budget its limit, what the replica has rightly spent, what it wants
to hold in all, and the seconds until the window can be forgotten. These are totals, so that a repeated call changes
nothing. Return the mark, which differs after a loss of data, and for each budget what the replica holds and what all
hold. A replica's claim to what it has spent restores lost data. A sorted set has the keys of all budgets by their ends;
it is in the slot of the others, though not among the arguments.
"""

LEARN = Script(
    ("budgets",),
    """
local page = redis.call('ZSCAN', KEYS[1] .. ':in_use', ARGV[1], 'COUNT', 1000)
local answer = {page[1]}
for index = 1, #page[2], 2 do
  answer[#answer + 1] = page[2][index]
  answer[#answer + 1] = tonumber(redis.call('HGET', page[2][index], 'total') or '0')
  answer[#answer + 1] = tonumber(redis.call('HGET', page[2][index], 'of:moved') or '0')
end
return answer
""",
)
"""Return the next cursor after the one that is the argument, and a page of the budgets with what all replicas hold.

After that how much of it was moved there from a file.
"""
MOVED = "of:moved"
"""The replica that holds what was moved there."""


class Leases:
    """Implements `meters.Sharing` for replica `member`. `replicas` returns how many there are, with this one.

    `run` asks Redis until it is cancelled. While Redis is away `replicas` may return fewer than there are: the number
    at the last answer stands then. It is kept in the file `kept`, for a process that starts meanwhile.
    """

    def __init__(
        self,
        link: Link,
        member: str,
        replicas: Callable[[], int],
        clock: Callable[[], float],
        kept: Path | None = None,
    ) -> None:
        self._link = link
        self._field = f"of:{member}"
        self._count = replicas
        self._kept = kept
        self._counted = max(1, replicas(), 0 if kept is None else _number_in(kept))
        self._has_heard = False
        self._clock = clock
        self._mark = token_hex(8)
        self._known: WeakSet[Meter] = WeakSet()
        self._learned: dict[str, list[Former]] = {}
        self._used: dict[str, Meter] = {}
        self._urgent: dict[str, Meter] = {}
        self._woken = asyncio.Event()
        self._asking = asyncio.Lock()
        self.is_away = False

    # For meters.

    @property
    def gets_more(self) -> bool:
        return not self.is_away

    @property
    def replicas(self) -> int:
        return self._counted

    def allowance(self, meter: Meter) -> int:
        lease, replicas = meter.lease, self.replicas
        part = (meter.limit - (lease.total or 0)) // replicas
        if self.is_away and part > 0:
            return max(lease.held, min(meter.limit // replicas, lease.held + part))
        return min(meter.limit, lease.held + part)  # of a limit that was lowered, less than what is held

    def cleared(self, meter: Meter) -> int:
        return self.allowance(meter) if self.is_away else meter.lease.held

    def held_by_others(self, meter: Meter) -> int:
        return max(0, (meter.lease.total or 0) - meter.lease.held)

    def former(self, key: str) -> list[Former]:
        return self._learned.pop(key, [])

    def touched(self, meter: Meter, missed: int = 0) -> None:
        lease = meter.lease
        if missed:
            lease.missed += missed
            lease.largest = max(lease.largest, missed)
            lease.largest_until_s = self._clock() + LARGEST_S
        if (
            missed
            or lease.total is None
            or (lease.total < meter.limit and meter.taken + meter.pending + lease.recent / 4 > lease.held)
        ):
            self._urgent[meter.key] = meter
            self._woken.set()
        else:
            self._used[meter.key] = meter

    # For Redis.

    async def learn(self) -> None:
        """Ask what is taken of all budgets, before the first request: to this process all of each looks left."""
        try:
            async for (key, window, total), moved in read_taken(self._link):
                if len(self._learned) < LEARNED_MAX:
                    self._learned.setdefault(key, []).append(Former(window, 0, moved, 0, total))
        except FAULTS as error:
            self._is_away(error)

    async def run(self) -> None:
        """Ask Redis about the budgets in use, until cancelled."""
        async for is_time in rounds(self._woken, EACH_S, lambda: AWAY_S if self.is_away else GATHER_S):
            await self.ask(urgent_only=not is_time)

    async def close(self) -> None:
        """Close the connection to Redis."""
        await self._link.close()

    async def ask(self, urgent_only: bool = False) -> None:
        """Ask Redis about the budgets in use, once."""
        count = max(1, self._count())
        if self.is_away or not self._has_heard:
            count = max(count, self._counted)
        if count != self._counted:
            self._counted = count
            if self._kept is not None:
                await asyncio.to_thread(_write_number, self._kept, count)
        async with self._asking:  # of two answers about one budget the older one could come last
            asked, self._urgent = self._urgent, {}
            if not urgent_only:
                asked, self._used = asked | self._used, {}
            meters = list(asked.values())
            for start in range(0, len(meters), BUDGETS_AT_ONCE):
                if not await self._ask(meters[start : start + BUDGETS_AT_ONCE]):
                    self._used |= {meter.key: meter for meter in meters[start:]}
                    break

    async def _ask(self, meters: Sequence[Meter]) -> bool:
        """Ask about some budgets; return False if Redis does not answer."""
        now_s = self._clock()
        keys = ["budgets"]
        arguments: list[str | int] = [self._field, self._mark]
        asked = []
        for meter in meters:
            meter.turn(now_s)
            spent, want = min(meter.taken, self.cleared(meter)), self._want(meter, now_s)
            if not self.is_away:
                # Given back before Redis is asked: what is taken meanwhile must not be what it then gives to another.
                meter.lease.held = min(meter.lease.held, max(spent, want))
            self._known.add(meter)
            asked.append((meter, meter.window, want))
            arguments += (meter.limit, spent, want, 2 * meter.number.seconds)
            if meter.left.window > meter.window:  # the clock was ahead: what was leased there counts here now
                asked.append((meter, meter.left.window, 0))
                arguments += (meter.limit, 0, 0, 2 * meter.number.seconds)
        keys += [f"budget:{meter.key}:{window}" for meter, window, _ in asked]
        try:
            async with asyncio.timeout(ANSWER_S):
                mark, *answers = await self._link.run(replace(LEASE, keys=tuple(keys)), *arguments)
        except FAULTS as error:
            self._is_away(error)
            return False
        for (meter, window, want), held, total in zip(asked, answers[::2], answers[1::2], strict=True):
            if meter.window == window:
                meter.lease.held, meter.lease.total = held, total
            elif window > meter.window:
                meter.left = Left(meter.window, 0, 0, 0)
            if want > meter.taken or meter.taken > held:  # there is a lease to give back, or one to get
                self._used.setdefault(meter.key, meter)
        self._answered(mark)
        return True

    def _want(self, meter: Meter, now_s: float) -> int:
        """Return what a replica wants to hold of a budget: what it has taken, and about a second of use."""
        lease = meter.lease
        used = max(0, meter.taken - lease.counted) + lease.missed
        since_s = max(0.0, now_s - lease.asked_s)
        # What was used since then is counted as if it had come evenly, or within the last second.
        spread_s = min(since_s, 1.0)
        weight = (1 - math.exp(-spread_s)) / spread_s if spread_s else 1.0
        lease.recent = lease.recent * math.exp(-since_s) + used * weight
        lease.counted, lease.asked_s, lease.missed = meter.taken, now_s, 0
        if not now_s < lease.largest_until_s <= now_s + LARGEST_S:
            lease.largest = 0
        return min(meter.limit, meter.taken + meter.pending + max(round(lease.recent), lease.largest))

    def _is_away(self, error: BaseException) -> None:
        if not self.is_away:
            self.is_away = True
            logger.warning(
                "%s does not answer: each of %d replicas goes on with its share of what is left of each budget: %s",
                self._link, self._counted, self._link.describe(error),
            )  # fmt: skip

    def _answered(self, mark: str) -> None:
        self._has_heard = True
        if not self.is_away and mark == self._mark:
            return
        if self.is_away:
            logger.info("%s answers again: budgets are shared by use", self._link)
        # Redis may have lost what was leased: say again what is spent, for budgets that are not in use now, too.
        for meter in list(self._known):
            meter.turn(self._clock())
            meter.lease.held = max(meter.lease.held, min(meter.taken, self.cleared(meter)))
            if meter.taken:
                self._urgent[meter.key] = meter
        self._woken.set()
        self._mark = mark
        self.is_away = False


async def read_taken(link: Link) -> AsyncIterator[tuple[Taken, int]]:
    """Yield what all replicas hold of each budget, and how much of it was moved there. Raises FAULTS."""
    cursor = None
    while cursor != "0":
        async with asyncio.timeout(ANSWER_S):
            cursor, *found = await link.run(LEARN, cursor or 0)
        for place, total, moved in zip(found[::3], found[1::3], found[2::3], strict=True):
            key, window = place.removeprefix(link.key("budget:")).rsplit(":", 1)
            yield (key, int(window), total), moved


async def write_taken(link: Link, taken: Sequence[Taken]) -> None:
    """Have what was taken elsewhere count until its window turns. Raises FAULTS."""
    for start in range(0, len(taken), BUDGETS_AT_ONCE):
        some = taken[start : start + BUDGETS_AT_ONCE]
        keys = tuple(f"budget:{key}:{window}" for key, window, _ in some)
        numbers = [number for key, _, total in some for number in (total, total, total, 2 * seconds_of(key))]
        await link.run(replace(LEASE, keys=("budgets", *keys)), MOVED, token_hex(8), *numbers)


def _number_in(file: Path) -> int:
    """Return the number in a file, 0 if there is none."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return 0


def _write_number(file: Path, number: int) -> None:
    try:
        file.write_text(str(number))
    except OSError as error:
        logger.warning(
            "%s: %s; a restart while Redis is away would take the whole of each budget", file, error.strerror
        )
