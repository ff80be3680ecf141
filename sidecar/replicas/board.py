"""What this replica knows of all backends, as their owners report: owner, state and load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from policies.routing.rendezvous import Rankings

SERVING, JOINING, STALLED, DRAINING, DOWN = "serving", "joining", "stalled", "draining", "down"
STALE_S = 5.0
"""After so long without a report, an owner still owns its backends, but its last load figures are ignored."""

REPORTS_KEPT_MAX = 1000
"""The number of members, former ones included, whose last report's time is kept."""
BETWEEN_S = 10.0
"""For so long, the planner uses the last standing of a backend without an owner: it will soon have another."""


@dataclass(frozen=True)
class Standing:
    """A backend as its owner reports it (a BoardBackend message), and when that was heard."""

    owner: str
    report: Any
    resident: frozenset[str]
    """The report's ids of resident versions, to be looked up for each request."""
    heard_s: float = 0.0

    @property
    def pages(self) -> int | None:
        """How many pages of adapters may be open at once; None if that is unknown."""
        return self.report.pages if self.report.HasField("pages") else None


@dataclass
class Board:
    """Standings by backend, and the plan of the member that leads: the backends of each version."""

    standings: dict[str, Standing] = field(default_factory=dict)
    plan: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    planned: tuple[int, int] = (0, 0)
    """The epoch of the plan's leader and the plan's number."""
    leader: str = ""
    """The member that made the plan."""
    former: dict[str, Standing] = field(default_factory=dict)
    """The last standings of backends under owners that have lost them."""
    restarting: dict[str, str] = field(default_factory=dict)
    """The engine that each member is restarting, if it is."""
    reported_s: dict[str, float] = field(default_factory=dict)
    """The time of each member's last report, latest last; lost members stay."""
    _rankings: Rankings = field(default_factory=Rankings)

    def heard(self, report: Any, now_s: float) -> None:
        """Replace a member's standings with those of its report. The newest epoch decides who owns a backend."""
        self.lost(report.member)
        self.reported_s.pop(report.member, None)
        self.reported_s[report.member] = now_s
        if len(self.reported_s) > REPORTS_KEPT_MAX:
            del self.reported_s[next(iter(self.reported_s))]
        for each in report.backends:
            known = self.standings.get(each.backend)
            if known is None or each.epoch > known.report.epoch:
                self.standings[each.backend] = Standing(report.member, each, frozenset(each.resident), now_s)
        if report.restarting:
            self.restarting[report.member] = report.restarting
        plan = report.plan
        if report.HasField("plan") and (plan.epoch, plan.number) > self.planned:
            self.plan = {version: tuple(hosts.backends) for version, hosts in plan.hosts.items()}
            self.planned = plan.epoch, plan.number
            self.leader = report.member

    def lost(self, member: str) -> None:
        """Drop the standings of a member that has left or cannot be reached: its backends have no known owner."""
        self.restarting.pop(member, None)
        self.former |= {backend: known for backend, known in self.standings.items() if known.owner == member}
        self.standings = {backend: known for backend, known in self.standings.items() if known.owner != member}

    def to_plan_by(self, now_s: float) -> dict[str, Standing]:
        """Return the standings, with the last ones of backends between two owners: their adapters stay resident."""
        self.former = {backend: known for backend, known in self.former.items() if now_s - known.heard_s < BETWEEN_S}
        return {**self.former, **self.standings}

    def versions_kept(self, backend: str) -> int:
        """Return how many adapter versions a backend's engine keeps, as its last known owner counted."""
        known = self.standings.get(backend) or self.former.get(backend)
        return 0 if known is None else known.report.versions_kept

    def owner_of(self, backend: str) -> str | None:
        known = self.standings.get(backend)
        return None if known is None else known.owner

    def serves(self, backend: str) -> bool:
        """Return True if a backend's owner reports that it serves."""
        known = self.standings.get(backend)
        return known is not None and known.report.state == SERVING

    def is_up(self, backend: str) -> bool:
        """Return True if a backend's owner reports that it takes requests, even if another backend is preferable."""
        known = self.standings.get(backend)
        return known is not None and known.report.state in (SERVING, JOINING, STALLED)

    def drains(self, backend: str) -> bool:
        """Return True if a backend's owner reports that it drains."""
        known = self.standings.get(backend)
        return known is not None and known.report.state == DRAINING

    def pick(self, version: str, backends: Sequence[str], now_s: float) -> str:
        """Return the backend for a request of a version, one of `backends`, which can serve it.

        A planned version goes to the planned backend with the least backlog. Any other goes to a backend where it is
        resident, else by rendezvous hashing, so that all replicas send it to the same backend; that backend may have no
        owner yet. A joining or possibly stalled backend is picked only if none serves.
        """
        up = [one for one in backends if self.serves(one)] or [one for one in backends if self.is_up(one)]
        among = [host for host in self.plan.get(version, ()) if host in up]
        if not among:
            ranked = self._rankings.of(version, tuple(backends))
            able = [one for one in ranked if one in up]
            resident = [one for one in able if version in self.standings[one].resident]
            return next(iter((*resident, *able, *ranked)))
        return min(among, key=lambda host: (self._backlog_s(host, now_s), host))

    def _backlog_s(self, backend: str, now_s: float) -> float:
        known = self.standings[backend]
        return known.report.backlog_s if now_s - known.heard_s < STALE_S else 0.0
