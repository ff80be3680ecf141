"""What vLLM's answers mean, without a server: metrics, errors, versions, events in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest

from sidecar.backends.openai.dialect import Measures
from sidecar.backends.openai.events import message_of, split
from sidecar.backends.openai.vllm import ALREADY, DIALECT, is_too_old, parse
from sidecar.core.enums import Fault

SCRAPE = """\
# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="128",engine="0",num_gpu_blocks="512"} 1.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="base"} 0.25
# TYPE vllm:lora_requests_info gauge
vllm:lora_requests_info{max_lora="4",running_lora_adapters="a",waiting_lora_adapters=""} 1.7e9
vllm:lora_requests_info{max_lora="2",running_lora_adapters="",waiting_lora_adapters=""} 1.8e9
# TYPE vllm:iteration_tokens_total histogram
vllm:iteration_tokens_total_bucket{engine="0",le="1.0",model_name="base"} 3.0
vllm:iteration_tokens_total_count{engine="0",model_name="base"} 7.0
vllm:iteration_tokens_total_sum{engine="0",model_name="base"} 40.0
# TYPE process_start_time_seconds gauge
process_start_time_seconds 1.76e9
# TYPE http_requests counter
http_requests_total{handler="/v1/completions"} 12.0
"""


def test_a_scrape_says_how_much_the_engine_takes() -> None:
    """Of the adapters' series, kept for ever by vLLM, the newest counts."""
    told = Measures(steps=7, kv_tokens=65536, kv_used=16384, slots=2, started_at=1.76e9, has_lora=True)
    assert parse(SCRAPE) == told


def test_before_the_first_answer_there_is_a_family_without_a_sample() -> None:
    """As vLLM 0.32 says it with `--enable-lora`; without it the family is not there."""
    text = "# HELP vllm:lora_requests_info Running stats on lora requests.\n# TYPE vllm:lora_requests_info gauge\n"
    assert parse(text) == Measures(has_lora=True)


def test_generated_tokens_are_those_of_all_engines_behind_the_address() -> None:
    """vLLM counts by engine where it runs several (`--data-parallel-size`)."""
    counters = "".join(
        f'vllm:generation_tokens_total{{engine="{engine}",model_name="base"}} {tokens}.0\n'
        for engine, tokens in enumerate((138, 4))
    )
    assert parse(f"# TYPE vllm:generation_tokens counter\n{counters}").generated == 142


def test_a_scrape_that_says_nothing_of_it() -> None:
    assert parse("python_info 1.0\n") == Measures()


@pytest.mark.parametrize(
    ("status", "text", "fault"),
    [
        (404, "The model `sql@0123456789ab` does not exist. Valid aliases: base.", Fault.MISS),
        (404, "Not Found", Fault.REJECTED),
        (400, "This model's maximum context length is 1024 tokens.", Fault.REJECTED),
        (500, "EngineCore encountered an issue. See stack trace (above) for the root cause.", Fault.LOST),
        (500, "The server had an error while processing your request.", Fault.LOST),
        (500, "engine-core error: engine core reported fatal failure", Fault.LOST),
        (500, "completion stream failed: engine-core error: engine core reported fatal failure", Fault.LOST),
        (400, "engine-core error: engine core reported fatal failure", Fault.REJECTED),
        (404, "The model `sql@0123456789ab` does not exist.", Fault.MISS),
        (500, "anything else", Fault.REJECTED),
        (503, "", Fault.LOST),
    ],
)
def test_what_an_error_means(status: int, text: str, fault: Fault) -> None:
    assert DIALECT.fault_of(status, text) is fault


@pytest.mark.parametrize(
    "text",
    [
        "The lora adapter 'n' has already been loaded. If you want to load the adapter in place, set 'load_inplace' to "
        "True.",
        "LoRA adapter `n` is already loaded. If you want to load the adapter in place, set 'load_inplace' to true.",
    ],
)
def test_a_name_that_is_there_already(text: str) -> None:
    """Each front end has its own words for it."""
    assert ALREADY.search(text)
    assert not ALREADY.search("LoRA adapter `n` conflicts with a served base model")


@pytest.mark.parametrize(
    ("version", "old"),
    [("0.31.1", True), ("0.9.2", True), ("0.32.0", False), ("0.33.0rc1", False), ("1.0", False), ("dev", False)],
)
def test_versions_that_can_answer_with_other_weights(version: str, old: bool) -> None:
    assert is_too_old(version) is old


def test_an_errors_own_words() -> None:
    assert message_of(b'{"error":{"message":"no","type":"BadRequestError","code":400}}') == "no"
    assert message_of(b"<html>proxy</html>") == "<html>proxy</html>"
    assert message_of(b'{"detail":"Not Found"}') == '{"detail":"Not Found"}'


@pytest.mark.parametrize("cuts", [(), (1,), (3, 4, 17), tuple(range(1, 40))])
def test_events_come_whole_however_they_are_cut(cuts: Sequence[int]) -> None:
    stream = b'data: {"a":1}\n\ndata: {"b":2}\n\ndata: [DONE]\n\n'
    edges = [0, *cuts, len(stream)]

    events, rest = [], b""
    for begin, end in pairwise(edges):
        whole, rest = split(rest + stream[begin:end])
        events += whole
    assert rest == b""
    assert events == [b'data: {"a":1}', b'data: {"b":2}', b"data: [DONE]"]
