"""Ownership step by step: leases by one's own clock, pledges, witnesses, moves; and whose a backend should be."""

from __future__ import annotations

from collections import Counter
from typing import TypeVar

import pytest

from sidecar.ownership import effects as do
from sidecar.ownership import events as ev
from sidecar.ownership.enums import Purpose, Why
from sidecar.ownership.facts import SECOND_NS, Bounds, Lease, Member
from sidecar.ownership.ownership import Ownership
from sidecar.ownership.preference import order
from sidecar.ownership.slots import HandingOver

BOUNDS = Bounds()
TTL_NS = BOUNDS.ttl_ns
ME = Member("me#1", "me", weight=1e6)
OTHER, THIRD = (Member(f"{name}#1", name) for name in ("other", "third"))
GENERATION = "g"
E = TypeVar("E", bound=do.Effect)


def _of(kind: type[E], effects: list[do.Effect]) -> list[E]:
    return [effect for effect in effects if isinstance(effect, kind)]


class House:
    """One member with one backend, `engine`, and what it was last asked to do."""

    def __init__(self, home: str = "") -> None:
        self.ownership = Ownership(ME, {"engine": home}, BOUNDS)
        self.now_ns = 0
        self.beat = self.step(0, ev.Tick(), do.SendBeat)

    def step(self, now_ns: int, event: ev.Event, kind: type[E]) -> E:
        """Take an event and return the one effect of a kind that it must have."""
        (effect,) = _of(kind, self.all(now_ns, event))
        return effect

    def all(self, now_ns: int, event: ev.Event) -> list[do.Effect]:
        assert now_ns >= self.now_ns
        self.now_ns = now_ns
        effects = self.ownership.step(event, now_ns)
        for effect in effects:
            if isinstance(effect, do.SendBeat):
                self.beat = effect
            elif isinstance(effect, do.SendRenew):
                self.renewal = effect
        return effects

    def looked(self, members: tuple[Member, ...] = (ME,), leases: tuple[Lease, ...] = ()) -> ev.BeatAnswered:
        return ev.BeatAnswered(self.beat.number, GENERATION, 0, 0, members, leases)

    def granted(self, call: do.SendAcquire | do.SendRenew, epoch: int) -> ev.LeaseAnswered:
        return ev.LeaseAnswered(call.number, True, epoch, ME.id, GENERATION, 0)

    def may_dispatch(self, now_ns: int) -> int | None:
        return self.ownership.may_dispatch("engine", now_ns)


def _lease(
    holder: Member, left_ns: int, witnesses: tuple[Member, ...], epoch: int = 7, released: bool = False
) -> Lease:
    names = tuple(each.id for each in witnesses)
    return Lease("engine", holder.id, holder.name, epoch, left_ns, BOUNDS.grace_ns, names, released)


def _owner(members: tuple[Member, ...] = (ME,)) -> House:
    """A member that has owned `engine` under epoch 8 since 0."""
    house = House()
    call = house.step(0, house.looked(members, (_lease(ME, 0, (ME,)),)), do.SendAcquire)
    assert house.step(0, house.granted(call, 8), do.Own) == do.Own("engine", 8)
    return house


def test_a_lease_counts_from_when_it_was_asked_for() -> None:
    """However late the answer comes, the lease ends by when the call was sent, less drift and margin."""
    house = House()
    call = house.step(0, house.looked(leases=(_lease(ME, 0, (ME,)),)), do.SendAcquire)
    house.step(SECOND_NS, house.granted(call, 8), do.Own)
    assert house.may_dispatch(BOUNDS.usable_ns(TTL_NS) - 1) == 8
    assert house.may_dispatch(BOUNDS.usable_ns(TTL_NS)) is None


