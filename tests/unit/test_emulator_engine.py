"""The engine model: what a client of TensorRT-LLM's executor sees, with its texts."""

import pytest

from sidecar.lab.engine.engine import Engine, Failure, QueueFull, Request, Row, StoreError
from sidecar.lab.engine.pages import footprint
from tests.kit.emulator_cases import ROWS, FlatCost, adapter_request, tiny_spec

FETCH = "Encountered an error when fetching new request: "
FORWARD = "Encountered an error in forwardAsync function: "
FULL = "Cache is full. There are no done tasks to evict"


def engine(**changes: object) -> Engine:
    """A tiny engine: four seats, four host pages, two device pages, one page an adapter."""
    return Engine(tiny_spec(**changes), FlatCost())


def miss(task_id: int) -> str:
    """The text of an engine miss."""
    return f"LoRA task {task_id} not found in cache. Please send LoRA weights with request"


def run_out(subject: Engine) -> dict[int, str]:
    """Advance from change to change until nothing is left to do; how each request ended."""
    ended: dict[int, str] = {}
    while (at_ns := subject.next_change_ns()) is not None:
        for output in subject.advance(at_ns):
            ended.update({ending.request_id: ending.reason for ending in output.endings})
            ended.update({failure.request_id: failure.text for failure in output.failures})
    return ended


def serve(subject: Engine, *requests: Request) -> dict[int, str]:
    """Submit requests at the same time and run them to their ends."""
    for request in requests:
        subject.submit(request, 0)
    return run_out(subject)


def test_miss_then_weights():
    """An id alone is missed with the exact text; sent again with weights, then alone, it is served."""
    subject = engine()
    assert serve(subject, Request(1, 10, 3, task_id=10)) == {1: miss(10)}
    assert serve(subject, adapter_request(2, 10)) == {2: "length"}
    assert serve(subject, Request(3, 10, 3, task_id=10)) == {3: "length"}


def test_first_request_carries_the_weights():
    """Of two requests of a new id only the first one fetched needs weights; the other way round the first is missed."""
    assert serve(engine(), adapter_request(1, 7), Request(2, 10, 3, 7)) == {1: "length", 2: "length"}
    assert serve(engine(), Request(1, 10, 3, 7), adapter_request(2, 7)) == {1: miss(7), 2: "length"}


def test_weights_sent_again_are_ignored():
    """Other weights under a cached id change nothing: new content needs a new id."""
    subject = engine()
    serve(subject, adapter_request(1, 7))
    serve(subject, Request(2, 10, 3, 7, ROWS, "other weights"))
    assert subject.payload(7) == "weights 7"
    assert subject.payload(8) is None


def test_weights_sent_again_are_checked():
    """Tensors are validated before the cache is looked at, also when it has the adapter."""
    subject = engine()
    serve(subject, adapter_request(1, 7))
    assert serve(subject, adapter_request(2, 7, rank=65))[2].startswith(f"{FETCH}Invalid low_rank (65)")


def test_eviction_is_by_completion():
    """The host drops the adapter whose last request ended longest ago, and a client learns it by the next miss."""
    subject = engine()
    for task_id in (1, 2, 3, 4):
        serve(subject, adapter_request(task_id, task_id))
    serve(subject, Request(10, 10, 3, 1))
    serve(subject, adapter_request(11, 5))
    assert serve(subject, Request(12, 10, 3, 2)) == {12: miss(2)}
    assert serve(subject, Request(13, 10, 3, 1)) == {13: "length"}
    assert subject.counters.host_evictions == 1


def test_completions_of_one_step_are_in_list_order():
    """Of adapters that complete in the same step, the one of the earlier request is evicted first."""
    subject = engine(lora_device_pages=4)
    serve(subject, *(adapter_request(task_id, task_id) for task_id in (4, 3, 2, 1)))
    serve(subject, adapter_request(11, 5))
    assert serve(subject, Request(12, 10, 3, 4)) == {12: miss(4)}
    assert serve(subject, Request(13, 10, 3, 1)) == {13: "length"}


