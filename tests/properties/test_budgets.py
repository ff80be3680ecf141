"""Budgets against a model that knows only a list of what happened, and counts it anew for each question."""

from __future__ import annotations

import asyncio
import copy
import math
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sidecar.access.budgets.budgets import Budgets, Reservation
from sidecar.access.budgets.kept import Kept
from sidecar.access.budgets.meters import Alone
from sidecar.config.access import Limit
from sidecar.errors import Refused
from tests.kit.tenant_load import Time, killed

WINDOW_S = 60


@dataclass
class Asked:
    """A request of known size: its window, what was reserved, and what it took, once that is known."""

    window: int
    reserved: int
    took: int | None = None
    ended: int = 0


class Model:
    """One budget of input tokens a minute. It answers from the list of requests and the limits in force."""

    def __init__(self, first_window: int, limit: int) -> None:
        self.first = first_window
        self.limits = {first_window: [limit]}
        self.asked: list[Asked] = []

    def _limit(self, window: int) -> int:
        """Return the greatest limit in force within a window."""
        past = [each for each in self.limits if each <= window]
        latest = max(past)
        return max(self.limits[latest]) if latest == window else self.limits[latest][-1]

    def _charged(self, window: int) -> int:
        """Return what counts in a window, without debts of former ones."""
        total = 0
        for each in self.asked:
            if each.took is None:
                total += each.reserved if each.window == window else 0
            elif each.ended == each.window:
                total += each.took if each.window == window else 0
            else:  # in its window what was reserved, or less if it is known in time; later what went beyond that
                known = min(each.reserved, each.took) if each.ended == each.window + 1 else each.reserved
                total += known if each.window == window else 0
                total += max(0, each.took - each.reserved) if each.ended == window else 0
        return total

    def taken(self, now_window: int) -> int:
        debt = 0
        for window in range(self.first, now_window):
            debt = max(0, debt + self._charged(window) - self._limit(window))
        return debt + self._charged(now_window)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.sampled_from([1, 20, 50, 100, 101])),
        st.tuples(st.just("end"), st.integers(0, 3), st.sampled_from([0, 10, 40, 80, 130, 330])),
        st.tuples(st.just("lose"), st.integers(0, 3)),
        st.tuples(st.just("wait"), st.sampled_from([20, 60, 180])),
        st.tuples(st.just("limit"), st.sampled_from([50, 100, 200])),
    ),
    min_size=10,
    max_size=40,
)
LATE: list[tuple[str, int] | tuple[str, int, int]] = [
    ("ask", 20), ("ask", 40), ("ask", 40), ("end", 0, 50), ("wait", 60), ("lose", 0), ("lose", 0), ("ask", 100),
]  # fmt: skip
"""An answer that is too long by 30, and two that give back 40 each in the next window, where 30 make up for it."""


@settings(max_examples=200)
@example(LATE)
@given(STEPS)
def test_a_budget_counts_as_the_model_does(steps: list[tuple[str, int] | tuple[str, int, int]]) -> None:
    clock = Time()
    limit = Limit(tenant="*", tokens="input", tokens_per_minute=100)
    budgets = Budgets([limit], clock)
    budgets.reserve("acme", "default", "sql", 0, None).settle(None, 0, ran=True)  # a budget knows the limits since then
    model = Model(int(clock.now_s) // WINDOW_S, 100)
    most = 100
    going: list[tuple[Reservation, Asked]] = []
    for what, number, *more in steps:
        window = int(clock.now_s) // WINDOW_S
        if what == "ask":
            has_room = number <= most and model.taken(window) + number <= most
            try:
                reservation = budgets.reserve("acme", "default", "sql", number, None)
            except Refused:
                assert not has_room
            else:
                assert has_room
                asked = Asked(window, number)
                model.asked.append(asked)
                going.append((reservation, asked))
        elif what in ("end", "lose") and going:
            reservation, asked = going.pop(number % len(going))
            asked.took, asked.ended = more[0] if more else 0, window
            reservation.settle(asked.took, 7, ran=bool(more))
        elif what == "wait":
            clock.now_s += number
        elif what == "limit":
            most = number
            model.limits.setdefault(window, [model._limit(window)]).append(most)
            budgets.set_limits([Limit(tenant="*", tokens="input", tokens_per_minute=most)])
        now = int(clock.now_s) // WINDOW_S
        assert budgets.taken(limit, "acme").get("tokens_per_minute", 0) == model.taken(now)


@settings(max_examples=200)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("ask"), st.sampled_from([0, 30]), st.sampled_from([1, 10, 100, 1000])),
            st.tuples(st.just("end"), st.integers(0, 9), st.sampled_from([0.0, 0.01, 0.5, 1.0])),
            st.tuples(st.just("wait"), st.sampled_from([1, 20, 60]), st.just(0)),
        ),
        min_size=30,
        max_size=120,
    ),
    st.sampled_from([100, 1000]),
)
def test_a_client_that_teaches_short_answers_overdraws_a_window_once(
    steps: list[tuple[str, int, float]], most: int
) -> None:
    """At every moment all that is under way may come to its full length: the window has at most twice its limit, or one
    request beyond it. Each of these ends is tried on a copy of the budgets.
    """
    clock = Time()
    limit = Limit(tenant="*", tokens_per_minute=most)
    budgets = Budgets([limit], clock)
    going: list[tuple[Reservation, int, int]] = []
    longest = 0
    for what, number, share in steps:
        if what == "ask":
            try:
                reservation = budgets.reserve("acme", "default", "sql", number, int(share))
            except Refused:
                continue
            reservation.dispatched()
            longest = max(longest, number + int(share))
            going.append((reservation, number, int(share)))
        elif what == "end" and going:
            reservation, prompt, length = going.pop(number % len(going))
            reservation.settle(prompt, round(length * share), ran=True)
        elif what == "wait":
            clock.now_s += number
        ending, running = copy.deepcopy((budgets, going))
        for reservation, prompt, length in running:
            reservation.settle(prompt, length, ran=True)
        assert ending.taken(limit, "acme").get("tokens_per_minute", 0) <= max(2 * most, most + longest)