def test_a_renewal_counts_from_when_it_was_sent() -> None:
    """The same for a renewal."""
    house = _owner()
    sent_ns = BOUNDS.every_ns
    renewal = house.step(sent_ns, ev.Tick(), do.SendRenew)
    house.all(sent_ns + SECOND_NS, house.granted(renewal, 8))
    assert house.may_dispatch(sent_ns + BOUNDS.usable_ns(TTL_NS) - 1) == 8
    assert house.may_dispatch(sent_ns + BOUNDS.usable_ns(TTL_NS)) is None


def test_a_grant_that_comes_after_its_end_is_given_back() -> None:
    """What Redis granted and can no longer be used is released."""
    house = House()
    call = house.step(0, house.looked(leases=(_lease(ME, 0, (ME,)),)), do.SendAcquire)
    effects = house.all(TTL_NS, house.granted(call, 8))
    assert not _of(do.Own, effects)
    assert _of(do.SendRelease, effects) == [do.SendRelease("engine", call.token)]


def test_a_pause_is_noticed_before_what_came_in_meanwhile() -> None:
    """A renewal answered during a pause does not bring back a lease that ended in it."""
    house = _owner()
    renewal = house.step(BOUNDS.every_ns, ev.Tick(), do.SendRenew)
    assert house.step(TTL_NS, house.granted(renewal, 8), do.Disown) == do.Disown("engine", Why.LEASE_ENDED)


def test_all_that_redis_may_name_are_asked() -> None:
    """Of a renewal without an answer it is not known whether it ran: its witnesses are asked, and the former ones."""
    house = _owner((ME, OTHER))
    at_ns = BOUNDS.every_ns
    first = house.step(at_ns, ev.Tick(), do.SendRenew)
    house.all(at_ns, house.looked((ME, THIRD), (_lease(ME, TTL_NS, (ME, OTHER), 8),)))
    assert house.step(at_ns, ev.LeaseFailed(first.number), do.SendAsk).to == OTHER.id
    effects = house.all(at_ns + BOUNDS.retry_ns, ev.Tick())
    assert [call.witnesses for call in _of(do.SendRenew, effects)] == [(ME.id, THIRD.id)]
    assert [(ask.to, ask.purpose, ask.epoch) for ask in _of(do.SendAsk, effects)] == [
        (OTHER.id, Purpose.GO_ON, 8),
        (THIRD.id, Purpose.GO_ON, 8),
    ]


@pytest.mark.parametrize(("agrees", "lasts_ns"), [(True, TTL_NS), (False, 0)])
def test_an_owner_goes_on_only_if_all_agree(agrees: bool, lasts_ns: int) -> None:
    """Pledges of all witnesses prolong a lease from when they were asked for; one refusal, and it ends."""
    house = _owner((ME, OTHER, THIRD))
    failed_ns = BOUNDS.every_ns + SECOND_NS
    renewal = house.step(BOUNDS.every_ns, ev.Tick(), do.SendRenew)
    first, second = _of(do.SendAsk, house.all(failed_ns, ev.LeaseFailed(renewal.number)))
    house.all(failed_ns, ev.AskAnswered(first.number, first.to, True, False, False, 8))
    assert house.may_dispatch(BOUNDS.usable_ns(TTL_NS)) is None
    house.all(failed_ns, ev.AskAnswered(second.number, second.to, agrees, False, False, 8))
    end_ns = max(BOUNDS.usable_ns(TTL_NS), failed_ns + BOUNDS.usable_ns(lasts_ns))
    assert house.may_dispatch(end_ns - 1) == 8
    assert house.may_dispatch(end_ns) is None


def test_what_redis_forgot_is_claimed() -> None:
    """An owner of whom Redis knows nothing asks for its lease with its own epoch and token, and keeps the backend."""
    house = _owner()
    renewal = house.step(BOUNDS.every_ns, ev.Tick(), do.SendRenew)
    refused = ev.LeaseAnswered(renewal.number, False, 0, "", "newer", 5)
    claim = house.step(BOUNDS.every_ns, refused, do.SendAcquire)
    assert (claim.holds, claim.least_epoch, claim.token) == (True, 8, renewal.token)
    assert (claim.generation, claim.by_ns) == ("newer", 5 + BOUNDS.attempt_ns)
    assert house.step(BOUNDS.every_ns, house.granted(claim, 9), do.Own) == do.Own("engine", 9)


