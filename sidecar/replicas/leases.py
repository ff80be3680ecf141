"""Members and leases in Redis, as the keeper of one replica calls for them."""

from __future__ import annotations

from collections.abc import Callable

from sidecar.ownership import effects as do
from sidecar.ownership import events as ev
from sidecar.ownership.facts import Member
from sidecar.state.redis.members import RedisMembers


class RedisLeases:
    """`keeper.Leases`. `address` is where the member is reached, `applied` says which change it has read."""

    def __init__(self, members: RedisMembers, member: Member, address: str, applied: Callable[[], int]) -> None:
        self._members = members
        self._member = member
        self._address = address
        self._applied = applied

    async def beat(self, effect: do.SendBeat) -> tuple[ev.BeatAnswered, dict[str, str]]:
        beat = await self._members.beat(effect, self._address, self._applied())
        return beat.answered, {standing.member.id: standing.info for standing in beat.standings}

    async def leave(self, effect: do.SendLeave) -> None:
        await self._members.leave(effect)

    async def acquire(self, effect: do.SendAcquire) -> ev.LeaseAnswered:
        return await self._members.acquire(effect, self._member)

    async def renew(self, effect: do.SendRenew) -> ev.LeaseAnswered:
        return await self._members.renew(effect)

    async def release(self, effect: do.SendRelease) -> None:
        await self._members.release(effect)
