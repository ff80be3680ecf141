"""Bodies of the OpenAI API whose numbers are beyond any engine, or whose names parsers could read in two ways."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from time import thread_time
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from sidecar.core.events import Received
from sidecar.errors import Refused
from sidecar.fronts.kserve.request import Rules, read
from sidecar.fronts.kserve.structure import structure_of
from sidecar.fronts.openai.body import read_body
from sidecar.fronts.openai.large import LARGE_BYTES
from sidecar.journal import codec
from sidecar.shell.requests import COUNT_MAX
from tests.integration.test_openai_relay import COMPLETIONS, ask
from tests.kit.emulated import add_tensor, core_request, running_engine
from tests.kit.kserve_clients import DUMMY
from tests.kit.openai_house import ScriptedVllm, house
from tests.kit.serving import Recorder, Serving, serving, until, write_adapters

DIGITS = 4201
HUGE = b"9" * DIGITS


@pytest.mark.parametrize("member", [b"max_tokens", b"max_completion_tokens"])
async def test_a_number_of_thousands_of_digits_can_be_written_down(tmp_path: Path, member: bytes) -> None:
    """It reaches the engine as it came, and the journal as more than any engine gives."""
    engine, recorder = ScriptedVllm(), Recorder()
    async with house(tmp_path, [engine]) as served:
        served.gateway.observe(recorder)
        body = b'{"model":"base","prompt":"x","' + member + b'":' + HUGE + b"}"
        asking = ask(served, body)
        await engine.running_are(1)
        assert HUGE in engine.forms[0].before + engine.forms[0].after
        engine.deliver(b"{}", final=True)
        assert (await asking).status_code == 200
        (received,) = (each for each in recorder.events if isinstance(each, Received))
        assert received.output_tokens_max == COUNT_MAX
        assert codec.event_of(codec.loads(codec.named(received))) == received


async def test_answers_beyond_number_are_refused(tmp_path: Path) -> None:
    """In a sentence, not with thousands of digits."""
    async with house(tmp_path, [ScriptedVllm()]) as served:
        response = await ask(served, b'{"model":"base","prompt":"x","n":' + HUGE + b"}")
        assert response.status_code == 400
        assert len(response.json()["error"]["message"]) < 300


async def test_tensors_beyond_number_are_bounded(tmp_path: Path) -> None:
    """Of KServe: eight bytes of length; sequences count as seats, and beams as tokens of one."""
    write_adapters(tmp_path, 1)
    async with running_engine(**DUMMY) as engine, serving([engine], tmp_path) as served:
        for name, value, tokens, sequences in (
            ("request_output_len", 2**63 - 1, COUNT_MAX, 1),
            ("num_return_sequences", 3, 3 * 8, 3),
            ("beam_width", 2, 2 * 8, 1),
        ):
            request = core_request(streaming=True)
            if name == "request_output_len":
                place = next(i for i, tensor in enumerate(request.inputs) if tensor.name == name)
                del request.inputs[place]
                del request.raw_input_contents[place]
            kind = np.int64 if value > 2**31 else np.int32
            add_tensor(request, name, np.dtype(kind).name.upper(), np.array([[value]], kind))
            call = served.channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")()
            await call.write(request.SerializeToString())
            await until(lambda: bool(all_received(served)))
            (received,) = all_received(served)
            served.recorder.events.clear()
            call.cancel()
            assert (received.output_tokens_max, received.sequences) == (tokens, sequences), name


@pytest.mark.parametrize("name", ["num_return_sequences", "beam_width", "sampling_param_best_of"])
async def test_a_count_that_cannot_be_seen_is_refused(tmp_path: Path, name: str) -> None:
    """The engine would read it from a region, and run as many answers beside the seats of others."""
    write_adapters(tmp_path, 1)
    async with running_engine(**DUMMY) as engine, serving([engine], tmp_path) as served:
        request = core_request(streaming=True)
        hidden = request.inputs.add(name=name, datatype="INT32", shape=[1, 1])
        hidden.parameters["shared_memory_region"].string_param = "mine"
        hidden.parameters["shared_memory_byte_size"].int64_param = 4
        call = served.channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")()
        await call.write(request.SerializeToString())
        answer = service_pb2.ModelStreamInferResponse.FromString(await call.read())
        assert answer.error_message.startswith(f"[INVALID_REQUEST] {name} ")
        call.cancel()


def test_the_largest_of_several_counts_is_taken() -> None:
    """The LLM-API model runs `best_of` sequences to return `n`."""
    request = core_request(streaming=True)
    for name, value in (("sampling_param_n", 1), ("sampling_param_best_of", 16)):
        add_tensor(request, name, "INT32", np.array([value], np.int32))
    asked = read(structure_of(request.SerializeToString()), False, {}, Rules({}, False), "id")
    assert asked.facts.sequences == 16


def all_received(served: Serving) -> list[Received]:
    return [event for event in served.recorder.events if isinstance(event, Received)]


async def test_blocks_of_others_caches_are_not_asked_for(tmp_path: Path) -> None:
    async with house(tmp_path, [ScriptedVllm()]) as served:
        response = await ask(served, {"kv_transfer_params": {"remote_host": "10.0.0.1", "remote_block_ids": [1]}})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "kv_transfer_params")


TWICE = [
    b'{"model":"base","prompt":"x","model":"a00"}',
    b'{"model":"base","prompt":"x","\\u006dodel":"a00"}',
    b'{"model":"base","prompt":"x","n":1,"n":64}',
    b'{"model":"base","prompt":"x","max_tokens":1,"max_token\\u0073":9}',
    b'{"model":"base","prompt":"x","prompt":["a","b"]}',
    b'{"model":"base","prompt":"x","stream":false,"stream":true}',
]
STRANGE = [
    b'\xef\xbb\xbf{"model":"base","prompt":"x"}',
    '{"model":"base","prompt":"x"}'.encode("utf-16"),
    '{"model":"base","prompt":"x"}'.encode("utf-16-le"),
    '{"model":"base","prompt":"x"}'.encode("utf-32-be"),
    b'{"model":"base\xff","prompt":"x"}',
    b'{"model":"\\ud800","prompt":"x"}',
    b'{"model":"base","prompt":"x","t":NaN}',
    b'{"model":"base","prompt":"x"}{"model":"a00","prompt":"x"}',
    b'{"model":"base","prompt":"x"}\x00',
    b"{'model':'base','prompt':'x'}",
    b'{"model":["base"],"prompt":"x"}',
]


@pytest.mark.parametrize("body", TWICE + STRANGE)
async def test_what_could_name_two_models_reaches_no_engine(tmp_path: Path, body: bytes) -> None:
    """Refused with 400: which of two counts, or what an encoding hides, is for each parser to say."""
    engine = ScriptedVllm()
    async with house(tmp_path, [engine]) as served:
        response = await ask(served, body)
        assert response.status_code == 400
        assert not engine.forms


async def test_a_body_in_another_encoding_reaches_no_engine(tmp_path: Path) -> None:
    """It is read as it came, whatever the header says: compressed it is no JSON."""
    engine = ScriptedVllm()
    async with house(tmp_path, [engine]) as served:
        zipped = gzip.compress(b'{"model":"base","prompt":"x"}')
        response = await served.client.post(COMPLETIONS, content=zipped, headers={"content-encoding": "gzip"})
        assert response.status_code == 400
        assert not engine.forms


def costly(size_bytes: int) -> dict[str, bytes]:
    """Return bodies of a size that are cheap to send and dear to read."""
    head = b'{"model":"base","prompt":"x",'

    def filled(piece: bytes, before: bytes = b'"y":[', after: bytes = b"1]}") -> bytes:
        return head + before + piece * ((size_bytes - len(head) - len(before) - len(after)) // len(piece)) + after

    keys = b",".join(b'"%x":1' % number for number in range(size_bytes // 10))
    return {
        "empty lists": filled(b"[],"),
        "empty objects": filled(b"{},"),
        "numbers": filled(b"1,"),
        "long numbers": filled(b"9" * 4000 + b","),
        "members": head + keys + b"}",
        "members of one": head + b'"y":{' + keys + b"}}",
        "strings with escapes": filled(b'"\\u0041",'),
        "prompts": b'{"model":"base","prompt":[' + b'"",' * (size_bytes // 3 - 20) + b'""]}',
    }


@pytest.mark.parametrize("kind", costly(1000))
def test_what_is_read_on_the_event_loop_takes_little_time(kind: str) -> None:
    """The largest body that is read there costs little more than the standard library's parser takes for it."""
    body = costly(LARGE_BYTES)[kind]
    assert cost(read_body, body) < 4 * cost(json.loads, body)


def cost(read: Callable[[bytes], Any], raw: bytes) -> float:
    """Return the least of three times that reading a body takes of this thread; it may be refused."""
    best = float("inf")
    for _ in range(3):
        began = thread_time()
        with contextlib.suppress(Refused):
            read(raw)
        best = min(best, thread_time() - began)
    return best
