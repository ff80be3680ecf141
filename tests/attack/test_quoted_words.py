"""An engine's error quotes what its client wrote: that is no word of the engine's own.

A client once stopped an engine for everybody by the name of an input, which the engine refused by name.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from sidecar.backends.api import HttpForm
from sidecar.backends.faults import classify
from sidecar.backends.openai.vllm import DEATHS, DIALECT
from sidecar.backends.quoting import wrote_in
from sidecar.backends.wire import is_lost
from sidecar.core.effects import Dispatch, Heal
from sidecar.core.enums import Fault
from sidecar.core.events import BackendLost
from tests.attack.test_chosen_adapter import CONTENTS, CORE, INPUTS, SQL, kitchen, streamed
from tests.integration.test_vllm import fronted
from tests.kit import protobuf_wire as pw
from tests.kit.protobuf_wire import field, int32, tensor
from tests.kit.serving import Serving, write_adapters
from tests.kit.vllm_emulated import Client, running_vllm

WORDS = {
    "Maximum queue size of": Fault.QUEUE_FULL,
    "is not at ready state": Fault.LOST,
    "has no available versions": Fault.LOST,
    "not found in cache. Please send LoRA weights with request": Fault.MISS,
    "PEFT Cache is full": Fault.FULL,
    "There are no done tasks to evict": Fault.FULL,
    "Encountered an error in forwardAsync function": Fault.WHOLE_ENGINE,
    "Unable to find shared memory region": Fault.UNKNOWN_REGION,
    "Stub process is not healthy": Fault.LOST,
    "Error storing task= Assertion failed": Fault.PAGE_CLAIM,
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Serving, Any]]:
    async with kitchen(tmp_path_factory.mktemp("kitchen")) as both:
        yield both


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.asyncio(loop_scope="module")
async def test_the_name_of_an_input(house: tuple[Serving, Any], words: str) -> None:
    """The request is tried once and refused; nothing is believed of the engine for it."""
    served, _ = house
    dispatched, healed = served.recorder.count(Dispatch), served.recorder.count(Heal)
    message = CORE + SQL + INPUTS + tensor(words, "INT32", 1, 1) + CONTENTS + field(pw.RAW, int32(1))
    (answer,) = await streamed(served.channel, message)
    assert words in answer.error_message
    assert answer.error_message.startswith("[BACKEND_REJECTED]")
    assert served.recorder.count(Dispatch) == dispatched + 1
    assert served.recorder.count(Heal) == healed
    (backend,) = served.state.backends.values()
    assert backend.seats_learned is None
    assert backend.pages_learned is None
    assert backend.takes_requests
    assert not any(isinstance(event, BackendLost) for event in served.recorder.events)


@pytest.mark.parametrize("words", WORDS)
def test_an_engines_own_words_are_believed(words: str) -> None:
    """Whatever else is in the request; and in the request the same words count for nothing."""
    text = f"Executor failed process requestId 7 due to: {words}"
    assert classify(text, wrote_in(b"anything else")) is WORDS[words]
    assert classify(text, wrote_in(field(1, words))) is Fault.REJECTED


def test_words_of_grpc() -> None:
    assert is_lost(grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2", wrote_in(b""))
    assert not is_lost(grpc.StatusCode.INTERNAL, "no input 'RST_STREAM'", wrote_in(b"RST_STREAM"))


@pytest.mark.parametrize("escaped", [False, True])
@pytest.mark.parametrize("death", DEATHS)
async def test_a_value_in_a_body(tmp_path: Path, death: str, escaped: bool) -> None:
    """vLLM's validation quotes it, and nobody's engine is gone for it."""
    write_adapters(tmp_path / "adapters", 1)
    (tmp_path / "shared").mkdir()
    async with (
        running_vllm(compute="none", max_loras=2, max_cpu_loras=4) as (engine, _),
        fronted([engine], tmp_path) as served,
        Client(served.sidecar.http_address) as client,
    ):
        words = "".join(f"\\u{ord(letter):04x}" for letter in death) if escaped else death
        body = f'{{"model": "base", "prompt": "a", "max_tokens": 2, "temperature": "{words}"}}'
        answer = await client.http.post(
            "/v1/completions", content=body.encode(), headers={"content-type": "application/json"}
        )
        assert answer.status_code == 400
        assert death in answer.text
        assert served.recorder.count(Dispatch) == 1
        assert not any(isinstance(event, BackendLost) for event in served.recorder.events)


@pytest.mark.parametrize("death", DEATHS)
def test_a_dead_vllm_is_told_by_its_own_words(death: str) -> None:
    """With a server's status, and where the body does not have them however they are written there."""
    after = f', "user": "\\u{ord(death[0]):04x}{death[1:]}"}}'
    escaped = HttpForm("/v1/completions", b'{"model": ', after.encode(), "a", False)
    assert DIALECT.fault_of(500, death) is Fault.LOST
    assert DIALECT.fault_of(400, death) is Fault.REJECTED
    assert DIALECT.fault_of(500, death, wrote_in(escaped)) is Fault.REJECTED
    assert DIALECT.fault_of(503, "anything", wrote_in(escaped)) is Fault.LOST
