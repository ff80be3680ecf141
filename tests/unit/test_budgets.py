"""Budgets: which apply to a request, what it reserves and settles, and what a refusal says."""

from __future__ import annotations

from collections.abc import Callable
from time import thread_time

import pytest
from pydantic import ValidationError

from sidecar.access.budgets import budgets as budgets_module
from sidecar.access.budgets.budgets import Budgets, Level, Reservation
from sidecar.access.budgets.charges import Budget
from sidecar.config.access import Access, Limit
from sidecar.errors import Reason, Refused
from tests.kit.tenant_load import Time

ACME = ("acme", "default", "sql")


@pytest.fixture
def clock() -> Time:
    return Time()


def refusal(call: Callable[[], object]) -> Refused:
    with pytest.raises(Refused) as raised:
        call()
    return raised.value


def spend(budgets: Budgets, who: tuple[str, str, str], tokens: int) -> Reservation:
    """Have a request that takes so many tokens, all of its prompt."""
    reservation = budgets.reserve(*who, tokens, 0)
    reservation.settle(None, 0, ran=True)
    return reservation


@pytest.mark.parametrize(
    ("limit", "shares", "has_own"),
    [
        (Limit(tokens_per_minute=10), ("zeta", "batch", "code"), None),
        (Limit(tenant="acme", tokens_per_minute=10), ("acme", "batch", "code"), ("zeta", "default", "sql")),
        (Limit(tenant="*", tokens_per_minute=10), ("acme", "batch", "code"), ("zeta", "default", "sql")),
        (Limit(class_name="default", tokens_per_minute=10), ("zeta", "default", ""), ("acme", "batch", "sql")),
        (Limit(adapter="*", tokens_per_minute=10), ("zeta", "batch", "sql"), ("acme", "default", "code")),
        (Limit(tenant="*", adapter="sql", tokens_per_minute=10), ("acme", "batch", "sql"), ("zeta", "default", "sql")),
        (Limit(tenant="*", adapter="*", tokens_per_minute=10), ("acme", "batch", "sql"), ("acme", "default", "code")),
    ],
    ids=["all", "tenant", "each tenant", "class", "each adapter", "each tenant of an adapter", "pairs"],
)
def test_whose_a_budget_is(
    limit: Limit, shares: tuple[str, str, str], has_own: tuple[str, str, str] | None, clock: Time
) -> None:
    """A named word restricts a limit to it, "*" gives each its own budget, None lets all share one."""
    budgets = Budgets([limit], clock)
    spend(budgets, ACME, 10)
    assert refusal(lambda: spend(budgets, shares, 1)).reason is Reason.RATE_LIMITED
    if has_own is not None:
        spend(budgets, has_own, 1)


def test_all_limits_apply_and_a_refused_request_takes_of_none(clock: Time) -> None:
    budgets = Budgets([Limit(tenant="acme", requests_per_minute=5), Limit(adapter="sql", tokens_per_hour=100)], clock)
    spend(budgets, ACME, 90)
    assert refusal(lambda: budgets.reserve(*ACME, 20, 0)).details == {
        "limit": "tokens_per_hour",
        "scope": "adapter sql",
    }
    assert budgets.standing(*ACME).requests == Level(5, 4, 60)


def test_the_words_of_a_refusal(clock: Time) -> None:
    """It names whose limit it is, the number, what is used, what is needed, and when the window turns."""
    clock.now_s += 47
    budgets = Budgets([Limit(tenant="*", class_name="batch", tokens_per_minute=20_000)], clock)
    spend(budgets, ("acme", "batch", "sql"), 19_900)
    refused = refusal(lambda: budgets.reserve("acme", "batch", "sql", 200, 0))
    assert refused.message == (
        "tenant acme, class batch may use 20,000 tokens a minute; used so far: 19,900; this request needs about 200; "
        "send it again in 13 s, when the next minute begins, or have your operator raise tokens_per_minute"
    )
    assert (refused.reason, refused.retry_after_s) == (Reason.RATE_LIMITED, 13)


def test_the_words_of_a_refused_number_of_requests(clock: Time) -> None:
    budgets = Budgets([Limit(requests_per_day=1)], clock)
    spend(budgets, ACME, 1)
    assert refusal(lambda: spend(budgets, ACME, 1)).message == (
        "all requests together may send 1 request a day; sent so far: 1; send it again in 24 h, when the next day "
        "begins, or have your operator raise requests_per_day"
    )