def test_who_finds_another_holder_stops() -> None:
    """A lease that is another's by Redis ends at once."""
    house = _owner()
    renewal = house.step(BOUNDS.every_ns, ev.Tick(), do.SendRenew)
    taken = ev.LeaseAnswered(renewal.number, False, 9, OTHER.id, GENERATION, 0)
    assert house.step(BOUNDS.every_ns, taken, do.Disown) == do.Disown("engine", Why.TAKEN)


def test_who_hears_of_a_newer_epoch_stops() -> None:
    """From Redis, which may have forgotten its holder, or from a member that refuses, or that asks for itself."""
    ways = {
        "Redis": lambda house: ev.LeaseAnswered(house.renewal.number, False, 9, "", "newer", 0),
        "who asks": lambda house: ev.AskReceived(1, OTHER.id, "engine", Purpose.TAKE_OVER, 9),
    }
    for way, hear in ways.items():
        house = _owner()
        house.step(BOUNDS.every_ns, ev.Tick(), do.SendRenew)
        effects = house.all(BOUNDS.every_ns, hear(house))
        assert _of(do.Disown, effects) == [do.Disown("engine", Why.TAKEN)], way
        assert not _of(do.SendAcquire, effects), way
        assert house.may_dispatch(house.now_ns) is None, way
    house = _owner((ME, OTHER))
    renewal = house.step(BOUNDS.every_ns, ev.Tick(), do.SendRenew)
    ask = house.step(house.now_ns, ev.LeaseFailed(renewal.number), do.SendAsk)
    refusal = ev.AskAnswered(ask.number, OTHER.id, False, False, True, 9)
    assert house.step(house.now_ns, refusal, do.Disown) == do.Disown("engine", Why.TAKEN)


def test_what_may_be_the_own_claim_is_waited_for() -> None:
    """A newer epoch may be the answer to a claim that is under way: nothing is given up, nor dispatched meanwhile."""
    house = _owner()
    renewal = house.step(BOUNDS.every_ns, ev.Tick(), do.SendRenew)
    claim = house.step(house.now_ns, ev.LeaseAnswered(renewal.number, False, 0, "", "newer", 0), do.SendAcquire)
    effects = house.all(house.now_ns, ev.AskReceived(1, OTHER.id, "engine", Purpose.TAKE_OVER, 9))
    assert not _of(do.Disown, effects)
    assert house.may_dispatch(house.now_ns) is None
    house.step(house.now_ns, house.granted(claim, 9), do.Own)
    assert house.may_dispatch(house.now_ns) == 9


def _asked(house: House, who: Member, purpose: Purpose, epoch: int = 7) -> do.Answer:
    return house.step(house.now_ns, ev.AskReceived(1, who.id, "engine", purpose, epoch), do.Answer)


def test_a_pledge_binds() -> None:
    """What is pledged is pledged to nobody else, and not acquired before the pledge has passed for certain."""
    house = House()
    assert _asked(house, OTHER, Purpose.GO_ON).agreed
    assert _asked(house, OTHER, Purpose.GO_ON).agreed
    assert not _asked(house, THIRD, Purpose.GO_ON).agreed
    assert not _asked(house, THIRD, Purpose.TAKE_OVER).agreed
    ended = (_lease(ME, 0, (ME,)),)
    assert not _of(do.SendAcquire, house.all(0, house.looked(leases=ended)))
    end_ns = BOUNDS.passed_ns(TTL_NS)
    house.step(end_ns - 1, ev.Tick(), do.SendBeat)
    assert not _of(do.SendAcquire, house.all(end_ns - 1, house.looked(leases=ended)))
    house.step(end_ns, ev.Tick(), do.SendBeat)
    house.step(end_ns, house.looked(leases=ended), do.SendAcquire)