DAY_S = 86_400
JUMPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["ask", "insist"]), st.sampled_from([1, 20, 50, 100])),
        st.tuples(st.just("end"), st.sampled_from([0.0, 0.5, 1.0])),
        st.tuples(st.just("wait"), st.sampled_from([1, 20, 60, 3600])),
        st.tuples(st.just("jump"), st.sampled_from([3, 60, 90, 3600, 3 * DAY_S])),
        st.tuples(st.just("return"), st.sampled_from([0, 1, 30])),
        st.tuples(st.just("restart"), st.sampled_from(["clean", "killed"])),
    ),
    min_size=5,
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize(("word", "seconds"), [("minute", 60), ("hour", 3600), ("day", DAY_S)])
@given(JUMPS)
@example([("jump", 3 * DAY_S), ("ask", 100), ("return", 0), ("restart", "killed"), ("insist", 1)])
def test_windows_follow_a_clock_that_jumps(word: str, seconds: int, steps: list[tuple[str, float | str]]) -> None:
    """A clock that jumps ahead and back locks nobody out beyond its window's end, over restarts neither; and it gives
    nothing: each window that it begins has the limit once.
    """
    asyncio.run(_with_jumps(word, seconds, steps))


async def _with_jumps(word: str, seconds: int, steps: list[tuple[str, float | str]]) -> None:
    clock, limit = Time(), Limit.model_validate({"tenant": "*", "tokens": "input", f"tokens_per_{word}": 100})
    window, begun = int(clock.now_s // seconds), 1
    granted, ahead_s = 0, 0.0
    going: list[tuple[Reservation, int]] = []
    with TemporaryDirectory() as folder:

        async def begin() -> tuple[Kept, Budgets]:
            kept = Kept(Alone(), Path(folder) / "budgets.sqlite", clock)
            await kept.start()
            return kept, Budgets([limit], clock, kept)

        def ask(tokens: int) -> float:
            """Return when to ask again, 0 if the request was let in."""
            nonlocal granted
            wait_s = 0.0
            try:
                going.append((budgets.reserve("acme", "default", "sql", tokens, None), tokens))
                granted += tokens
            except Refused as refused:
                wait_s = refused.retry_after_s or math.inf
            assert wait_s <= seconds
            return wait_s

        kept, budgets = await begin()
        for what, how in steps:
            if what in ("ask", "insist"):
                assert isinstance(how, int)
                wait_s = ask(how)
                if what == "insist" and wait_s:
                    clock.now_s += wait_s
                    assert not ask(how), "it was told when to come again"
            elif what == "end" and going:
                assert isinstance(how, float)
                reservation, asked = going.pop(0)
                reservation.settle(round(asked * how), 7, ran=True)
                granted -= asked - round(asked * how)
            elif what in ("wait", "jump"):
                assert isinstance(how, int)
                clock.now_s += how
                ahead_s += how if what == "jump" else 0
            elif what == "return":
                assert isinstance(how, int)
                clock.now_s -= max(0, ahead_s - how)
                ahead_s = min(ahead_s, how)
            elif what == "restart":
                for reservation, asked in going:
                    reservation.settle(asked, 7, ran=True)
                going.clear()
                await (kept.close() if how == "clean" else kept.save(ahead=False))
                if how == "killed":
                    await killed(kept)
                kept, budgets = await begin()
            begun += int(clock.now_s // seconds) > window
            window = int(clock.now_s // seconds)
            assert granted <= 100 * begun
        await kept.close()
