"""The headers of OpenAI that say what remains of a limit."""

from __future__ import annotations

import pytest

from sidecar.access.budgets.budgets import Level, Standing
from sidecar.fronts.openai.rate_limits import duration, headers_of


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1, "1s"),
        (360, "6m0s"),
        (0, "0s"),
        (0.3, "300ms"),
        (0.9996, "1s"),
        (1.5, "1.5s"),
        (72 * 3600 + 3 * 60 + 0.5, "72h3m0.5s"),
        (4530.918, "1h15m30.918s"),
        (3600, "1h0m0s"),
    ],
)
def test_a_duration_is_written_as_openai_and_go_write_it(seconds: float, text: str) -> None:
    """The first two are OpenAI's examples, others are in the documentation of Go's package time."""
    assert duration(seconds) == text


def test_the_names_of_the_headers() -> None:
    """The names and values are those of OpenAI's table of rate limits in headers."""
    standing = Standing(Level(60, 59, 1), Level(150_000, 149_984, 360))
    assert dict(headers_of(standing)) == {
        b"x-ratelimit-limit-requests": b"60",
        b"x-ratelimit-limit-tokens": b"150000",
        b"x-ratelimit-remaining-requests": b"59",
        b"x-ratelimit-remaining-tokens": b"149984",
        b"x-ratelimit-reset-requests": b"1s",
        b"x-ratelimit-reset-tokens": b"6m0s",
    }


def test_without_limits_there_are_no_headers() -> None:
    assert headers_of(Standing()) == ()
    assert [name for name, _ in headers_of(Standing(tokens=Level(1, 1, 1)))] == [
        b"x-ratelimit-limit-tokens",
        b"x-ratelimit-remaining-tokens",
        b"x-ratelimit-reset-tokens",
    ]
