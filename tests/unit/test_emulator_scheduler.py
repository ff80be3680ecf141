"""The capacity scheduler, with the cases of TensorRT-LLM's capacitySchedulerTest.cpp and what lies beside them."""

from bisect import insort

import pytest

from sidecar.lab.engine.scheduler import SCHEDULERS, Active, Room, arrival_order, micro_batch, steps_that_fit

ROOM = Room(seats=4, kv_blocks=21, tokens_per_block=10, device_pages=30)


def active(request_id: int, task_id: int | None = None, pages: int = 0, tokens: int = 50, **more: object) -> Active:
    """A request of ten prompt tokens that is not started."""
    return Active(request_id, 0.5, request_id, 10, tokens, task_id, pages, **more)


def run(policy: str, requests: list[Active], room: Room = ROOM) -> list[tuple[int, ...]]:
    """The ids scheduled in every iteration until all requests have ended; each gets a token an iteration."""
    history = []
    while requests:
        schedule = SCHEDULERS[policy](requests, room)
        assert schedule.fitting, "nothing can run"
        for request in schedule.paused:
            request.started = False
        for request in schedule.fitting:
            request.started = True
            request.generated += 1
        history.append(tuple(request.request_id for request in schedule.fitting))
        requests = [request for request in requests if request.generated < request.max_new_tokens]
    return history


@pytest.mark.parametrize("policy", ["guaranteed_no_evict", "max_utilization", "static_batch"])
def test_duplicate_task_fits(policy: str):
    """SimpleLoraFitsDuplicateTask: 15 pages each and 30 in all, so three requests of two tasks run together."""
    requests = [active(0, 1234, 15), active(1, 5678, 15), active(2, 1234, 15)]
    history = run(policy, requests)
    assert [sorted(ids) for ids in history] == [[0, 1, 2]] * 50


@pytest.mark.parametrize("policy", ["guaranteed_no_evict", "static_batch"])
def test_duplicate_task_overtakes(policy: str):
    """SimpleLoraDoesntFitDuplicateTask: at 20 pages each the third request overtakes the second; 100 iterations."""
    requests = [active(0, 1234, 20), active(1, 5678, 20), active(2, 1234, 20)]
    history = run(policy, requests)
    assert history == [(0, 2)] * 50 + [(1,)] * 50


def test_max_utilization_keeps_the_line():
    """SimpleLoraDoesntFitDuplicateTask: under MAX_UTILIZATION the three run one after another; 150 iterations."""
    requests = [active(0, 1234, 20), active(1, 5678, 20), active(2, 1234, 20)]
    history = run("max_utilization", requests)
    assert history == [(0,)] * 50 + [(1,)] * 50 + [(2,)] * 50


def test_max_utilization_pauses_for_blocks():
    """SimpleDoesntFitMaxUtilization: both run for 41 iterations, then the second is paused until the first ended.

    Ten blocks of ten: at iteration 41 each would need a sixth. The paused one computes its 51 tokens again and ends
    after 119 iterations.
    """
    requests = [active(0, tokens=80), active(1, tokens=80)]
    history = run("max_utilization", requests, Room(2, 10, 10, 30))
    assert history == [(0, 1)] * 41 + [(0,)] * 39 + [(1,)] * 39


def test_requests_are_sorted_by_priority():
    """RequestsSortedByPriorities: higher first, and first come first served inside a priority."""
    priorities = [0.5, 0.5, 0.6, 0.6, 0.6, 1.0, 0.3, 0.3, 0.3, 0.6, 1.0, 1.0]
    ordered: list[Active] = []
    for number, priority in enumerate(priorities):
        insort(ordered, Active(number, priority, number, 10, 20), key=arrival_order)
    assert [request.request_id for request in ordered] == [5, 10, 11, 2, 3, 4, 9, 0, 1, 6, 7, 8]


