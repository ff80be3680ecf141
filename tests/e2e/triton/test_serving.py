"""The main job in front of real Tritons: names in, the named adapter's tokens out, each request once."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from sidecar.core.effects import Load, Settle
from sidecar.core.enums import Phase, Seen
from sidecar.core.events import RunEnded
from sidecar.lab.engine.kserve import Options
from sidecar.lab.engine.kserve.options import spec_of
from sidecar.lab.engine.spec import engine_config_json
from tests.e2e.triton.loads import ENGINE, answered, at_once, endings, outcomes, servers, verb
from tests.kit.emulated import CORE, channel_to, core_request, stream_answers, text_request
from tests.kit.faults import assert_nothing_left, heals
from tests.kit.kserve_clients import ENSEMBLE, aio_client, ask
from tests.kit.serving import Serving, serving, until, write_adapters

CACHE = {"lora_host_pages": 4, "lora_device_pages": 4}
"""Room for four adapters that nobody is told of: the engine evicts all the while, and answers with misses."""
PAGE_BYTES = 240 * 96 * 2
"""A page of the tiny model with all linear modules at rank 8, in fp16."""
KNOWN = {"max_lora_rank": 8, "lora_max_rank_cached": 8, "lora_host_bytes": 4 * PAGE_BYTES, "lora_device_pages": 4}
"""The same room, as the model's parameters say it."""
BLS = "tensorrt_llm_bls"


async def ask_2000(served: Serving, names: list[str]) -> None:
    """Ask 2,000 times, 32 at a time: nothing fails, and each answer is the adapter's, whole and told once."""
    order = random.Random(7).choices(names, k=2000)
    answers = await at_once(32, order, lambda name: served.ask(name, 4))
    for name, answer in zip(order, answers, strict=True):
        assert answer.tokens == served.expected(name, 4)
        assert len(answer.origins) == 1
    assert {answer.origins[0].backend for answer in answers} == {"trt-0", "trt-1"}
    assert Counter(settle.outcome.value for settle in served.recorder.of(Settle)) == {"ok": 2000}
    await assert_nothing_left(served)


@pytest.mark.parametrize(
    "decoupled", [True, pytest.param(False, marks=pytest.mark.nightly)], ids=["decoupled", "whole"]
)
@pytest.mark.parametrize("transport", [pytest.param("shared_memory", marks=pytest.mark.nightly), "grpc"])
async def test_2000_requests_over_64_adapters_on_two_servers(tmp_path: Path, transport: str, decoupled: bool) -> None:
    """Sixteen times as many adapters as a cache takes, whose size is not known: the engines do each request once."""
    names = write_adapters(tmp_path / "loras", 64)
    backend = {"weights_transport": transport}
    async with (
        servers(tmp_path, 2, engine=CACHE, decoupled=decoupled) as made,
        serving(made, tmp_path / "loras", backend=backend) as served,
    ):
        await ask_2000(served, names)
        runs = outcomes(made)
        assert runs["done"] == 2000
        assert set(answered(made).values()) == {1}
        assert set(runs) <= {"done", "error"}
        assert runs["error"] == Counter(heals(served))["engine_miss"]


@pytest.mark.nightly
async def test_caches_of_known_size_are_seldom_missed(tmp_path: Path) -> None:
    """With the engine's config.json and the model's own parameters it is known what is where.

    What is sent at the same time may arrive in another order, so that the engine evicts one that is about to be asked.
    """
    names = write_adapters(tmp_path / "loras", 64)
    config = tmp_path / "engine.json"
    config.write_text(json.dumps(engine_config_json(spec_of(Options(**ENGINE, **KNOWN)))))
    backend = {"engine": {"config": str(config)}}
    async with (
        servers(tmp_path, 2, engine=KNOWN) as made,
        serving(made, tmp_path / "loras", backend=backend) as served,
    ):
        assert served.state.backends["trt-0"].facts.host_pages_total == 4
        await ask_2000(served, names)
        runs = outcomes(made)
        assert runs["done"] == 2000
        assert runs["error"] < 200
        assert served.recorder.count(Load) < 2000
        assert not [one["error"] for one in endings(made) if one["error"] and "no done tasks" in one["error"]]


@pytest.mark.parametrize("model", [ENSEMBLE, pytest.param(BLS, marks=pytest.mark.nightly)])
async def test_200_requests_through_the_models_that_take_text(tmp_path: Path, model: str) -> None:
    """Text in, the adapter's letters out; what fails in the engine comes in other words there, and is healed alike."""
    names = write_adapters(tmp_path / "loras", 16)
    order = random.Random(7).choices(names, k=200)
    async with (
        servers(tmp_path, 2, engine=CACHE, texts=True, bls_instances=4) as made,
        serving(made, tmp_path / "loras") as served,
        aio_client(served.sidecar.data_address) as client,
    ):
        answers = await at_once(32, order, lambda name: ask(client, model, name, 4))
        for name, told in zip(order, answers, strict=True):
            assert told.errors == []
            assert told.tokens() == served.expected(name, 4)
        assert outcomes(made)["done"] == 200
        assert set(answered(made).values()) == {1}
        assert Counter(heals(served))["engine_miss"] > 0
        await assert_nothing_left(served)


@pytest.mark.parametrize("model", [CORE, ENSEMBLE, pytest.param(BLS, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "whole"])
async def test_an_answer_that_comes_all_at_once_is_charged_what_the_engine_made(
    tmp_path: Path, model: str, decoupled: bool
) -> None:
    """What the sidecar asked for beside it, to count by, the client does not get."""
    outputs = {"text_output"} if model != CORE else {"output_ids", "sequence_length"}
    async with (
        servers(tmp_path, texts=True, decoupled=decoupled) as (server,),
        serving([server]) as served,
        channel_to(served.sidecar.data_address) as stub,
    ):
        request = core_request("hello", 60) if model == CORE else text_request("hello", 60)
        request.model_name = model
        if decoupled:
            (answer,) = [
                one.infer_response for one in await stream_answers(stub, request) if one.infer_response.outputs
            ]
        else:
            answer = await stub.ModelInfer(request)
        assert outputs <= {output.name for output in answer.outputs}
        assert "num_output_tokens" not in {output.name for output in answer.outputs}
        await assert_nothing_left(served)
        (run,) = [event for event in served.recorder.events if isinstance(event, RunEnded)]
        assert (run.output_tokens, run.seen) == (60, Seen.ALL)
        assert sum(one["tokens"] for one in server.served) == 60


async def test_a_model_that_is_loaded_with_other_weights_is_told(tmp_path: Path) -> None:
    """Another seed is another model."""
    async with (
        servers(tmp_path, control="explicit", engine={"compute": "llama"}) as (server,),
        serving([server], weights_check="warn") as served,
    ):
        backend = served.state.backends["trt-0"]
        for seed, differs in ((0, False), (7, True), (7, False)):
            await verb(server, "Unload")
            await until(lambda: backend.phase is Phase.DOWN)
            server.repository.write_core(server.models_folder, CORE, server.served_path, seed=seed)
            await verb(server, "Load")
            await until(lambda: backend.phase is Phase.UP)
            assert bool(served.sidecar.gateway.fleet.check.differing) == differs
