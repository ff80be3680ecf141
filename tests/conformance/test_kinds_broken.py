"""The checks for kinds must be able to fail: each does for a toy kind that breaks exactly its rule."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from pydantic import ConfigDict, field_serializer

from sidecar.backends import registry
from sidecar.backends.api import Prompt, Reply, Ticket, Weights
from sidecar.backends.checks.finding import ok
from sidecar.backends.kind import Asking, Checks, CheckStep, Kind, ModelKind, Native, Piece, Wiring
from sidecar.backends.triton.loads import LoaderProcess
from sidecar.core.effects import Dispatch
from sidecar.core.enums import Fault
from sidecar.core.events import BackendProbed, RunEnded, RunFailed
from sidecar.lab.conformance.kinds import Stage, asking, life, records, runs, sections, stage
from tests.conformance.toy import backend
from tests.conformance.toy.asking import ASKING
from tests.conformance.toy.backend import ToyBackend, ToyRun
from tests.conformance.toy.engine import ToyEngine
from tests.conformance.toy.kind import MODEL, TOY, ToyEntry
from tests.kit.peft_files import write_adapter
from tests.kit.ports import free_port


class Open(ToyEntry):
    """Takes whatever is written."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Forgetful(ToyEntry):
    """Does not write out what it has read."""

    speaks: Literal["toy", "kserve"] = "kserve"

    @field_serializer("speaks")
    def _as_another(self, speaks: str) -> str:
        return "toy"


class Strange(ToyEntry):
    """Lacks keys of engines that there are not."""

    ELSEWHERE: ClassVar = {"nobody://": {"engine.tp": "nobody has it"}}


class Anonymous(ToyEntry):
    """Names engines that were found by their addresses."""

    def at(self, name: str, address: str) -> Any:
        found = super().at(name, address)
        return found.model_copy(update={"id": f"{self.identity}-{address}"})


class Renamed(ToyEntry):
    """Has another scheme than its kind's name."""

    SCHEMES: ClassVar = {"tin": False}


def with_model(**changes: Any) -> Kind:
    return replace(TOY, models=(replace(MODEL, **changes),))


def with_asking(**changes: Any) -> Kind:
    return with_model(asking=replace(ASKING, **changes))


async def look(at: Any) -> Any:
    return ok("it is there")


