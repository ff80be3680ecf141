"""Who is there, and who holds which lease, as Redis has it. Who wants which one is decided elsewhere.

A member lives for as long as it beats. A lease is a right over one backend that ends by itself; its epoch rises with
each new holder and never falls, so of two that believe to hold it everybody can tell the later one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sidecar.state.redis.link import FAULTS, Link
from sidecar.state.redis.scripts import ACQUIRE, BEAT, RELEASE, RENEW, Script

MEMBER_TTL_S = 6.0
"""How long after its last beat a member counts as live."""
FORGOTTEN_S = 24 * 3600.0
"""How long what a silent member said of itself is kept."""


@dataclass(frozen=True)
class Member:
    """A live member: what it says of itself (JSON), the last change that it has read, and how old its beat is."""

    name: str
    info: str
    applied: int
    age_ms: int


@dataclass(frozen=True)
class Lease:
    """Who holds a backend, by a random token, until `ends_ms` in Redis' time. Given back, its epoch stays."""

    backend: str
    epoch: int
    token: str
    ends_ms: int
    member: str

    def is_held(self, now_ms: int) -> bool:
        return bool(self.token) and self.ends_ms > now_ms


@dataclass(frozen=True)
class Beat:
    """What a beat brought back: Redis' time, its last change, which state it is, the live members and all leases.

    An `incarnation` of "" says that this Redis is empty.
    """

    now_ms: int
    revision: int
    incarnation: str
    members: tuple[Member, ...]
    leases: tuple[Lease, ...]


@dataclass(frozen=True)
class Answer:
    """Whether a lease was granted or prolonged, how it stands now, and Redis' time."""

    granted: bool
    lease: Lease
    now_ms: int


class RedisMembers:
    """Members and leases in a Redis. All methods raise Refused(STATE_UNAVAILABLE) while it is away."""

    def __init__(self, link: Link, member_ttl_s: float = MEMBER_TTL_S) -> None:
        self._link = link
        self._ttl_ms = int(member_ttl_s * 1000)

    async def beat(self, member: str, info: str, applied: int) -> Beat:
        """Say that a member lives, what it is and what it has read; return who else does, and all leases."""
        now_ms, revision, incarnation, members, leases = await self._ask(
            BEAT, member, info, applied, self._ttl_ms, int(FORGOTTEN_S * 1000)
        )
        return Beat(
            int(now_ms),
            int(revision),
            incarnation,
            tuple(Member(name, told, int(read), int(age_ms)) for name, told, read, age_ms in sorted(members)),
            tuple(sorted(map(_lease, leases[::2], leases[1::2]), key=lambda lease: lease.backend)),
        )

    async def leave(self, member: str) -> None:
        """Take a member off at once: nobody waits for it any more."""
        try:
            await self._link.forget_member(member)
        except FAULTS as error:
            raise self._link.refused(error) from error

    async def acquire(self, backend: str, member: str, token: str, ttl_ms: int, least_epoch: int) -> Answer:
        """Take a lease if nobody holds it, or this token does; a new holder's epoch is above `least_epoch`."""
        granted, value, now_ms = await self._ask(ACQUIRE, backend, member, token, ttl_ms, least_epoch)
        return Answer(bool(granted), _lease(backend, value), int(now_ms))

    async def renew(self, backend: str, token: str, ttl_ms: int) -> Answer:
        """Prolong a lease that this token holds; not granted when it has ended or is another's."""
        granted, value, now_ms = await self._ask(RENEW, backend, token, ttl_ms)
        return Answer(bool(granted), _lease(backend, value), int(now_ms))

    async def release(self, backend: str, token: str) -> bool:
        """Give a lease back; return False when this token does not hold it (any more)."""
        return bool(await self._ask(RELEASE, backend, token))

    async def _ask(self, script: Script, *arguments: str | int) -> Any:
        try:
            return await self._link.run(script, *arguments)
        except FAULTS as error:
            raise self._link.refused(error) from error


def _lease(backend: str, value: str) -> Lease:
    epoch, token, ends_ms, member = value.split(":", 3)
    return Lease(backend, int(epoch), token, int(ends_ms), member)
