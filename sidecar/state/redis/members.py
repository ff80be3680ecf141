"""Members and leases in Redis: carries out the effects of `sidecar.ownership` and returns its events."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sidecar.errors import Misused, Reason
from sidecar.ownership.effects import SendAcquire, SendBeat, SendLeave, SendRelease, SendRenew
from sidecar.ownership.events import BeatAnswered, LeaseAnswered
from sidecar.ownership.facts import Bounds, Lease, Member
from sidecar.state.redis.link import FAULTS, Link
from sidecar.state.redis.member_scripts import ACQUIRE, BEAT, LEAVE, LIVE, RELEASE, RENEW
from sidecar.state.redis.scripts import Script

WIRE = 4
"""The number of the format of what replicas send to each other, and keep in Redis for each other."""
MEMBER_TTL_S = Bounds().ttl_ns / 1e9
"""How long a member counts as live after its last beat."""


@dataclass(frozen=True)
class Standing:
    """A live member, its `info` (its address), and the last change that it has read."""

    member: Member
    info: str
    applied: int


@dataclass(frozen=True)
class Beat:
    """The answer to a beat: the event for ownership, the live members, and the state of the registry.

    `incarnation` is "" while this Redis holds no registry.
    """

    answered: BeatAnswered
    standings: tuple[Standing, ...]
    revision: int
    incarnation: str


class RedisMembers:
    """Members and leases in Redis. All methods raise Refused(STATE_UNAVAILABLE) while it is unreachable.

    A released lease is removed `released_kept_s` after its last renewal.
    """

    def __init__(self, link: Link, bounds: Bounds | None = None, released_kept_s: float = 3600.0) -> None:
        self._link = link
        self._kept_us = int(released_kept_s * 1e6)
        self._bounds = bounds or Bounds()
        self._ttl_us, self._grace_us = self._bounds.ttl_ns // 1000, self._bounds.grace_ns // 1000

    async def refuse_other_wires(self) -> None:
        """Raise Misused(STATE_INCOMPATIBLE) if a live replica has another number than `WIRE`.

        Two that start in the same moment may both pass; beats leave out the other one then.
        """
        for report in filter(None, await self._ask(LIVE, self._ttl_us)):
            wire, name = _read(report)[:2]
            if wire != WIRE:
                raise Misused(
                    Reason.STATE_INCOMPATIBLE,
                    f'replica "{name}" has wire format {wire}, and this version has {WIRE}; end the replicas of the '
                    "other version first, or give this one a state.key_prefix of its own",
                )

    async def beat(self, call: SendBeat, info: str, applied: int) -> Beat:
        """Send a member's beat, with its info and the last change that it has read."""
        member = call.member
        report = json.dumps([WIRE, member.name, member.weight, member.draining, info])
        generation, now_us, newborn_us, members, leases, revision, incarnation = await self._ask(
            BEAT, member.id, report, applied, self._ttl_us, self._grace_us, self._kept_us
        )
        ours = (_standing(*found) for found in members if _read(found[1])[0] == WIRE)
        standings = tuple(sorted(ours, key=lambda found: found.member.id))
        answered = BeatAnswered(
            call.number,
            generation,
            int(now_us) * 1000,
            int(newborn_us) * 1000,
            tuple(standing.member for standing in standings),
            tuple(self._lease(backend, text, int(now_us)) for backend, text in sorted(leases)),
        )
        return Beat(answered, standings, int(revision), incarnation)

    async def leave(self, call: SendLeave) -> None:
        """Remove a member at once and release its leases."""
        await self._ask(LEAVE, call.member)

    async def acquire(self, call: SendAcquire, member: Member) -> LeaseAnswered:
        """Acquire a lease for a member, if that is safe."""
        return await self._answered(
            call.number,
            ACQUIRE,
            call.backend,
            call.token,
            call.least_epoch,
            json.dumps(call.witnesses),
            json.dumps(call.agreed),
            int(call.holds),
            call.generation,
            call.by_ns // 1000,
            member.id,
            member.name,
            call.number,
            self._ttl_us,
            self._grace_us,
        )

    async def renew(self, call: SendRenew) -> LeaseAnswered:
        """Renew a lease."""
        return await self._answered(
            call.number, RENEW, call.backend, call.token, call.number, json.dumps(call.witnesses)
        )

    async def release(self, call: SendRelease) -> None:
        """Release a lease."""
        await self._ask(RELEASE, call.backend, call.token)

    def _lease(self, backend: str, text: str, now_us: int) -> Lease:
        record = json.loads(text)
        since_ns = (now_us - int(record["renewed"])) * 1000
        return Lease(
            backend,
            record["holder"],
            record["name"],
            int(record["epoch"]),
            0 if record["released"] else self._bounds.ttl_ns - since_ns,
            self._bounds.grace_ns - since_ns,
            tuple(json.loads(record["witnesses"])),
            record["released"],
        )

    async def _answered(self, number: int, script: Script, *arguments: str | int) -> LeaseAnswered:
        granted, epoch, holder, generation, now_us = await self._ask(script, *arguments)
        return LeaseAnswered(number, bool(granted), int(epoch), holder, generation, int(now_us) * 1000)

    async def _ask(self, script: Script, *arguments: str | int) -> Any:
        try:
            return await self._link.run(script, *arguments)
        except FAULTS as error:
            raise self._link.refused(error) from error


def _standing(identity: str, report: str, applied: str) -> Standing:
    _, name, weight, draining, info = _read(report)
    return Standing(Member(identity, name, weight, draining), info, int(applied))


def _read(report: str) -> Sequence[Any]:
    """Return what a member tells of itself: its wire format's number, and at least its name."""
    found = json.loads(report or '["?"]')
    return found if isinstance(found[0], int) else [0, *found]  # before there was a number