def test_of_several_refusals_the_longest_is_told(clock: Time) -> None:
    """A client that waits for the minute must not find the hour used up."""
    clock.now_s += 30
    budgets = Budgets([Limit(tokens_per_minute=10, tokens_per_hour=10)], clock)
    spend(budgets, ACME, 10)
    assert refusal(lambda: spend(budgets, ACME, 1)).retry_after_s == 3570


@pytest.mark.parametrize(("word", "seconds"), [("minute", 60), ("hour", 3600), ("day", 86_400)])
def test_windows_follow_the_clock(word: str, seconds: int, clock: Time) -> None:
    """A window begins at a full minute, hour or day of UTC, whenever the first request came."""
    clock.now_s += seconds - 1
    budgets = Budgets([Limit.model_validate({f"requests_per_{word}": 1})], clock)
    spend(budgets, ACME, 1)
    assert refusal(lambda: spend(budgets, ACME, 1)).retry_after_s == 1
    clock.now_s += 1
    spend(budgets, ACME, 1)
    assert refusal(lambda: spend(budgets, ACME, 1)).retry_after_s == seconds


@pytest.mark.parametrize(("tokens", "taken"), [("both", 130), ("input", 100), ("output", 30)])
def test_which_tokens_count(tokens: str, taken: int, clock: Time) -> None:
    limit = Limit.model_validate({"tokens": tokens, "tokens_per_day": 1000})
    budgets = Budgets([limit], clock)
    budgets.reserve(*ACME, 100, 50).settle(None, 30, ran=True)
    assert budgets.taken(limit) == {"tokens_per_day": taken}


def test_a_request_that_never_ran_costs_nothing(clock: Time) -> None:
    limit = Limit(tokens_per_day=1000, requests_per_day=3, concurrent=2, queued_tokens=500)
    budgets = Budgets([limit], clock)
    reservation = budgets.reserve(*ACME, 100, 50)
    assert budgets.taken(limit) == {
        "tokens_per_day": 150, "requests_per_day": 1, "concurrent": 1, "queued_tokens": 150,
    }  # fmt: skip
    reservation.settle(None, 0, ran=False)
    reservation.settle(None, 40, ran=True)  # a second ending changes nothing
    assert set(budgets.taken(limit).values()) == {0}


def test_what_was_not_used_comes_back_at_once(clock: Time) -> None:
    budgets = Budgets([Limit(tokens_per_minute=1000)], clock)
    first = budgets.reserve(*ACME, 100, 800)
    assert refusal(lambda: budgets.reserve(*ACME, 200, 0))
    first.settle(None, 10, ran=True)
    budgets.reserve(*ACME, 200, 0)


def test_what_was_generated_beyond_the_limit_is_a_debt(clock: Time) -> None:
    """The next windows begin with it, until it is paid off; one that nobody uses pays too."""
    limit = Limit(tokens_per_minute=1000)
    budgets = Budgets([limit], clock)
    budgets.reserve(*ACME, 100, 10).settle(None, 3300, ran=True)
    clock.now_s += 60
    assert refusal(lambda: spend(budgets, ACME, 1)).retry_after_s == 60
    assert budgets.taken(limit) == {"tokens_per_minute": 2400}
    clock.now_s += 120
    assert budgets.taken(limit) == {"tokens_per_minute": 400}
    spend(budgets, ACME, 600)


def test_an_answer_that_goes_on_into_the_next_window(clock: Time) -> None:
    """What it was reserved for counts in its first window, and what it generates beyond that in its last one."""
    limit = Limit(tokens_per_minute=1000)
    budgets = Budgets([limit], clock)
    longer, shorter = budgets.reserve(*ACME, 100, 300), budgets.reserve(*ACME, 100, 300)
    clock.now_s += 60
    assert budgets.taken(limit) == {"tokens_per_minute": 0}
    longer.settle(None, 450, ran=True)
    shorter.settle(None, 10, ran=True)
    assert budgets.taken(limit) == {"tokens_per_minute": 150}


