"""Members and leases in Redis, for the keeper of one replica."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from sidecar.errors import Reason, Refused
from sidecar.ownership import effects as do
from sidecar.ownership import events as ev
from sidecar.ownership.facts import Member
from sidecar.state.redis.members import RedisMembers

T = TypeVar("T")


class RedisLeases:
    """Implements `keeper.Leases`. `address` is the member's address, `applied` returns the last change it has read.

    A Redis that has not answered for a quarter of a lease (`ttl_s`) counts as unreachable. An owner renews with two
    thirds of its lease left: enough for it, and then for the members that it asks, to find Redis unreachable.
    """

    def __init__(
        self, members: RedisMembers, member: Member, address: str, applied: Callable[[], int], ttl_s: float
    ) -> None:
        self._members = members
        self._limit_s = ttl_s / 4
        self._member = member
        self._address = address
        self._applied = applied

    async def beat(self, effect: do.SendBeat) -> tuple[ev.BeatAnswered, dict[str, str]]:
        beat = await self._in_time(self._members.beat(effect, self._address, self._applied()))
        return beat.answered, {standing.member.id: standing.info for standing in beat.standings}

    async def leave(self, effect: do.SendLeave) -> None:
        await self._in_time(self._members.leave(effect))

    async def acquire(self, effect: do.SendAcquire) -> ev.LeaseAnswered:
        return await self._in_time(self._members.acquire(effect, self._member))

    async def renew(self, effect: do.SendRenew) -> ev.LeaseAnswered:
        return await self._in_time(self._members.renew(effect))

    async def release(self, effect: do.SendRelease) -> None:
        await self._in_time(self._members.release(effect))

    async def _in_time(self, call: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self._limit_s):
                return await call
        except TimeoutError as error:
            message = f"Redis has not answered for {self._limit_s:.2g} s; it is asked again"
            raise Refused(Reason.STATE_UNAVAILABLE, message) from error
