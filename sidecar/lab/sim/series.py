"""What happened when: counts and levels by interval, in bounded memory however long a run is.

There are at most so many intervals. When time passes the last one, neighbours are added up in pairs and the interval
doubles, so that the series always covers the whole run.
"""

from __future__ import annotations

from itertools import zip_longest

BUCKETS_MAX = 512
INTERVAL_NS = 100_000_000


class Series:
    """Counts of what happened, and the mean of what was the case, by interval since the first thing noted."""

    def __init__(self, interval_ns: int = INTERVAL_NS, buckets_max: int = BUCKETS_MAX) -> None:
        self.interval_ns = interval_ns
        self.begin_ns = 0
        self._buckets_max = buckets_max
        self._counts: dict[str, list[int]] = {}
        self._areas: dict[str, list[int]] = {}
        """The integral of each level over each interval: one thing for one ns is 1."""
        self._levels: dict[str, tuple[int, int]] = {}
        """Each level's value, and until when its integral is up to date."""

    def add(self, kind: str, now_ns: int, amount: int = 1) -> None:
        """Count something that happens now."""
        bucket = self._bucket(now_ns)
        self._put(self._counts.setdefault(kind, []), bucket, amount)

    def change(self, level: str, now_ns: int, by: int) -> None:
        """Note that from now on there are so many more, or fewer."""
        self._bucket(now_ns)
        value, since_ns = self._levels.get(level, (0, now_ns))
        if value:
            self._integrate(self._areas.setdefault(level, []), value, since_ns, now_ns)
        self._levels[level] = (value + by, now_ns)

    def counts(self, kind: str) -> list[int]:
        """Return how many there were in each interval; the last one may be cut short by the end of the run."""
        return list(self._counts.get(kind, ()))

    def means(self, level: str, ended_ns: int) -> list[float]:
        """Return the mean level in each interval up to the end of the run."""
        areas = self._areas.get(level, [])
        begins_ns = range(self.begin_ns, ended_ns, self.interval_ns)
        spans_ns = [min(self.interval_ns, ended_ns - begin_ns) for begin_ns in begins_ns]
        return [area / span_ns for area, span_ns in zip_longest(areas[: len(spans_ns)], spans_ns, fillvalue=0)]

    def _bucket(self, now_ns: int) -> int:
        """Return the interval of a time, after doubling until there is one."""
        self.begin_ns = self.begin_ns or now_ns
        while (now_ns - self.begin_ns) // self.interval_ns >= self._buckets_max:
            self.interval_ns *= 2
            for series in (self._counts, self._areas):
                for name, values in series.items():
                    series[name] = [sum(values[at : at + 2]) for at in range(0, len(values), 2)]
        return (now_ns - self.begin_ns) // self.interval_ns

    def _integrate(self, areas: list[int], value: int, since_ns: int, until_ns: int) -> None:
        while since_ns < until_ns:
            bucket = self._bucket(since_ns)
            end_ns = min(until_ns, self.begin_ns + (bucket + 1) * self.interval_ns)
            self._put(areas, bucket, value * (end_ns - since_ns))
            since_ns = end_ns

    @staticmethod
    def _put(values: list[int], bucket: int, amount: int) -> None:
        if bucket >= len(values):
            values.extend([0] * (bucket + 1 - len(values)))
        values[bucket] += amount