def test_twenty_requests_without_a_length_do_not_use_up_a_budget(clock: Time) -> None:
    """They are expected to generate little at first, and then what such requests do generate."""
    limit = Limit(tenant="*", tokens_per_minute=20_000, default_max_tokens=4096)
    budgets = Budgets([limit], clock)
    assert budgets.default_max_tokens(*ACME) == 4096
    reservations = [budgets.reserve(*ACME, 100, None) for _ in range(20)]
    assert budgets.taken(limit, "acme")["tokens_per_minute"] <= 20 * (100 + 100)
    for reservation in reservations:
        reservation.settle(None, 700, ran=True)
    assert budgets.taken(limit, "acme") == {"tokens_per_minute": 16_000}
    assert budgets.reserve(*ACME, 100, None) is not None
    assert 500 < budgets.taken(limit, "acme")["tokens_per_minute"] - 16_000 - 100 < 800


def test_a_length_that_clients_never_use_is_learned(clock: Time) -> None:
    """Libraries name one of thousands with each request. At first it is believed."""
    limit = Limit(tokens_per_minute=20_000)
    budgets = Budgets([limit], clock)
    assert len([budgets.reserve(*ACME, 100, 4096) for _ in range(4)]) == 4
    assert refusal(lambda: budgets.reserve(*ACME, 100, 4096))
    budgets = Budgets([limit], clock)
    for _ in range(50):
        budgets.reserve(*ACME, 10, 4096).settle(None, 50, ran=True)
    before = budgets.taken(limit)["tokens_per_minute"]
    budgets.reserve(*ACME, 10, 4096)
    assert 50 <= budgets.taken(limit)["tokens_per_minute"] - before < 500


def test_a_text_is_an_estimate_until_it_is_counted(clock: Time) -> None:
    """Its bytes are no tokens: four to one are assumed, and what engines count corrects that."""
    limit = Limit(tokens="input", tokens_per_day=1_000_000)
    budgets = Budgets([limit], clock)
    guessed = budgets.reserve(*ACME, 4000, None, is_estimated=True)
    guessed.settle(None, 10, ran=True)
    assert (guessed.input_tokens, guessed.is_estimated) == (1000, True)
    assert budgets.taken(limit) == {"tokens_per_day": 1000}
    counted = budgets.reserve(*ACME, 4000, None, is_estimated=True)
    counted.settle(1300, 10, ran=True)
    assert (counted.input_tokens, counted.is_estimated) == (1300, False)
    assert budgets.taken(limit) == {"tokens_per_day": 2300}
    for _ in range(50):
        budgets.reserve(*ACME, 4000, None, is_estimated=True).settle(1300, 10, ran=True)
    assert budgets.reserve(*ACME, 4000, None, is_estimated=True).input_tokens == pytest.approx(1300, rel=0.03)


def test_one_request_at_once(clock: Time) -> None:
    budgets = Budgets([Limit(tenant="acme", concurrent=1)], clock)
    budgets.reserve(*ACME, 1, 1)
    refused = refusal(lambda: budgets.reserve(*ACME, 1, 1))
    assert refused.message == "tenant acme may have 1 request at once and has 1; send it again when one has ended"


def test_requests_at_once(clock: Time) -> None:
    budgets = Budgets([Limit(tenant="acme", concurrent=2)], clock)
    first, _ = budgets.reserve(*ACME, 1, 1), budgets.reserve(*ACME, 1, 1)
    refused = refusal(lambda: budgets.reserve(*ACME, 1, 1))
    assert refused.message == "tenant acme may have 2 requests at once and has 2; send it again when one has ended"
    assert refused.retry_after_s == 1
    first.dispatched()
    first.settle(None, 1, ran=True)
    refused = refusal(lambda: budgets.reserve(*ACME, 1, 2, sequences=2))
    assert "at once and has 1, and this one counts as 2;" in refused.message
    budgets.reserve(*ACME, 1, 1)


def test_tokens_that_wait_for_an_engine(clock: Time) -> None:
    """A request counts until it is dispatched. One alone may be larger than the limit, or it could never come."""
    budgets = Budgets([Limit(queued_tokens=100)], clock)
    first = budgets.reserve(*ACME, 500, 0)
    assert refusal(lambda: budgets.reserve(*ACME, 1, 0)).details["limit"] == "queued_tokens"
    first.dispatched()
    first.dispatched()
    budgets.reserve(*ACME, 60, 0)
    budgets.reserve(*ACME, 40, 0)
    assert refusal(lambda: budgets.reserve(*ACME, 1, 0)).retry_after_s == 1