LATER = Checks((CheckStep("first", look, needs=("second",)), CheckStep("second", look)), lambda target: None, vars)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("broken", "check", "says"),
    [
        (replace(TOY, section=Renamed), records.names_are_its_own, "must be toy, the kind's name"),
        (replace(TOY, models=(MODEL, MODEL)), records.names_are_its_own, "two of its models have one name"),
        (with_model(name="vllm"), records.names_are_its_own, "vllm has models of these names too"),
        (with_model(title=""), records.models_say_what_they_are, "title is empty"),
        (with_model(asking=None), records.models_say_what_they_are, "nobody could ask it"),
        (
            with_model(native=Native.KSERVE, recognises=lambda rank: True),
            records.recognises_its_own_requests_only,
            "a request without inputs",
        ),
        (replace(TOY, models=(replace(MODEL, name="tin"),)), records.knows_nothing_and_says_so, "declare gives"),
        (with_model(reads_files=False), records.knows_nothing_and_says_so, "contradicts the model's reads_files"),
        (replace(TOY, unchecked=lambda ids: "some"), records.knows_nothing_and_says_so, "must name the backends"),
        (replace(TOY, checks=lambda: LATER), records.checks_rest_on_earlier_ones, "come later or never"),
        (replace(TOY, name="tin"), sections.reads_a_url_of_each_scheme, "the form|the kind of"),
        (replace(TOY, section=Forgetful), sections.is_the_same_after_a_dump, "it differs"),
        (replace(TOY, section=Open), sections.refuses_keys_of_other_kinds, "is taken"),
        (replace(TOY, section=Strange), sections.gives_reasons_for_keys_that_it_lacks, "there are no nobody://"),
        (replace(TOY, section=Anonymous), sections.makes_entries_of_found_engines, "one name, two ids"),
        (with_asking(why_not=lambda ask: "no"), asking.answers_the_prompts_that_it_claims, "and refuses them"),
        (
            with_asking(prompts=frozenset({Prompt.TEXT})),
            asking.answers_the_prompts_that_it_claims,
            "does not claim tokens",
        ),
        (with_asking(write=lambda ask, streams: b"{}"), asking.answers_the_prompts_that_it_claims, "is not written"),
        (with_asking(why_not=lambda ask: ""), asking.passes_on_what_it_does_not_refuse, "stop_words is neither"),
    ],
)
def test_a_broken_record_is_found(
    broken: Kind, check: Callable[[Kind], None], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each check of a record fails."""
    monkeypatch.setattr(registry, "_from_elsewhere", {"toy": broken})
    with pytest.raises((AssertionError, registry.Misused), match=says):
        check(broken)


# With an engine.


class TwiceEnded(ToyBackend):
    """Ends every run twice."""

    def post(self, event: Any) -> None:
        super().post(event)
        if isinstance(event, RunEnded):
            super().post(event)


class Silent(ToyBackend):
    """Does not say that an answer has begun."""

    def post(self, event: Any) -> None:
        if isinstance(event, RunEnded | RunFailed):
            super().post(event)


class Vague(ToyBackend):
    """Does not say that an adapter was missed."""

    def post(self, event: Any) -> None:
        super().post(replace(event, fault=Fault.REJECTED) if isinstance(event, RunFailed) else event)


class BaseOnly(ToyBackend):
    """Answers everything with the base model."""

    def _begin(self, effect: Dispatch, ticket: Ticket) -> ToyRun:
        return super()._begin(replace(effect, packed_key=""), ticket)


class Substituting(ToyBackend):
    """Answers with the base model where an adapter is not loaded."""

    def _begin(self, effect: Dispatch, ticket: Ticket) -> ToyRun:
        is_there = effect.packed_key in ENGINE[-1].adapters
        return super()._begin(effect if is_there else replace(effect, packed_key=""), ticket)


class Deaf(ToyBackend):
    """Says that a cancelled run has ended, and lets it go on."""

    def cancel(self, request: int, attempt: int) -> None:
        self.post(RunEnded(request, attempt, 1))


class Unmoved(ToyBackend):
    """Never loses its engine."""

    def _lose(self, cause: str) -> None:
        """Stay."""


class Greedy(ToyBackend):
    """Keeps the weights that it is given while the engine is away."""

    def load(self, effect: Any, weights: Weights) -> None:
        if self._up:
            super().load(effect, weights)


class Chatty(ToyBackend):
    """Answers a probe twice."""

    def probe(self, within_s: float) -> None:
        self.post(BackendProbed(self.id, True))
        self.post(BackendProbed(self.id, True))


class Littering(ToyBackend):
    """Leaves a task behind."""

    async def _leave(self) -> None:
        self._left = asyncio.create_task(asyncio.sleep(60))


class Stammering:
    """Reads every token twice."""

    def __init__(self, is_text: bool) -> None:
        self._reader = ASKING.reader(is_text)

    def read(self, reply: Reply) -> Piece:
        piece = self._reader.read(reply)
        return Piece(piece.text * 2, (*piece.token_ids, *piece.token_ids), piece.tokens * 2)


ENGINE: list[ToyEngine] = []


class Engine:
    """A toy engine, in the words of the checks."""

    slots = 2

    def __init__(self, shared: Path) -> None:
        self._engine = ToyEngine(slots=self.slots, seats=1, port=free_port())
        ENGINE.append(self._engine)
        self.record = {
            "url": f"toy://{self._engine.address}", "adapters_dir": str(shared), "progress_timeout_s": 2.0,
        }  # fmt: skip
        self.start = self._engine.start
        self.kill = self._engine.kill

    def running(self) -> int:
        return len(self._engine.running)


def model_read_by(reader: Callable[[bool], Any]) -> ModelKind:
    return replace(MODEL, asking=Asking(ASKING.write, ASKING.why_not, reader))


@pytest.mark.parametrize(
    ("broken", "check", "says"),
    [
        (TwiceEnded, runs.answers_alike_whole_and_streamed, "ended 2 times"),
        (Silent, runs.answers_alike_whole_and_streamed, "FirstToken was not posted"),
        (Stammering, runs.answers_alike_whole_and_streamed, "the reader counts 10 tokens of 5"),
        (BaseOnly, runs.answers_with_the_adapter_that_is_loaded, "do not give three answers"),
        (Vague, runs.never_answers_for_an_adapter_that_is_gone, "must fail as a miss"),
        (Substituting, runs.never_answers_for_an_adapter_that_is_gone, "with an adapter that is gone it answers"),
        (Deaf, runs.cancels_a_run_and_frees_its_seat, "still answers a run that was cancelled|ended twice"),
        (Chatty, life.answers_a_probe, "answered twice"),
        (Unmoved, life.is_lost_and_comes_up_again, "BackendLost  was not posted"),
        (Greedy, life.takes_nothing_while_it_is_down, "were not released"),
        (Littering, life.stops_and_leaves_nothing, "these tasks are left"),
    ],
)
async def test_a_broken_backend_is_found(
    broken: type[Any],
    check: Callable[[Stage], Awaitable[None]],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each check with an engine fails."""
    kind = replace(TOY, models=(model_read_by(broken),)) if broken is Stammering else TOY
    monkeypatch.setattr(registry, "_from_elsewhere", {"toy": kind})
    monkeypatch.setattr(stage, "PATIENCE_S", 4)  # what is sound comes by then on a busy machine, too
    if broken is not Stammering:
        monkeypatch.setattr(backend, "ToyBackend", broken)
    adapters = [write_adapter(tmp_path / "adapters" / f"a{seed}", seed=seed) for seed in range(Engine.slots + 2)]
    with pytest.raises(AssertionError, match=says):
        await check(Stage(kind, Engine(tmp_path / "shared"), adapters, Wiring(LoaderProcess())))
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