def test_started_requests_charge_their_tasks_once():
    """Pages are counted for each distinct task of what runs, then for what would join it."""
    running = [active(0, 1, 20, started=True, generated=1), active(1, 1, 20, started=True, generated=1)]
    waiting = [active(2, 2, 11), active(3, 3, 10), active(4, 1, 20)]
    schedule = SCHEDULERS["guaranteed_no_evict"](running + waiting, Room(8, 100, 10, 30))
    assert [request.request_id for request in schedule.fitting] == [0, 1, 3, 4]


def test_no_evict_stops_at_lack_of_blocks():
    """A pending request that cannot run to completion stops the walk, although the one behind it would fit."""
    requests = [active(0, tokens=90), active(1, tokens=190), active(2, tokens=10)]
    schedule = SCHEDULERS["guaranteed_no_evict"](requests, ROOM)
    assert [request.request_id for request in schedule.fitting] == [0]


def test_no_evict_reserves_to_completion():
    """What a started request may still generate is reserved: 15 of 21 blocks, so seven more do not fit."""
    started = active(0, tokens=140, started=True, generated=1)
    requests = [started, active(1, tokens=60)]
    assert len(SCHEDULERS["guaranteed_no_evict"](requests, ROOM).fitting) == 1
    requests[1] = active(1, tokens=50)
    assert len(SCHEDULERS["guaranteed_no_evict"](requests, ROOM).fitting) == 2


def test_strict_fifo_waits_for_pages():
    """A request that lacks adapter pages stops the line, which guaranteed_no_evict would overtake: 150 iterations."""
    requests = [active(0, 1234, 20), active(1, 5678, 20), active(2, 1234, 20)]
    assert run("strict_fifo", requests) == [(0,)] * 50 + [(1,)] * 50 + [(2,)] * 50


def test_max_utilization_pauses_for_pages():
    """A lack of adapter pages pauses the last started request behind the one in need, and the next if need be."""
    high = Active(9, 0.9, 9, 10, 50, 5, 20)
    running = [active(0, 1, 15, started=True, generated=5), active(1, 2, 15, started=True, generated=5)]
    schedule = SCHEDULERS["max_utilization"]([high, *running], ROOM)
    assert [request.request_id for request in schedule.fitting] == [9]
    assert [request.request_id for request in schedule.paused] == [1, 0]


def test_static_batch_waits_for_all():
    """Nothing joins a static batch while one of it runs."""
    requests = [active(0, started=True, generated=1), active(1)]
    schedule = SCHEDULERS["static_batch"](requests, ROOM)
    assert [request.request_id for request in schedule.fitting] == [0]


def test_max_requests_ignores_pages():
    """Without a KV cache only seats count."""
    requests = [active(number, number, 20) for number in range(6)]
    schedule = SCHEDULERS["max_requests"](requests, ROOM)
    assert [request.request_id for request in schedule.fitting] == [0, 1, 2, 3]


def test_steps_that_fit_is_the_last_that_does():
    """The number of further steps is the one after which the scheduler would pause."""
    requests = [active(0, tokens=80, started=True, generated=1), active(1, tokens=80, started=True, generated=1)]
    room = Room(2, 10, 10, 30)
    steps = steps_that_fit(requests, requests, room, limit=79)
    assert steps == 40
    for request in requests:
        request.generated += steps - 1
    assert not SCHEDULERS["max_utilization"](requests, room).paused
    for request in requests:
        request.generated += 1
    assert SCHEDULERS["max_utilization"](requests, room).paused


def test_micro_batch_sorts_and_cuts():
    """A step takes requests in order up to its tokens, then sorts each phase by adapter, those without one first."""
    requests = [
        active(0, 9, started=True, generated=1),
        active(1, 7),
        active(2, 3),
        active(3, started=True, generated=1),
        active(4, 1),
    ]
    context, generation = micro_batch(requests, seats=8, tokens_max=25)
    assert [request.request_id for request in context] == [2, 1]
    assert [request.request_id for request in generation] == [3, 0]