def test_full_while_all_are_in_use():
    """With every host page in use a new adapter's request fails with the exact text; after a completion it works."""
    subject = engine(max_batch_size=8)
    requests = [adapter_request(number, number) for number in range(1, 6)]
    text = f"{FETCH}Error storing task=5 in PEFT cache -- {FULL}"
    ended = serve(subject, *requests)
    assert ended == {1: "length", 2: "length", 3: "length", 4: "length", 5: text}
    assert serve(subject, adapter_request(6, 5)) == {6: "length"}


def test_a_big_adapter_wipes_the_cache_and_fails():
    """Done adapters that are too few for a big one are all evicted, and it fails with an assertion's text."""
    subject = engine(max_batch_size=8)
    for task_id in (1, 2, 3):
        serve(subject, adapter_request(task_id, task_id))
    subject.submit(adapter_request(4, 4, tokens=50), 0)
    subject.submit(adapter_request(5, 5, rank=64), 0)
    ended = run_out(subject)
    assert ended[5].startswith(f"{FETCH}Error storing task=5 in PEFT cache -- [TensorRT-LLM][ERROR] Assertion failed")
    assert serve(subject, *(Request(10 + task, 10, 3, task) for task in (1, 2, 3, 4))) == {
        11: miss(1),
        12: miss(2),
        13: miss(3),
        14: "length",
    }


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (
            Request(1, 10, 3, 1, (Row(1, 0, 65),), "w"),
            "Invalid low_rank (65). low_rank must be smaller than mMaxLowRank (64)",
        ),
        (Request(1, 10, 3, 1, (Row(5, 0, 8),), "w"), "lora module mlp_h_to_4h not enabled for this model"),
        (Request(1, 10, 3, 1, (Row(1, 2, 8),), "w"), "Expected layerId to be in the range [0, numModelLayers)"),
        (Request(1, 10, 3, 1, (Row(1, 0, 0),), "w"), "Expected adapterSize to be > 0"),
        (Request(1, 10, 3, None, ROWS, "w"), "lora_task_id must be set for LoRA inference"),
        (Request(1, 10, 3, 1, None, "w"), "Request for LoRA inference must have both lora_weights and lora_keys"),
        (
            Request(1, 101, 3),
            "Prompt length (101) exceeds maximum input length (100). "
            "Set log level to info and check TRTLLM logs for how maximum input length is set",
        ),
    ],
)
def test_refused_when_fetched(request_: Request, text: str):
    """What the executor refuses when it fetches a request, each with its text, and the engine serves on."""
    subject = engine()
    assert serve(subject, request_) == {1: FETCH + text}
    assert serve(subject, Request(2, 10, 3)) == {2: "length"}


def test_largest_rank_is_allowed():
    """A rank equal to the engine's largest is fine, whatever its error text says about smaller."""
    assert serve(engine(lora_host_pages=8, lora_device_pages=8), adapter_request(1, 1, rank=64)) == {1: "length"}


def test_output_is_cut_at_the_longest_sequence():
    """A request for more tokens than a sequence may have ends at that length."""
    subject = engine()
    subject.submit(Request(1, 90, 1000), 0)
    endings = [ending for output in subject.advance(10**9) for ending in output.endings]
    assert [ending.output_tokens for ending in endings] == [110]


def test_queue_limit():
    """A full queue refuses at once, with the executor's text; ids in use are refused too."""
    subject = engine(max_queue=2)
    for number in (1, 2):
        subject.submit(Request(number, 10, 3), 0)
    with pytest.raises(QueueFull) as error:
        subject.submit(Request(3, 10, 3), 0)
    assert str(error.value) == "Maximum queue size of 2 has been reached, please try again later"
    subject.begin(0)
    with pytest.raises(ValueError, match="request id 1 is in use"):
        subject.submit(Request(1, 10, 3), 0)


