"""What Envoy's access log tells of answers that this process does not see: how many bytes, and how they ended."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from time import monotonic

from sidecar.backends.http_client import Ending, Sighting
from sidecar.backends.unseen import Sightings
from sidecar.fronts.extproc.replies import EXCHANGE, OURS, REPLICA
from sidecar.proto import envoy_pb2 as envoy

LOST_S, ALIVE_S = 15.0, 5.0
"""How long the log says nothing of an answer, while it goes on telling of others, before its end counts as lost."""
OFTEN_S, FADING = 1.5, 0.9
"""An engine whose answers are told of so often has to be heard of, as if they came here."""
_LEFT = ("downstream_connection_termination", "downstream_remote_reset", "downstream_protocol_error")
_LATE = ("upstream_request_timeout", "duration_timeout", "upstream_max_stream_duration_reached")
_BROKE = (
    "upstream_remote_reset",
    "upstream_connection_termination",
    "upstream_protocol_error",
    "upstream_connection_failure",
    "upstream_overflow",
    "no_healthy_upstream",
    "local_reset",
    "stream_idle_timeout",
    "overload_manager",
)
"""Flags of an entry, in the order in which they tell: a client that leaves makes Envoy reset the engine's side, too."""


class Watched(Sightings):
    """What the log tells of one exchange."""

    def __init__(self, log: AccessLog, exchange: str) -> None:
        super().__init__()
        self._log, self._exchange = log, exchange
        self._has_told = False

    def take(self, sighting: Sighting) -> None:
        if sighting.ending is None:
            if self._has_told:
                self._log.note_gap(monotonic() - self.told_s)
            self._has_told = True
        super().take(sighting)

    @property
    def tells(self) -> bool:
        return self._log.gap_s <= OFTEN_S

    @property
    def is_lost(self) -> bool:
        now_s = monotonic()
        return self._log.is_periodic and now_s - self.told_s > LOST_S and now_s - self._log.told_s < ALIVE_S

    def close(self) -> None:
        """Forget it."""
        self._log.forget(self._exchange)


class AccessLog:
    """The exchanges whose ends Envoy's log has yet to tell. Entries of others, and second ones, are counted only.

    Envoy may tell any replica: entries for another one are given to `pass_on`, with its id.
    """

    def __init__(self, replica: str = "") -> None:
        self.replica = replica
        self.pass_on: Callable[[str, list[tuple[str, Sighting]]], None] = lambda replica, told: None
        self._watched: dict[str, Watched] = {}
        self.entries = {"used": 0, "passed_on": 0, "unknown": 0}
        self.told_s = 0.0
        """When the log last told of an exchange that is watched."""
        self.is_periodic = False
        """It tells of answers before they end."""
        self.gap_s = inf
        """The longest time of late between two things that it told of an answer that goes on."""

    def watch(self, exchange: str) -> Watched:
        """Begin to keep what is told of an exchange."""
        watched = self._watched[exchange] = Watched(self, exchange)
        return watched

    @property
    def unseen(self) -> int:
        """The number of answers whose rest goes past this process."""
        return sum(watched.goes_on for watched in self._watched.values())

    def note_gap(self, gap_s: float) -> None:
        """Note the time between two things that were told of an answer. Longer ones fade."""
        self.gap_s = gap_s if self.gap_s == inf else max(gap_s, FADING * self.gap_s)

    def forget(self, exchange: str) -> None:
        self._watched.pop(exchange, None)

    def take(self, message: envoy.AccessLogMessage) -> None:
        """Give the entries of a message to the exchanges that they are about."""
        others: dict[str, list[tuple[str, Sighting]]] = {}
        for entry in message.http_logs.log_entry:
            metadata = entry.common_properties.metadata.filter_metadata
            if OURS not in metadata:
                continue
            fields, sighting = metadata[OURS].fields, _sighting(entry)
            if sighting is None:
                continue
            told = fields[EXCHANGE].string_value, sighting
            if (replica := fields[REPLICA].string_value) != self.replica:
                others.setdefault(replica, []).append(told)
                continue
            self.hear(*told)
        for replica, all_told in others.items():
            self.entries["passed_on"] += len(all_told)
            self.pass_on(replica, all_told)

    def hear(self, exchange: str, sighting: Sighting) -> None:
        """Take what is told of an exchange of this replica."""
        watched = self._watched.get(exchange)
        self.entries["unknown" if watched is None else "used"] += 1
        if watched is None:
            return
        self.told_s = monotonic()
        if sighting.ending is None:
            self.is_periodic = True
        else:
            self.forget(exchange)
        watched.take(sighting)


def _sighting(entry: envoy.HttpEntry) -> Sighting | None:
    """Return what an entry tells of an answer; None for one about something else."""
    common, response = entry.common_properties, entry.response
    if common.access_log_type in (envoy.DOWNSTREAM_START, envoy.DOWNSTREAM_PERIODIC):
        return Sighting(response.response_body_bytes, None)
    if common.access_log_type not in (envoy.NOT_SET, envoy.DOWNSTREAM_END):
        return None
    flags = common.response_flags
    for names, ending in ((_LEFT, Ending.CLIENT_LEFT), (_LATE, Ending.LATE), (_BROKE, Ending.BROKE)):
        found = [name for name in names if getattr(flags, name)]
        if found:
            cause = f"{', '.join(found).replace('_', ' ')} ({response.response_code_details})"
            return Sighting(response.response_body_bytes, ending, cause)
    return Sighting(response.response_body_bytes, Ending.WHOLE)
