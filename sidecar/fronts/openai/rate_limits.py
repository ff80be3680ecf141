"""What remains of a tenant's limits, in the headers that OpenAI's clients read."""

from __future__ import annotations

from sidecar.access.budgets.budgets import Standing


def headers_of(standing: Standing) -> tuple[tuple[bytes, bytes], ...]:
    """Return the headers of the limits that there are."""
    headers = []
    for unit, level in (("requests", standing.requests), ("tokens", standing.tokens)):
        if level is not None:
            for what, value in (
                ("limit", str(level.limit)),
                ("remaining", str(level.remaining)),
                ("reset", duration(level.resets_s)),
            ):
                headers.append((f"x-ratelimit-{what}-{unit}".encode(), value.encode()))
    return tuple(headers)


def duration(seconds: float) -> str:
    """Return a duration as Go writes one, to the millisecond, as in "6m0s", "1.5s" and "20ms"."""
    ms = round(seconds * 1000)
    if ms < 1000:
        return f"{ms}ms" if ms else "0s"
    minutes, ms = divmod(ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{ms / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    if hours or minutes:
        text = f"{minutes}m{text}"
    return f"{hours}h{text}" if hours else text