def test_an_owner_whose_lease_has_ended_is_asked_for_no_move() -> None:
    """The backend is pledged to it, so it is not acquired either."""
    house = House()
    assert _asked(house, OTHER, Purpose.GO_ON).agreed
    effects = house.all(0, house.looked((ME, OTHER), (_lease(OTHER, 0, (ME, OTHER)),)))
    assert not _of(do.SendAsk, effects)
    assert not _of(do.SendAcquire, effects)


def test_who_agreed_to_a_follower_pledges_to_its_owner_no_more() -> None:
    """The follower may own it without this member hearing of it; until Redis says that the old lease goes on."""
    house = House()
    assert _asked(house, THIRD, Purpose.TAKE_OVER).agreed
    assert not _asked(house, OTHER, Purpose.GO_ON).agreed
    house.all(0, house.looked((ME, OTHER, THIRD), (_lease(OTHER, BOUNDS.attempt_ns - 1, (ME, OTHER), epoch=7),)))
    house.ownership.know.reaches_redis = False
    assert not _asked(house, OTHER, Purpose.GO_ON).agreed
    house.step(BOUNDS.ttl_ns, ev.Tick(), do.SendBeat)
    house.all(BOUNDS.ttl_ns, house.looked((ME, OTHER, THIRD), (_lease(OTHER, TTL_NS, (ME, OTHER), epoch=7),)))
    house.ownership.know.reaches_redis = False
    assert _asked(house, OTHER, Purpose.GO_ON).agreed


def test_a_pledge_stops_what_was_about_to_be_acquired() -> None:
    """Who pledges while it waits for the others' word acquires nothing."""
    house = House()
    look = house.looked((ME, THIRD), (_lease(OTHER, 0, (OTHER,)),))
    assert len(_of(do.SendAsk, house.all(0, look))) == 2
    house.ownership.know.reaches_redis = False
    assert _asked(house, THIRD, Purpose.GO_ON).agreed
    assert not _of(do.SendAcquire, house.all(BOUNDS.ask_ns, ev.Tick()))


def test_an_acquisition_without_an_answer_is_given_back() -> None:
    """It may have been granted; a later one is under another token."""
    house = House()
    call = house.step(0, house.looked((ME, OTHER), (_lease(ME, 0, (ME,)),)), do.SendAcquire)
    assert house.step(SECOND_NS, ev.LeaseFailed(call.number), do.SendRelease).token == call.token
    assert not _of(do.Own, house.all(SECOND_NS, house.granted(call, 8)))
    house.step(SECOND_NS + BOUNDS.retry_ns, ev.Tick(), do.SendBeat)
    again = house.step(house.now_ns, house.looked((ME, OTHER), (_lease(ME, 0, (ME,)),)), do.SendAcquire)
    assert again.token != call.token


def test_who_reaches_redis_lets_nobody_go_on() -> None:
    """It refuses, and looks at Redis at once to be sure of it; when that fails it agrees."""
    house = House()
    house.all(0, house.looked((ME, OTHER), (_lease(OTHER, TTL_NS, (ME, OTHER)),)))
    effects = house.all(1, ev.AskReceived(1, OTHER.id, "engine", Purpose.GO_ON, 7))
    assert _of(do.Answer, effects) == [do.Answer(1, OTHER.id, False, False, True, 7)]
    (beat,) = _of(do.SendBeat, effects)
    house.all(2, ev.BeatFailed(beat.number))
    assert _asked(house, OTHER, Purpose.GO_ON).agreed


def test_who_could_not_renew_lets_others_go_on() -> None:
    """A renewal that fails says that Redis is unreachable as well as a beat does."""
    house = _owner((ME, OTHER))
    renewal = house.step(BOUNDS.every_ns, ev.Tick(), do.SendRenew)
    house.all(house.now_ns, ev.LeaseFailed(renewal.number))
    answer = house.step(house.now_ns, ev.AskReceived(1, OTHER.id, "another", Purpose.GO_ON, 3), do.Answer)
    assert answer.agreed


