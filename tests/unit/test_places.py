"""Which backends a client's own request is held to: by kind of model and by the model that it names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sidecar.backends import wire
from sidecar.backends.api import Payload
from sidecar.backends.triton.dialects import TRITON, TRITON_LLMAPI
from sidecar.core.config import CoreConfig
from sidecar.errors import Refused
from sidecar.fronts.eligible import kserve_eligibility, restriction_to
from sidecar.serve.pool import facts_of
from tests.kit.corekit import World
from tests.kit.corekit import facts_of as engine_of
from tests.kit.entries import entries


def pool(**models: tuple[str, ...]) -> Any:
    """Return the state of a pool: for each backend its kind and the models that it has."""
    world = World(engines=0)
    for backend, (kind, *names) in models.items():
        world.add_engine(backend, replace(engine_of(), kind=kind, models=tuple(names)))
    return world.core.state


def payload(model: str, kind: str = TRITON) -> Payload:
    return Payload(model, b"", raw=True, unary=False, kind=kind)


def test_a_pool_of_one_model_holds_nobody_anywhere() -> None:
    state = pool(b0=(TRITON,), b1=(TRITON,))
    assert kserve_eligibility(state, payload("whatever")) == (payload("whatever"), ())


@pytest.mark.parametrize(("model", "only"), [("llama", ("b0",)), ("qwen_text", ("b1",)), ("ensemble", ())])
def test_a_request_goes_where_its_model_is(model: str, only: tuple[str, ...]) -> None:
    """The name that both have goes to both; so does one that nobody has, for the engine to refuse."""
    state = pool(b0=(TRITON, "llama", "ensemble"), b1=(TRITON, "qwen", "qwen_text", "ensemble"))
    assert kserve_eligibility(state, payload(model))[1] == only
    assert kserve_eligibility(state, payload("nobody's"))[1] == ()


def test_models_and_kinds_together() -> None:
    """A name that only one kind has decides the kind; where both have it the request's own form does."""
    state = pool(b0=(TRITON, "core"), b1=(TRITON_LLMAPI, "core"), b2=(TRITON_LLMAPI, "other"))
    assert kserve_eligibility(state, payload("other")) == (payload("other", TRITON_LLMAPI), ("b2",))
    assert kserve_eligibility(state, payload("core")) == (payload("core"), ("b0",))
    assert kserve_eligibility(state, payload("core", TRITON_LLMAPI)) == (payload("core", TRITON_LLMAPI), ("b1",))


@pytest.mark.parametrize(
    ("meant", "only"),
    [
        (("b0", "b1", "p", "q"), ()),
        (("b0", "b1"), ("b0", "b1")),
        (("b0", "b1", "p"), ("b0", "b1", "p")),
        (("b0", "q-0", "q-1", "p"), ("b0", "q", "p")),
        (("q-1", "p"), ("q-1", "p")),
    ],
)
def test_pools_are_meant_as_they_are_declared(meant: tuple[str, ...], only: tuple[str, ...]) -> None:
    """An empty one by its name, a filled one by its name where all in it are meant, else by its engines."""
    world = World(CoreConfig(pools={"p": engine_of(), "q": engine_of()}), engines=2)
    if any(one.startswith("q-") for one in meant):
        world.add_engine("q-0", engine_of(), pool="q")
        world.add_engine("q-1", engine_of(), pool="q")
    assert restriction_to(world.core.state, meant) == only


def test_a_pool_that_speaks_no_kserve_says_so() -> None:
    with pytest.raises(Refused, match="no backend speaks KServe"):
        kserve_eligibility(pool(b0=("vllm", "base")), payload("ensemble"))
    mixed = pool(b0=("vllm", "base"), b1=(TRITON,))
    assert kserve_eligibility(mixed, payload("ensemble")) == (payload("ensemble"), ("b1",))


def test_models_are_told_apart_only_where_there_are_several() -> None:
    urls = [{"url": "triton://h:1", "id": "a"}, {"url": "triton://h:2", "id": "b"}]
    one = entries(*urls)
    assert {facts.models for facts in facts_of(one).values()} == {()}
    urls[1] |= {"model": "qwen", "text_model": "qwen_text", "models": ["qwen_bls"]}  # type: ignore[dict-item]
    two = entries(*urls)
    found = {name: facts.models for name, facts in facts_of(two).items()}
    assert found == {"a": ("tensorrt_llm", "ensemble"), "b": ("qwen", "qwen_text", "qwen_bls")}


def test_an_appended_model_name_stands_for_the_one_before() -> None:
    request = wire.ModelInferRequest(model_name="ensemble", id="x")
    merged = wire.ModelInferRequest.FromString(request.SerializeToString() + wire.model_field("qwen_text"))
    assert (merged.model_name, merged.id) == ("qwen_text", "x")