def test_a_length_above_the_largest(clock: Time) -> None:
    budgets = Budgets([Limit(adapter="sql", max_tokens=512)], clock)
    budgets.reserve(*ACME, 1, 512)
    budgets.reserve(*ACME, 1, 1024, sequences=2)
    refused = refusal(lambda: budgets.reserve(*ACME, 1, 513))
    assert (refused.reason, refused.details["limit"]) == (Reason.INVALID_REQUEST, "max_tokens")
    assert refused.message == (
        "adapter sql may ask for 512 tokens of answer (max_tokens), and this request asks for 513; ask for fewer, or "
        "have your operator raise the limit"
    )
    assert budgets.default_max_tokens(*ACME) == 512
    assert budgets.default_max_tokens("acme", "default", "code") is None


def test_a_prompt_that_no_window_holds(clock: Time) -> None:
    """Waiting does not help, so it is no rate that is exceeded. A long answer is allowed, and then paid off."""
    budgets = Budgets([Limit(tokens_per_minute=1000)], clock)
    assert refusal(lambda: budgets.reserve(*ACME, 1001, 0)).reason is Reason.INVALID_REQUEST
    budgets.reserve(*ACME, 900, 4096)


def test_a_limit_that_is_changed_counts_at_once(clock: Time) -> None:
    """What is taken stays taken. What was within the limit when it was taken is no debt after it is lowered."""
    budgets = Budgets([Limit(tenant="acme", tokens_per_minute=1000)], clock)
    spend(budgets, ACME, 800)
    budgets.set_limits([Limit(tenant="acme", tokens_per_minute=500, requests_per_minute=9)])
    assert refusal(lambda: spend(budgets, ACME, 1)).details["limit"] == "tokens_per_minute"
    budgets.set_limits([Limit(tenant="acme", tokens_per_minute=2000)])
    spend(budgets, ACME, 1200)
    budgets.set_limits([Limit(tenant="acme", tokens_per_minute=700)])
    clock.now_s += 60
    spend(budgets, ACME, 700)
    budgets.set_limits([])
    spend(budgets, ACME, 10_000)


def test_two_limits_for_the_same_are_refused() -> None:
    """One of them would be forgotten. What counts other tokens is another limit."""
    each = {"tenant": "*", "tokens_per_minute": 5}
    Access.model_validate({"limits": [each, each | {"tokens": "input"}, each | {"tenant": None}]})
    with pytest.raises(ValidationError, match="numbers 1 and 3 are for the same tenant"):
        Access.model_validate({"limits": [each, each | {"adapter": "sql"}, {"tenant": "*", "requests_per_day": 1}]})


def test_a_reservation_outlives_its_limit(clock: Time) -> None:
    """What was taken counts once there is a limit again."""
    limit = Limit(tokens_per_minute=1000)
    budgets = Budgets([limit], clock)
    reservation = budgets.reserve(*ACME, 400, 0)
    budgets.set_limits([])
    reservation.settle(None, 0, ran=True)
    spend(budgets, ACME, 5000)
    budgets.set_limits([limit])
    assert budgets.taken(limit) == {"tokens_per_minute": 400}
    assert refusal(lambda: spend(budgets, ACME, 601)).reason is Reason.RATE_LIMITED
    spend(budgets, ACME, 600)