def test_fetch_window():
    """A loop fetches what there is room for, by priority, and beyond that only what beats the lowest active one."""
    subject = engine(max_batch_size=2)
    for number, priority in enumerate([0.5, 0.5, 0.5, 0.9]):
        subject.submit(Request(number, 10, 3, priority=priority), 0)
    first = subject.begin(0)
    assert first.context == (3, 0)
    assert subject.counters.waiting == 2
    subject.submit(Request(4, 10, 3, priority=0.8), 0)
    subject.finish(first, 10)
    second = subject.begin(10)
    assert second.generation == (3, 0)
    assert (subject.counters.active, subject.counters.waiting) == (3, 2)
    subject.finish(second, 20, ended=[0])
    third = subject.begin(20)
    assert (third.context, third.generation) == ((4,), (3,))


def test_a_failed_fetch_does_not_free_its_place():
    """A request that fails when fetched used up a place of that pass; the next pass fills it."""
    subject = engine(max_batch_size=2)
    for request in (Request(1, 10, 9), Request(2, 10, 9, task_id=5), Request(3, 10, 9)):
        subject.submit(request, 0)
    first = subject.begin(0)
    assert first.context == (1,)
    assert subject.drain_failures() == [Failure(2, miss(5))]
    subject.finish(first, 10)
    assert subject.begin(10).context == (3,)


def test_end_of_sequence():
    """The executor says who met the end of its text; others go on."""
    subject = engine()
    for number in (1, 2):
        subject.submit(Request(number, 10, 9), 0)
    endings = subject.finish(subject.begin(0), 10, ended={2})
    assert [(ending.request_id, ending.reason, ending.output_tokens) for ending in endings] == [(2, "eos", 1)]
    assert subject.begin(10).generation == (1,)


def test_cancelling_releases_the_adapter():
    """A cancelled request frees its seat and its adapter: waiting at once, running after the step."""
    subject = engine(max_batch_size=1, lora_host_pages=1)
    subject.submit(adapter_request(1, 1, tokens=50), 0)
    subject.submit(adapter_request(2, 2), 0)
    running = subject.begin(0)
    subject.cancel(2, 1)
    assert [(failure.request_id, failure.cancelled) for failure in subject.drain_failures()] == [(2, True)]
    subject.submit(adapter_request(3, 3), 2)
    subject.cancel(1, 3)
    subject.cancel(1, 3)
    subject.cancel(99, 3)
    assert subject.finish(running, 10) == []
    assert [(failure.request_id, failure.cancelled) for failure in subject.drain_failures()] == [(1, True)]
    assert subject.begin(10).context == (3,)
    assert subject.payload(3) == "weights 3"


def test_adapters_wait_for_device_pages():
    """Three adapters on a device of two pages: the third waits although a seat is free, and overtaking is allowed."""
    subject = engine()
    requests = [adapter_request(1, 1), adapter_request(2, 2), adapter_request(3, 3), Request(4, 10, 3, 1)]
    for request in requests:
        subject.submit(request, 0)
    assert subject.begin(0).context == (1, 4, 2)
    assert subject.counters.device_pages_used == 2


def test_an_adapter_larger_than_the_device_never_runs():
    """It is stored and then never scheduled, without an error; others run on (the known dead loop)."""
    subject = engine()
    assert serve(subject, adapter_request(1, 1, rank=64), Request(2, 10, 3)) == {2: "length"}
    assert subject.counters.active == 1
    assert subject.next_change_ns() is None
    subject.cancel(1, 10**9)
    assert run_out(subject) == {1: "Request was cancelled"}


def test_device_cache_evicts_between_batches():
    """An adapter that fell off the device is copied again from the host, without a miss."""
    subject = engine()
    for task_id in (1, 2, 3):
        serve(subject, adapter_request(task_id, task_id))
    assert subject.counters.device_evictions == 1
    assert serve(subject, Request(9, 10, 3, 1)) == {9: "length"}
    assert (subject.counters.device_evictions, subject.counters.host_evictions) == (2, 0)