def test_an_older_epoch_does_not_go_on() -> None:
    """Who has seen a newer epoch refuses, and says which."""
    house = House()
    house.all(0, house.looked((ME, OTHER), (_lease(OTHER, TTL_NS, (ME, OTHER), epoch=9),)))
    house.all(BOUNDS.every_ns, ev.Tick())
    house.all(BOUNDS.every_ns, ev.BeatFailed(house.beat.number))
    answer = _asked(house, THIRD, Purpose.GO_ON, epoch=8)
    assert (answer.agreed, answer.epoch) == (False, 9)


def test_who_is_no_witness_asks_first() -> None:
    """It asks the former owner, the witnesses and all who live, and acquires with the word of those who agreed."""
    house = House()
    ended = _lease(OTHER, 0, (OTHER,))
    asks = _of(do.SendAsk, house.all(0, house.looked((ME, THIRD), (ended,))))
    assert [(ask.to, ask.purpose) for ask in asks] == [(OTHER.id, Purpose.TAKE_OVER), (THIRD.id, Purpose.TAKE_OVER)]
    house.all(house.now_ns, ev.AskAnswered(asks[0].number, OTHER.id, True, False, True, 7))
    call = house.step(house.now_ns + BOUNDS.ask_ns, ev.Tick(), do.SendAcquire)
    assert (call.agreed, call.least_epoch) == ((ME.id, OTHER.id), 7)


def test_a_holder_that_answers_is_left_alone() -> None:
    """Whatever Redis says, who answers to hold a backend keeps it."""
    house = House()
    (ask,) = _of(do.SendAsk, house.all(0, house.looked((ME,), (_lease(OTHER, 0, (OTHER,)),))))
    effects = house.all(1, ev.AskAnswered(ask.number, OTHER.id, False, True, False, 7))
    assert not _of(do.SendAcquire, effects)


@pytest.mark.parametrize("holds", [True, False])
def test_a_word_is_believed_for_a_lease(holds: bool) -> None:
    """Silence that follows upon "I own it" or "I pledged it" is no consent, for as long as a lease may last."""
    house, ended, said_ns = House(), (_lease(OTHER, 0, (OTHER,)),), 1

    def ask(now_ns: int) -> do.SendAsk:
        if now_ns:
            house.step(now_ns, ev.Tick(), do.SendBeat)
        return house.step(now_ns, house.looked((ME, OTHER), ended), do.SendAsk)

    house.all(said_ns, ev.AskAnswered(ask(0).number, OTHER.id, False, holds, False, 7))
    for now_ns in (BOUNDS.retry_ns + said_ns, BOUNDS.passed_ns(TTL_NS) - BOUNDS.ask_ns):
        ask(now_ns)
        assert not _of(do.SendAcquire, house.all(now_ns + BOUNDS.ask_ns, ev.Tick()))
    ask(BOUNDS.passed_ns(TTL_NS) + BOUNDS.retry_ns)
    house.step(house.now_ns + BOUNDS.ask_ns, ev.Tick(), do.SendAcquire)


def test_a_word_to_be_free_is_believed_at_once() -> None:
    """Who said to own it, and now says that it does not, is not waited for."""
    house, ended = House(), (_lease(OTHER, 0, (OTHER,)),)
    first = house.step(0, house.looked((ME, OTHER), ended), do.SendAsk)
    house.all(1, ev.AskAnswered(first.number, OTHER.id, False, True, False, 7))
    house.step(1 + BOUNDS.retry_ns, ev.Tick(), do.SendBeat)
    again = house.step(house.now_ns, house.looked((ME, OTHER), ended), do.SendAsk)
    house.step(house.now_ns, ev.AskAnswered(again.number, OTHER.id, True, False, False, 7), do.SendAcquire)