def test_a_budget_takes_new_numbers_when_it_is_used(clock: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of thousands of tenants, all at a change, would keep requests waiting."""
    budgets = Budgets([Limit(tenant="*", tokens_per_minute=100)], clock)
    for number in range(50):
        spend(budgets, (f"t{number}", "default", "sql"), 40)
    fitted: list[Budget] = []

    def fit(budget: Budget, now_s: float) -> None:
        fitted.append(budget)
        was_fit(budget, now_s)

    was_fit = Budget.fit
    monkeypatch.setattr(Budget, "fit", fit)
    budgets.set_limits([Limit(tenant="*", tokens_per_minute=90)])
    assert not fitted
    assert refusal(lambda: spend(budgets, ("t7", "default", "sql"), 51)).reason is Reason.RATE_LIMITED
    assert len(fitted) == 1


def test_a_clock_that_is_set_back_gives_nothing(clock: Time) -> None:
    budgets = Budgets([Limit(tokens_per_minute=1000)], clock)
    spend(budgets, ACME, 1000)
    clock.now_s -= 300
    assert refusal(lambda: spend(budgets, ACME, 1))


def test_the_standing_is_that_of_the_tightest_limit(clock: Time) -> None:
    clock.now_s += 20
    budgets = Budgets(
        [Limit(tenant="*", tokens_per_minute=1000, requests_per_hour=10), Limit(adapter="*", tokens_per_day=600)], clock
    )
    spend(budgets, ACME, 100)
    standing = budgets.standing(*ACME)
    assert standing.requests == Level(10, 9, 3580)
    assert standing.tokens == Level(600, 500, 86_380)
    assert budgets.standing("zeta", "default", "code").tokens == Level(600, 600, 86_380)


def test_many_tenants_do_not_grow_memory(clock: Time) -> None:
    """A budget is forgotten when its windows are over, it has no debt and no open request."""
    budgets = Budgets([Limit(tenant="*", tokens_per_minute=1000)], clock)
    budgets.reserve("indebted", "", "", 1, 0).settle(None, 1_000_000, ran=True)
    budgets.reserve("open", "", "", 1, 1)
    for number in range(20_000):
        clock.now_s += 0.1  # 600 a minute
        spend(budgets, (f"tenant-{number}", "", ""), 1)
    assert len(budgets) < 2000
    assert budgets.taken(Limit(tenant="*", tokens_per_minute=1000), "indebted")["tokens_per_minute"] > 900_000
    clock.now_s += 100_000
    for number in range(2000):
        spend(budgets, (f"new-{number}", "", ""), 1)
    assert len(budgets) == 2001, "the open one stays"


def test_a_day_of_made_up_tenants_does_not_grow_memory(clock: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that may claim any tenant gains nothing by having one forgotten: each new one has a whole budget."""
    monkeypatch.setattr(budgets_module, "BUDGETS_MAX", 500)
    budgets = Budgets([Limit(tenant="*", tokens_per_day=1000)], clock)
    for number in range(5000):
        spend(budgets, (f"tenant-{number}", "", ""), 1)
    assert len(budgets) == 500


def test_thousands_of_limits_cost_a_request_no_more_than_a_few(clock: Time) -> None:
    """Only the budgets of a request's own limits are made, and no limit is compared with each of the others."""
    limits = [Limit(tenant=f"tenant-{number}", tokens_per_day=10) for number in range(5000)]
    began = thread_time()
    budgets = Budgets(limits, clock)
    assert thread_time() - began < 5, "seconds of CPU time"
    spend(budgets, ("tenant-77", "", "sql"), 10)
    assert len(budgets) == 1
    assert refusal(lambda: spend(budgets, ("tenant-77", "", "sql"), 1)).details["scope"] == "tenant tenant-77"
    spend(budgets, ("tenant-x", "", "sql"), 10)


def test_a_name_takes_the_place_of_a_limit_for_each(clock: Time) -> None:
    """A tenant may get more than the others; what its limit does not say is as for the others."""
    each = Limit(tenant="*", tokens_per_minute=100, requests_per_minute=3)
    budgets = Budgets([each, Limit(tenant="acme", tokens_per_minute=500)], clock)
    for _ in range(3):
        budgets.reserve("acme", "default", "sql", 150, 1)
    with pytest.raises(Refused, match="3 requests a minute"):
        budgets.reserve("acme", "default", "sql", 1, 1)
    with pytest.raises(Refused, match="100 tokens a minute"):
        budgets.reserve("blue", "default", "sql", 150, 1)
    budgets.set_limits([each])
    with pytest.raises(Refused, match="100 tokens a minute"):
        budgets.reserve("acme", "default", "sql", 150, 1)


def test_the_nearest_limit_for_each_completes_a_named_one(clock: Time) -> None:
    each, of_each = (
        Limit(tenant="*", adapter="*", concurrent=1, max_tokens=7),
        Limit(tenant="acme", adapter="*", concurrent=2),
    )
    budgets = Budgets([each, of_each, Limit(tenant="acme", adapter="sql", requests_per_day=9)], clock)
    for _ in range(2):
        budgets.reserve("acme", "default", "sql", 1, 1)
    with pytest.raises(Refused, match="2 requests at once"):
        budgets.reserve("acme", "default", "sql", 1, 1)
    with pytest.raises(Refused, match="7 tokens of answer"):
        budgets.reserve("acme", "default", "code", 1, 8)


def test_short_answers_to_great_lengths_do_not_open_a_budget_for_long_ones(clock: Time) -> None:
    """What is reserved is learned; the full lengths under way stay within twice the limit, whatever was learned."""
    limit = Limit(tokens_per_minute=2000, tokens="output")
    budgets = Budgets([limit], clock)
    for _ in range(150):
        budgets.reserve(*ACME, 1, 1000).settle(None, 1, ran=True)
    clock.now_s += 60
    going = [budgets.reserve(*ACME, 1, 1000) for _ in range(4)]
    refused = refusal(lambda: budgets.reserve(*ACME, 1, 1000))
    assert (refused.reason, refused.retry_after_s) == (Reason.RATE_LIMITED, 1)
    assert "smaller max_tokens" in refused.message
    for _ in range(20):
        budgets.reserve(*ACME, 1, None)  # without a length nothing is assumed
    for reservation in going:
        reservation.settle(None, 1000, ran=True)
    assert budgets.taken(limit)["tokens_per_minute"] >= 4000


def test_a_length_of_any_size_is_let_in_alone(clock: Time) -> None:
    budgets = Budgets([Limit(tokens_per_minute=2000)], clock)
    budgets.reserve(*ACME, 1, 100_000).settle(None, 1, ran=True)
    clock.now_s += 60
    budgets.reserve(*ACME, 1, 100_000)


def test_a_request_that_cannot_be_given_a_length_must_name_one(clock: Time) -> None:
    refused = refusal(lambda: Budgets([Limit(max_tokens=50)], clock).reserve(*ACME, 1, None))
    assert refused.reason is Reason.INVALID_REQUEST
    assert "request_output_len" in refused.message
    Budgets([Limit(default_max_tokens=50)], clock).reserve(*ACME, 1, None)


@pytest.mark.parametrize("tokens", ["both", "input"])
def test_a_limit_with_a_name_goes_on_with_what_was_taken(clock: Time, tokens: str) -> None:
    """Of the one for each whose place it takes; and that one again when it is removed. Both rows show it."""
    each = Limit.model_validate({"tenant": "*", "tokens": tokens, "tokens_per_day": 100})
    named = Limit.model_validate({"tenant": "acme", "tokens": tokens, "requests_per_day": 5})
    budgets = Budgets([each], clock)
    spend(budgets, ACME, 41)
    budgets.set_limits([each, named])
    assert refusal(lambda: spend(budgets, ACME, 60)).reason is Reason.RATE_LIMITED
    spend(budgets, ACME, 9)
    assert budgets.taken(named)["tokens_per_day"] == budgets.taken(each, "acme")["tokens_per_day"] == 50
    assert budgets.taken(named)["requests_per_day"] == 1
    budgets.set_limits([each])
    assert refusal(lambda: spend(budgets, ACME, 51)).reason is Reason.RATE_LIMITED
    spend(budgets, ACME, 50)
    spend(budgets, ("zeta", "default", "sql"), 100)


def test_two_limits_with_budgets_of_the_same_words_are_two(clock: Time) -> None:
    """One for acme and each adapter, and one for each tenant and sql: neither takes the other's place."""
    of_acme = Limit(tenant="acme", adapter="*", requests_per_day=3)
    of_sql = Limit(tenant="*", adapter="sql", tokens_per_day=100)
    budgets = Budgets([of_acme, of_sql], clock)
    spend(budgets, ACME, 60)
    assert refusal(lambda: spend(budgets, ACME, 60)).details["limit"] == "tokens_per_day"
    spend(budgets, ACME, 10)
    spend(budgets, ACME, 10)
    assert refusal(lambda: spend(budgets, ACME, 10)).details["limit"] == "requests_per_day"
    spend(budgets, ("zeta", "default", "sql"), 100)