def test_whole_engine_failure():
    """An adapter that cannot be brought to the device ends every active request; the engine serves on."""
    subject = engine(scheduler="max_requests", lora_device_pages=1)
    text = f"{FORWARD}Caught exception during copyTask ensure batch -- {FULL}"
    ended = serve(subject, adapter_request(1, 1), adapter_request(2, 2), Request(3, 10, 3))
    assert ended == {1: text, 2: text, 3: text}
    assert subject.counters.active == 0
    assert serve(subject, Request(4, 10, 3, 1), Request(5, 10, 3)) == {4: "length", 5: "length"}


def test_whole_engine_failure_leaves_the_queue():
    """Requests that were not fetched yet survive a failure of the whole engine."""
    subject = engine(max_batch_size=1)
    subject.break_next_step("CUDA error: an illegal memory access was encountered")
    ended = serve(subject, Request(1, 10, 3), Request(2, 10, 3))
    assert ended == {1: f"{FORWARD}CUDA error: an illegal memory access was encountered", 2: "length"}


def test_prompt_longer_than_a_step():
    """A prompt that was accepted but exceeds the tokens of a step fails the whole engine."""
    ended = serve(engine(max_tokens_per_step=64), Request(1, 65, 3), Request(2, 10, 3))
    assert set(ended) == {1, 2}
    assert ended[1] == ended[2]
    assert ended[1].startswith(FORWARD)
    assert ended[1].endswith("The number of context tokens (65) exceeds the limit value (64)")


def test_pause_and_resume():
    """MAX_UTILIZATION pauses the younger request when blocks run out; computed again, it ends with all its tokens.

    While it is paused its adapter cannot be evicted from the host.
    """
    subject = engine(scheduler="max_utilization", kv_blocks=5, lora_host_pages=2)
    for number in (1, 2):
        subject.submit(adapter_request(number, number, tokens=30), 0)
    now_ns, endings = 0, {}
    while subject.counters.paused == 0:
        iteration = subject.begin(now_ns)
        now_ns += 1
        subject.finish(iteration, now_ns)
    subject.submit(adapter_request(3, 3), now_ns)
    longest_context = 0
    while iteration := subject.begin(now_ns):
        now_ns += 1
        longest_context = max(longest_context, subject.counters.context_tokens)
        endings.update({ending.request_id: ending.output_tokens for ending in subject.finish(iteration, now_ns)})
    assert endings == {1: 30, 2: 30}
    assert longest_context > 10
    assert [failure.text for failure in subject.drain_failures()] == [
        f"{FETCH}Error storing task=3 in PEFT cache -- {FULL}"
    ]


def test_times_of_a_cold_adapter():
    """The first step waits for the put and the copy of its adapter; later ones cost their tokens."""
    subject = engine()
    size_bytes = footprint(ROWS, subject.spec.geometry).slots * subject.spec.slot_bytes
    subject.submit(adapter_request(1, 1, tokens=3), 0)
    times = [output.at_ns for output in subject.advance(10**9)]
    first = size_bytes // 5 + size_bytes // 10 + 1000 + 10 * 10 + 5
    assert times == [first, first + 1006, first + 2 * 1006]


def test_time_is_an_argument():
    """An iteration that ends later is finished by a later call, and an idle engine begins when it is woken."""
    subject = engine()
    assert subject.next_change_ns() == 0
    assert subject.advance(500) == []
    assert subject.next_change_ns() is None
    subject.submit(Request(1, 10, 1), 700)
    assert subject.next_change_ns() == 700
    assert subject.advance(1799) == []
    assert subject.next_change_ns() == 1800
    assert [output.at_ns for output in subject.advance(1800)] == [1800]