def test_a_word_is_about_one_backend() -> None:
    """Who holds one backend keeps nobody from another."""
    house = House()
    house.all(0, ev.BackendFound("held"))
    held = Lease("held", OTHER.id, OTHER.name, 3, 0, BOUNDS.grace_ns, (OTHER.id,))
    asks = _of(do.SendAsk, house.all(0, house.looked((ME,), (_lease(OTHER, 0, (OTHER,)), held))))
    number = {ask.backend: ask.number for ask in asks}
    house.all(1, ev.AskAnswered(number["held"], OTHER.id, False, True, False, 3))
    assert house.step(BOUNDS.ask_ns, ev.Tick(), do.SendAcquire).backend == "engine"


@pytest.mark.parametrize(("released", "acquires"), [(False, 1), (True, 0)])
def test_who_let_a_lease_end_is_not_waited_for(released: bool, acquires: int) -> None:
    """The preferred member comes first, unless it is the one whose lease ended without being given back."""
    house, preferred = House(), Member("best#1", "best", weight=1e18)
    ended = _lease(preferred, 0, (ME,), released=released)
    assert len(_of(do.SendAcquire, house.all(0, house.looked((ME, preferred), (ended,))))) == acquires
    if not acquires:
        house.step(BOUNDS.retry_ns, ev.Tick(), do.SendBeat)
        house.step(BOUNDS.retry_ns, house.looked((ME, preferred), (ended,)), do.SendAcquire)


def test_a_pledge_to_the_owner_is_heard_unless_a_witness_gave_none() -> None:
    """Who hears that a backend is pledged acquires nothing, until a witness agrees, without whom no owner goes on."""
    for witnesses, acquires in (((OTHER,), 0), ((OTHER, THIRD), 1)):
        house = House()
        asks = _of(do.SendAsk, house.all(0, house.looked((ME, THIRD), (_lease(OTHER, 0, witnesses),))))
        number = {ask.to: ask.number for ask in asks}
        house.all(1, ev.AskAnswered(number[THIRD.id], THIRD.id, True, False, True, 7))
        effects = house.all(2, ev.AskAnswered(number[OTHER.id], OTHER.id, False, False, False, 7))
        assert len(_of(do.SendAcquire, effects)) == acquires


def test_a_move_waits_for_what_is_in_flight() -> None:
    """The owner stops dispatching, keeps its lease until nothing is in flight, and gives it back then."""
    house = _owner()
    preferred = Member("best#1", "best", weight=1e18)
    house.all(BOUNDS.every_ns - 1, ev.Tick())
    beat = house.step(BOUNDS.every_ns, ev.Tick(), do.SendBeat)
    assert beat is house.beat
    house.all(BOUNDS.every_ns, house.looked((ME, OTHER, preferred), (_lease(ME, TTL_NS, (ME,), 8),)))
    assert not _asked(house, OTHER, Purpose.MOVE).agreed
    effects = house.all(house.now_ns, ev.AskReceived(2, preferred.id, "engine", Purpose.MOVE, 8))
    assert _of(do.Disown, effects) == [do.Disown("engine", Why.MOVED)]
    assert [answer.agreed for answer in _of(do.Answer, effects)] == [True]
    assert house.may_dispatch(house.now_ns) is None
    assert not _of(do.SendRelease, effects)
    effects = house.all(house.now_ns + 1, ev.InFlightEnded("engine"))
    assert not _of(do.SendRelease, effects)
    house.step(house.now_ns + 1, house.granted(house.renewal, 8), do.SendRelease)


