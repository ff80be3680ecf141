"""What a backend makes of an engine's words, its gauges and its silence."""

from __future__ import annotations

import grpc
import pytest

from sidecar.backends import wire
from sidecar.backends.faults import classify
from sidecar.backends.pulse import Pulse
from sidecar.backends.triton.gauges import Gauges, parse
from sidecar.core.enums import Fault

FETCH = "Encountered an error when fetching new request: "
STORE = f"{FETCH}Error storing task=7 in PEFT cache -- "
TEXTS = {
    "LoRA task 7 not found in cache. Please send LoRA weights with request": Fault.MISS,
    "lora_path does not exist on the Triton server's filesystem: /mnt/adapters/5f.files.p1.g0": Fault.MISS,
    "Failed to load LoRA adapter: [Errno 2] No such file or directory: '/mnt/a/adapter_config.json'": Fault.MISS,
    "Failed to load LoRA adapter: adapter_config.json has no field r": Fault.REJECTED,
    "lora_id, lora_name, and lora_path must all be provided together": Fault.REJECTED,
    "lora_ckpt_source must be one of ('hf', 'nemo'), got 'x'": Fault.REJECTED,
    f"{STORE}Cache is full. There are no done tasks to evict": Fault.FULL,
    "PEFT Cache is full. Could not store taskId=7": Fault.FULL,
    f"{STORE}[TensorRT-LLM][ERROR] Assertion failed: pageIds.has_value()": Fault.PAGE_CLAIM,
    "Encountered an error in forwardAsync function: can't move a processing task taskId=7": Fault.WHOLE_ENGINE,
    "Encountered an error in forwardAsync function: can't move a missing task taskId=7": Fault.WHOLE_ENGINE,
    "Encountered an error in forwardAsync function: Caught Exception while storing peft weights -- Cache is full. "
    "There are no done tasks to evict": Fault.WHOLE_ENGINE,
    "Encountered an error in forwardAsync function: Couldn't claim pages during copyTask -- "
    "Assertion failed: pageIds.has_value()": Fault.WHOLE_ENGINE,
    "Maximum queue size of 8 has been reached, please try again later": Fault.QUEUE_FULL,
    "Unable to find shared memory region: 'x'": Fault.UNKNOWN_REGION,
    f"{FETCH}lora_weights has an unknown shape": Fault.REJECTED,
    "inference input 'lora_weights' data-type is 'FP32', but model 'tensorrt_llm' expects 'FP16'": Fault.REJECTED,
    "unexpected shape for input 'lora_config' for model 'm'. Expected [-1,-1,3], got [1,96,4]": Fault.REJECTED,
    "Stub process 'tensorrt_llm_0_0' is not healthy.": Fault.LOST,
    "Request for unknown model: 'tensorrt_llm' has no available versions": Fault.LOST,
    "Request for unknown model: 'tensorrt_llm' version 1 is not at ready state": Fault.LOST,
    "Request for unknown model: 'tensorrt_lm' is not found": Fault.REJECTED,
    "Expected lora weights to be in CPU memory": Fault.REJECTED,
    "": Fault.REJECTED,
}
FORMS = {
    "bare": "{}",
    "C++ backend": "Executor failed process requestId 12 due to the following error: {}",
    "ensemble": "in ensemble 'ensemble', Executor failed process requestId 12 due to the following error: {}",
    "request id": "[request id: 7.1] {}",
    "LLM-API": "Error generating request: {}",
    "assertion": "Cannot process new request: [TensorRT-LLM][ERROR] Assertion failed: {} "
    "(/app/tensorrt_llm/cpp/tensorrt_llm/batch_manager/peftCacheManager.cpp:255)\n1  0x7f01 tensorrt_llm::common::"
    "throwRuntimeError(char const*, int, std::string const&) + 82",
    "traceback": "in ensemble 'tensorrt_llm_bls', Traceback (most recent call last):\n"
    '  File "/models/tensorrt_llm_bls/1/model.py", line 108, in execute\n    for res in res_gen:\n'
    "tritonclient.utils.InferenceServerException: {}\n",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", TEXTS)
def test_every_text_in_every_form(text: str, form: str) -> None:
    """An engine's words mean the same however they arrive wrapped."""
    assert classify(FORMS[form].format(text)) is TEXTS[text]


@pytest.mark.parametrize(
    ("code", "text", "lost"),
    [
        (grpc.StatusCode.UNAVAILABLE, "Socket closed", True),
        (grpc.StatusCode.UNKNOWN, "Stream removed", True),
        (grpc.StatusCode.CANCELLED, "CANCELLED", True),
        (grpc.StatusCode.OK, "", True),
        (grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2", True),
        (grpc.StatusCode.INTERNAL, "Internal error from Core", True),
        (grpc.StatusCode.INTERNAL, "Executor failed process requestId 1 due to the following error: x", False),
        (grpc.StatusCode.INVALID_ARGUMENT, "unexpected inference input 'foo'", False),
    ],
)
def test_a_broken_wire_is_told_from_the_servers_word(code: grpc.StatusCode, text: str, lost: bool) -> None:
    """Only what gRPC itself says is a loss; INTERNAL is also the code of the engine's own errors."""
    assert wire.is_lost(code, text) is lost


SCRAPE = """# HELP nv_gpu_utilization GPU utilization rate
# TYPE nv_gpu_utilization gauge
nv_gpu_utilization{gpu_uuid="x"} 0.5
# HELP nv_trt_llm_request_metrics TRT LLM request metrics
# TYPE nv_trt_llm_request_metrics gauge
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="max",version="1"} 64
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="active",version="1"} 3
nv_trt_llm_request_metrics{model="other",request_type="max",version="1"} 8
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="tensorrt_llm",version="1"} 100
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="tokens_per",model="tensorrt_llm",version="1"} 32
nv_trt_llm_general_metrics{general_type="iteration_counter",model="tensorrt_llm",version="1"} 1234
"""


def test_gauges_are_those_of_the_model() -> None:
    """Seats, KV tokens and iterations of the model asked for, whatever else the server serves."""
    assert parse(SCRAPE, "tensorrt_llm") == Gauges(seats=64, kv_tokens=3200, iterations=1234)
    assert parse(SCRAPE, "other") == Gauges(seats=8)


def test_gauges_that_are_not_there_or_not_filled_yet_are_not_known() -> None:
    """No families, or zeros before the engine's first report: nothing is known, rather than no seats."""
    assert parse("nv_gpu_utilization 1\n", "tensorrt_llm") == Gauges()
    assert parse(SCRAPE.replace(" 64", " 0").replace(" 100", " 0"), "tensorrt_llm") == Gauges(iterations=1234)


def test_silence_with_a_counter_that_moves_is_no_hang() -> None:
    """A long answer that comes as a whole keeps the engine busy: its counter says so."""
    pulse = Pulse(30, 0)
    for now_s in range(0, 3600, 29):
        assert not pulse.counted(now_s, now_s)
        assert not pulse.is_still(now_s)


def test_silence_with_a_counter_that_stands_still_is_a_hang() -> None:
    """From the last sign of life on, and not a moment earlier."""
    pulse = Pulse(30, 0)
    pulse.counted(7, 10)
    pulse.heard(20)
    pulse.counted(7, 40)
    assert not pulse.is_still(50)
    assert pulse.is_still(50.1)
    assert pulse.silent_s(50.1) == pytest.approx(30.1)


def test_a_counter_that_is_not_known_counts_as_standing_still() -> None:
    """Without metrics only responses speak; one scrape that fails does not undo what was known."""
    unknown, seen = Pulse(30, 0), Pulse(30, 0)
    seen.counted(7, 25)
    for pulse in (unknown, seen):
        assert not pulse.counted(None, 31)
    assert unknown.is_still(31)
    assert not seen.is_still(31)


def test_a_counter_that_goes_back_is_a_restart() -> None:
    """It is told once, and an engine that is reached anew starts with a clean slate."""
    pulse = Pulse(30, 0)
    assert not pulse.counted(100, 1)
    assert pulse.counted(3, 2)
    assert not pulse.counted(4, 3)
    pulse.begin(4)
    assert not pulse.counted(1, 5)


def test_a_counter_of_tokens_that_moves_is_a_sign_of_life_and_tells_the_rate() -> None:
    """As where the counted steps are those of another engine behind the address. One that goes back begins anew."""
    pulse = Pulse(30, 0)
    pulse.generated(None, 1)
    pulse.generated(100, 40)
    assert (pulse.tokens_per_s(40), pulse.silent_s(40)) == (None, 40)
    pulse.generated(100, 41)
    assert (pulse.tokens_per_s(41), pulse.silent_s(41)) == (0.0, 41)
    pulse.generated(180, 44)
    assert (pulse.tokens_per_s(44), pulse.silent_s(44)) == (20.0, 0)
    assert pulse.tokens_per_s(60) is None
    pulse.generated(5, 61)
    pulse.generated(15, 62)
    assert pulse.tokens_per_s(62) == 10.0


def test_what_is_passed_on_unparsed_is_a_token_and_nothing_else() -> None:
    """A final response, an error, another's response and a text that imitates the flag are all parsed."""
    from sidecar.backends import wire

    def message(final: bool, request_id: str = "7.1", error: str = "", text: bytes = b"x") -> bytes:
        response = wire.ModelStreamInferResponse(error_message=error)
        response.infer_response.id = request_id
        response.infer_response.parameters[wire.FINAL].bool_param = final
        response.infer_response.outputs.add(name="text_output", datatype="BYTES", shape=[1])
        response.infer_response.raw_output_contents.append(text)
        return bytes(response.SerializeToString())

    ours = wire.id_field("7.1")
    goes_on = message(False)
    assert wire.is_one_of_many(goes_on, ours)
    assert not wire.is_one_of_many(message(True), ours)
    assert not wire.is_one_of_many(message(False, "7.2"), ours)
    assert not wire.is_one_of_many(message(False, "17.1"), ours)
    assert not wire.is_one_of_many(message(False, error="Executor failed"), ours)
    imitation = goes_on[goes_on.index(b"triton_final_response") :][:25]
    assert not wire.is_one_of_many(message(True, text=imitation), ours)