def test_counters():
    """What the gauges show: requests by phase, KV blocks held, pages used, iterations."""
    subject = engine()
    for request in (adapter_request(1, 1, tokens=9), Request(2, 20, 9)):
        subject.submit(request, 0)
    subject.finish(subject.begin(0), 10)
    subject.submit(Request(3, 40, 9), 10)
    subject.begin(10)
    counters = subject.counters
    assert (counters.active, counters.context, counters.generation, counters.scheduled) == (3, 1, 2, 3)
    assert (counters.context_tokens, counters.iteration_counter, counters.paused) == (40, 2, 0)
    assert (counters.kv_used_blocks, counters.kv_free_blocks, counters.kv_max_blocks) == (3, 61, 64)
    assert (counters.host_pages_used, counters.device_pages_used) == (1, 1)


def test_engine_without_adapters_ignores_ids():
    """An engine built without LoRA takes a task id for nothing and answers with its base model."""
    subject = engine(lora_modules=())
    assert serve(subject, Request(1, 10, 3, task_id=5)) == {1: "length"}
    assert subject.payload(5) is None


def test_prefetched_adapters_are_cached_and_pinned():
    """Prefetch ids 3 and 5: served by id alone, and never evicted before a request of theirs has ended."""
    subject = engine(lora_host_pages=2)
    for task_id in (3, 5):
        subject.prefetch(task_id, ROWS, f"weights {task_id}")
    with pytest.raises(StoreError, match="There are no done tasks to evict"):
        subject.prefetch(7, ROWS, None)
    assert serve(subject, adapter_request(1, 9))[1].endswith(FULL)
    assert serve(subject, Request(2, 10, 3, 3)) == {2: "length"}
    assert serve(subject, adapter_request(3, 9)) == {3: "length"}
    assert serve(subject, Request(4, 10, 3, 5), Request(5, 10, 3, 3)) == {4: "length", 5: miss(3)}


def test_unsupported_dtype_does_not_choose_the_caches_dtype():
    """Weights in another dtype than the engine's or fp8 are refused, and the engine's own still work after it."""
    subject = engine()
    text = f"{FETCH}Unsupported LoRA weights dtype int8 for PEFT cache; expected model dtype float16 or FP8"
    assert serve(subject, adapter_request(1, 1, dtype="int8")) == {1: text}
    assert serve(subject, adapter_request(2, 2)) == {2: "length"}


def test_invalid_adapter_does_not_choose_the_caches_dtype():
    """An adapter that fails validation leaves the caches open to either dtype."""
    subject = engine()
    bad = Request(1, 10, 3, 1, None, "w", dtype="fp8")
    assert serve(subject, bad) == {1: f"{FETCH}Request for LoRA inference must have both lora_weights and lora_keys"}
    assert serve(subject, adapter_request(2, 2)) == {2: "length"}


def test_the_first_weights_choose_the_caches_dtype():
    """After fp8 weights the engine's own dtype is refused: one dtype a process."""
    subject = engine()
    text = f"{FETCH}PEFT cache supports one homogeneous LoRA dtype; cache is fp8 but received float16"
    ended = serve(subject, adapter_request(1, 1, dtype="fp8"), adapter_request(2, 2))
    assert ended == {1: "length", 2: text}


@pytest.mark.parametrize(("dtype", "fitting"), [("float16", 2), ("fp8", 4)])
def test_fp8_weights_double_the_pages(dtype: str, fitting: int):
    """The bytes of both caches hold twice the pages when the weights are fp8."""
    spec = {"lora_host_pages": None, "lora_device_pages": None, "max_lora_rank": 16, "max_batch_size": 8}
    subject = engine(**spec, lora_host_bytes=48 * 96 * 2 * 2, lora_device_bytes=48 * 96 * 2 * 4)
    ended = serve(subject, *(adapter_request(number, number, dtype=dtype) for number in range(1, 7)))
    assert sum(reason == "length" for reason in ended.values()) == fitting
