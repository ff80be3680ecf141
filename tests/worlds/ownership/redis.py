"""A model of Redis' part in ownership: each method is one atomic script, by Redis' own clock.

A generation is one life of one Redis process as a primary: a script tells it by `run_id` and `master_replid` of
`INFO`. When a script finds another generation in the data, or none, it writes its own and the time: that is the birth.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field

from sidecar.ownership import effects as do
from sidecar.ownership import events as ev
from sidecar.ownership.facts import SECOND_NS, Bounds, Lease, Member

MILLISECOND_NS = 1_000_000


@dataclass
class Record:
    """A lease: held, ended or released. Only a lease released long ago is deleted."""

    holder: str
    holder_name: str
    token: str
    epoch: int
    generation: str
    renewed_ns: int
    number: int
    witnesses: tuple[str, ...]
    released: bool = False


@dataclass
class Data:
    """The data that a restart may keep, lose or revert."""

    generation: str = ""
    born_ns: int = 0
    members: dict[str, tuple[Member, int]] = field(default_factory=dict)
    """A member and until when it is taken to live."""
    leases: dict[str, Record] = field(default_factory=dict)

    def copy(self) -> Data:
        return deepcopy(self)


class Redis:
    """One process. `now_ns` of each call is the time of its host."""

    def __init__(self, bounds: Bounds, process: str, data: Data, released_kept_ns: int = 3600 * SECOND_NS) -> None:
        self.bounds = bounds
        self._kept_ns = released_kept_ns
        self.process = process
        self.data = data

    def beat(self, number: int, member: Member, now_ns: int) -> ev.BeatAnswered:
        self._settle(now_ns)
        data = self.data
        data.members[member.id] = (member, now_ns + self.bounds.ttl_ns)
        data.members = {id_: entry for id_, entry in data.members.items() if now_ns < entry[1]}
        data.leases = {
            backend: record
            for backend, record in data.leases.items()
            if not (record.released and now_ns - record.renewed_ns > self._kept_ns)
        }
        members = tuple(entry[0] for _, entry in sorted(data.members.items()))
        leases = tuple(
            self._lease(backend, record, now_ns)
            for backend, record in sorted(data.leases.items())
            if record.generation == data.generation
        )
        return ev.BeatAnswered(number, data.generation, now_ns, self.newborn_ns(now_ns), members, leases)

    def leave(self, member: str, now_ns: int) -> None:
        """Remove a member and release all its leases, so that nobody waits for one whose release got lost."""
        self._settle(now_ns)
        self.data.members.pop(member, None)
        for record in self.data.leases.values():
            record.released |= record.holder == member

    def acquire(self, call: do.SendAcquire, member: Member, now_ns: int) -> ev.LeaseAnswered:
        self._settle(now_ns)
        record = self.data.leases.get(call.backend)
        if record is not None and self._is_current(record) and record.token == call.token and not record.released:
            return ev.LeaseAnswered(call.number, True, record.epoch, member.id, self.data.generation, now_ns)
        if not self._grants(call, record, now_ns):
            return self._refused(call.number, call.backend, now_ns)
        stored = 0 if record is None else record.epoch
        if not self._is_current(record):
            # Epochs that were lost with their generation were of its milliseconds. Nobody but their holders acquires
            # for `grace_ns` after a birth, so hosts of Redis may even differ by as much.
            stored = max(stored, now_ns // MILLISECOND_NS)
        epoch = max(stored, call.least_epoch) + 1
        self.data.leases[call.backend] = Record(
            member.id, member.name, call.token, epoch, self.data.generation, now_ns, call.number, call.witnesses
        )
        return ev.LeaseAnswered(call.number, True, epoch, member.id, self.data.generation, now_ns)

    def _grants(self, call: do.SendAcquire, record: Record | None, now_ns: int) -> bool:
        if call.generation != self.data.generation or now_ns > call.by_ns:
            return False
        if record is None or not self._is_current(record):
            return call.holds or self.newborn_ns(now_ns) <= 0
        if record.released:
            return record.token != call.token
        if now_ns < record.renewed_ns + self.bounds.ttl_ns:
            return False
        if not {record.holder, *record.witnesses}.isdisjoint(call.agreed):
            return True
        return now_ns >= record.renewed_ns + self.bounds.grace_ns

    def renew(self, call: do.SendRenew, now_ns: int) -> ev.LeaseAnswered:
        self._settle(now_ns)
        record = self.data.leases.get(call.backend)
        if record is None or not self._is_current(record) or record.token != call.token or record.released:
            return self._refused(call.number, call.backend, now_ns)
        if call.number > record.number:
            record.number, record.witnesses, record.renewed_ns = call.number, call.witnesses, now_ns
        return ev.LeaseAnswered(call.number, True, record.epoch, record.holder, self.data.generation, now_ns)

    def release(self, call: do.SendRelease, now_ns: int) -> None:
        self._settle(now_ns)
        record = self.data.leases.get(call.backend)
        if record is not None and record.token == call.token:
            record.released = True

    def newborn_ns(self, now_ns: int) -> int:
        """Return until when only those who hold a lease already get one of which this generation does not know."""
        return self.data.born_ns + self.bounds.grace_ns - now_ns

    def _settle(self, now_ns: int) -> None:
        """Begin a generation if the data are of none or of another."""
        data = self.data
        if data.generation != self.process:
            data.generation, data.born_ns = self.process, now_ns
            data.members = {id_: (member, now_ns + self.bounds.ttl_ns) for id_, (member, _) in data.members.items()}

    def _is_current(self, record: Record | None) -> bool:
        return record is not None and record.generation == self.data.generation

    def _refused(self, number: int, backend: str, now_ns: int) -> ev.LeaseAnswered:
        record = self.data.leases.get(backend)
        holder = record.holder if record is not None and self._is_current(record) and not record.released else ""
        epoch = 0 if record is None else record.epoch
        return ev.LeaseAnswered(number, False, epoch, holder, self.data.generation, now_ns)

    def _lease(self, backend: str, record: Record, now_ns: int) -> Lease:
        left_ns = 0 if record.released else record.renewed_ns + self.bounds.ttl_ns - now_ns
        unattended_ns = record.renewed_ns + self.bounds.grace_ns - now_ns
        return Lease(
            backend,
            record.holder,
            record.holder_name,
            record.epoch,
            left_ns,
            unattended_ns,
            record.witnesses,
            record.released,
        )