def test_a_move_that_was_agreed_to_is_looked_after() -> None:
    """Redis is looked at again soon while the owner still has the lease; the backend is taken once it is released."""
    house, owned = House(), _lease(OTHER, TTL_NS, (ME, OTHER))
    ask = house.step(0, house.looked((ME, OTHER), (owned,)), do.SendAsk)
    assert (ask.purpose, ask.to) == (Purpose.MOVE, OTHER.id)
    house.all(0, ev.AskAnswered(ask.number, OTHER.id, True, True, True, 7))
    for look in (1, 2):
        house.step(look * BOUNDS.retry_ns, ev.Tick(), do.SendBeat)
        house.all(house.now_ns, house.looked((ME, OTHER), (owned,)))
    house.step(3 * BOUNDS.retry_ns, ev.Tick(), do.SendBeat)
    released = _lease(OTHER, 0, (ME, OTHER), released=True)
    house.step(house.now_ns, house.looked((ME, OTHER), (released,)), do.SendAcquire)


def test_a_drain_ends_with_leaving() -> None:
    """A member that drains disowns, releases when nothing is in flight, leaves, and does nothing afterwards."""
    house = _owner()
    assert house.step(1, ev.DrainBegun(), do.Disown) == do.Disown("engine", Why.DRAINING)
    renewal = house.step(2, ev.InFlightEnded("engine"), do.SendRenew)
    effects = house.all(3, house.granted(renewal, 8))
    assert [type(effect) for effect in effects if not isinstance(effect, do.WakeAt)] == [do.SendRelease, do.SendLeave]
    assert house.all(4, ev.Tick()) == []


def test_a_backend_with_a_home_is_only_for_it() -> None:
    """In front of the engine beside it nobody else ever stands."""
    house = House(home="other")
    effects = house.all(0, house.looked((ME, OTHER), (_lease(OTHER, -TTL_NS, (ME, OTHER)),)))
    assert not _of(do.SendAcquire, effects)
    assert not _of(do.SendAsk, effects)


def test_shares_are_those_of_the_weights() -> None:
    """A member of twice the weight is preferred for twice as many backends."""
    members = [Member("a", "a", 1.0), Member("b", "b", 2.0), Member("c", "c", 1.0)]
    shares = Counter(order(f"engine-{index}", "", members)[0].name for index in range(4000))
    assert {name: round(count / 1000) for name, count in shares.items()} == {"a": 1, "b": 2, "c": 1}


def test_who_comes_or_goes_moves_only_its_share() -> None:
    """The order among the others does not depend on a member."""
    members = [Member(f"{name}#{life}", name) for life, name in enumerate("abcde")]
    for index in range(100):
        ranked = order(f"engine-{index}", "", members)
        assert order(f"engine-{index}", "", members[1:]) == [each for each in ranked if each.name != "a"]


def test_draining_members_are_preferred_for_nothing() -> None:
    """Nor does a life matter: a restart under the same name keeps its share."""
    members = [Member("a#1", "a"), Member("b#1", "b", draining=True)]
    assert [each.name for each in order("engine", "", members)] == ["a"]
    pair = [Member("c", "c"), Member("d", "d")]
    reborn = [Member("c#2", "c"), Member("d#2", "d")]
    assert [each.name for each in order("engine", "", pair)] == [each.name for each in order("engine", "", reborn)]


@pytest.mark.parametrize(
    "times", [{"ttl_ns": 400_000_000}, {"ask_ns": 3 * SECOND_NS}, {"alone_ns": SECOND_NS}, {"drift": 0.6}]
)
def test_bounds_that_contradict_each_other_are_refused(times: dict[str, float]) -> None:
    """The error names the bounds and what must hold between them."""
    with pytest.raises(ValueError, match="_ns"):
        Bounds(**times)  # type: ignore[arg-type]


@pytest.mark.parametrize("lease_s", [1, 10, 60])
def test_bounds_of_a_lease(lease_s: int) -> None:
    """Of a short lease all is in proportion, of a long one as by default; a taker waits a lease and a tenth at most."""
    bounds, share = Bounds.of_lease(lease_s * SECOND_NS), min(1.0, lease_s / 10)
    assert bounds.ttl_ns == lease_s * SECOND_NS
    assert (bounds.margin_ns, bounds.ask_ns) == (int(BOUNDS.margin_ns * share), int(BOUNDS.ask_ns * share))
    assert bounds.attempt_ns == int(BOUNDS.attempt_ns * share)
    assert bounds.ttl_ns < bounds.grace_ns <= 1.1 * bounds.ttl_ns
    assert bounds.alone_ns == BOUNDS.alone_ns


def test_a_backend_that_is_found_while_it_runs_is_taken_like_the_others() -> None:
    """At once: Redis is looked at for it."""
    house = _owner()
    looked = house.all(SECOND_NS, ev.BackendFound("new"))
    assert _of(do.SendBeat, looked)
    free = Lease("new", OTHER.id, OTHER.name, 3, 0, BOUNDS.grace_ns, (), released=True)
    (call,) = _of(do.SendAcquire, house.all(SECOND_NS, house.looked(leases=(_lease(ME, TTL_NS, (ME,)), free))))
    assert call.backend == "new"
    assert house.step(SECOND_NS, ev.LeaseAnswered(call.number, True, 4, ME.id, GENERATION, 0), do.Own).epoch == 4
    assert house.ownership.may_dispatch("new", SECOND_NS) == 4
    assert house.may_dispatch(SECOND_NS) == 8


def test_a_backend_that_is_gone_is_given_back_at_once() -> None:
    """Others may know it still: they need not wait for the lease to end. What comes late says nothing any more."""
    house = _owner()
    effects = house.all(SECOND_NS, ev.BackendGone("engine"))
    assert _of(do.Disown, effects) == [do.Disown("engine", Why.GONE)]
    assert [release.backend for release in _of(do.SendRelease, effects)] == ["engine"]
    assert house.may_dispatch(SECOND_NS) is None
    assert not house.ownership.is_handing_over("engine")
    assert not house.all(SECOND_NS, ev.InFlightEnded("engine"))
    assert not _of(do.SendAcquire, house.all(SECOND_NS, house.looked(leases=(_lease(ME, 0, (), released=True),))))


def test_a_lease_that_is_being_acquired_is_given_back_too() -> None:
    """The answer, however it ends, is nobody's."""
    house = House()
    call = house.step(0, house.looked(leases=(_lease(ME, 0, (ME,)),)), do.SendAcquire)
    assert house.step(0, ev.BackendGone("engine"), do.SendRelease).token == call.token
    assert not _of(do.Own, house.all(0, house.granted(call, 8)))
    assert house.may_dispatch(0) is None


def test_what_is_handed_over_and_gone_keeps_no_other_move_waiting() -> None:
    """One at a time, and it is none any more."""
    house = _owner((ME, OTHER))
    house.all(SECOND_NS, ev.BackendFound("other"))
    heavy = Member(OTHER.id, OTHER.name, weight=1e12)
    house.all(SECOND_NS, house.looked((ME, heavy), (_lease(ME, TTL_NS, (ME,), 8),)))
    answer = house.step(SECOND_NS, ev.AskReceived(1, OTHER.id, "engine", Purpose.MOVE, 8), do.Answer)
    assert answer.agreed
    assert house.ownership.is_handing_over("engine")
    house.step(SECOND_NS, ev.BackendGone("engine"), do.SendRelease)
    assert not any(isinstance(slot.state, HandingOver) for slot in house.ownership.know.slots.values())


def test_one_that_does_not_know_a_backend_stands_in_nobodys_way() -> None:
    """It pledges it and gives its word like any other, and agrees to no move of it."""
    house = _owner((ME, OTHER))
    house.all(SECOND_NS, ev.BackendGone("engine"))
    over = house.step(SECOND_NS, ev.AskReceived(1, OTHER.id, "engine", Purpose.TAKE_OVER, 8), do.Answer)
    assert (over.agreed, over.holds, over.epoch) == (True, False, 8)
    moved = house.step(SECOND_NS, ev.AskReceived(2, OTHER.id, "engine", Purpose.MOVE, 8), do.Answer)
    assert (moved.agreed, moved.holds) == (False, False)
