"""What a kind's backends must do with requests and adapters."""

from __future__ import annotations

from sidecar.core.enums import Fault
from sidecar.core.events import FirstToken, RunEnded, RunFailed
from tests.conformance.kinds.stage import LONG_TOKENS, Bench, Stage

TOKENS = 5


async def answers_alike_whole_and_streamed(stage: Stage) -> None:
    """An answer is the same in one reply and in many: every token once, in order, and one end."""
    async with stage.backend() as bench:
        for prompt in sorted(bench.asking.prompts, key=lambda prompt: prompt.value):
            found = []
            for streams in (False, True):
                if streams and not bench.backend.streams:
                    continue
                answer = await bench.run(None, prompt, streams, TOKENS)
                what = f"{bench.model.name}, {prompt.value}, {'streamed' if streams else 'whole'}"
                assert isinstance(answer.end, RunEnded), f"{what}: the run failed: {answer.end}"
                finals = [reply.final for reply in answer.replies]
                assert finals.count(True) == 1, f"{what}: {finals.count(True)} replies are final; the last one must be"
                assert finals[-1], f"{what}: replies follow the final one"
                assert answer.firsts <= 1, f"{what}: FirstToken was posted {answer.firsts} times"
                text, ids, tokens = answer.read(bench.asking, prompt)
                assert text or ids, f"{what}: the reader found neither text nor token ids"
                if streams:
                    assert answer.firsts == 1, f"{what}: FirstToken was not posted"
                    assert answer.end.output_tokens == TOKENS, f"{what}: RunEnded has {answer.end.output_tokens} tokens"
                    assert tokens == TOKENS, f"{what}: the reader counts {tokens} tokens of {TOKENS}"
                found.append((text, ids))
            assert found.count(found[0]) == len(found), f"{prompt.value}: whole it answers {found[0]}, in parts {found}"


async def answers_with_the_adapter_that_is_loaded(stage: Stage) -> None:
    """Two adapters and the base model give three answers, each the same again."""
    async with stage.backend() as bench:
        await bench.load(0)
        await bench.load(1)
        numbers = (None, 0, 1)
        said = [await bench.says(number) for number in numbers]
        assert len({str(one) for one in said}) == len(said), f"base and two adapters do not give three answers: {said}"
        again = [await bench.says(number) for number in numbers]
        assert said == again, f"asked again it answers {again}, and before {said}"
        await _all_released(bench)


async def never_answers_for_an_adapter_that_is_gone(stage: Stage) -> None:
    """With an adapter that it evicted the engine answers right or not at all: then the run fails as a miss."""
    async with stage.backend() as bench:
        await bench.load(0)
        said = await bench.says(0)
        for number in range(1, stage.engine.slots + 2):
            await bench.load(number)
        await right_or_a_miss(bench, 0, said)


async def right_or_a_miss(bench: Bench, number: int, said: object) -> None:
    """Ask with an adapter that the engine may have lost; after a miss and another load it answers as before."""
    answer = await bench.run(number)
    if isinstance(answer.end, RunFailed):
        assert answer.end.fault is Fault.MISS, f"a run whose adapter is gone must fail as a miss, not as {answer.end}"
        assert not answer.replies, "a run that fails as a miss delivers nothing: it is sent again"
    else:
        found = answer.read(bench.asking, bench.prompt)
        assert found == said, f"with an adapter that is gone it answers {found}, and before {said}"
    await bench.load(number)
    found = await bench.says(number)
    assert found == said, f"loaded again it answers {found}, and before {said}"


async def loads_again_what_was_forgotten(stage: Stage) -> None:
    """`forget` returns, for what it never heard of too, and what is forgotten can be loaded again."""
    async with stage.backend() as bench:
        await bench.load(0)
        said = await bench.says(0)
        _, packed = await bench.adapter(0)
        await bench.backend.forget(packed.key)
        await bench.backend.forget("never-loaded")
        await bench.load(0)
        assert await bench.says(0) == said, "forgotten and loaded again it answers something else"


async def cancels_a_run_and_frees_its_seat(stage: Stage) -> None:
    """A run that is cancelled ends once, early, and the engine works for it no more."""
    async with stage.backend() as bench:
        request = await bench.begin(None, tokens=LONG_TOKENS, streams=bench.backend.streams)
        if bench.backend.streams:
            await bench.comes(FirstToken, request=request)
        else:
            await bench.until(lambda: stage.engine.running() > 0, "the request did not reach the engine")
        bench.backend.cancel(request, 1)
        answer = await bench.ended(request)
        assert answer.end is not None, "a run that was cancelled must end"
        assert answer.end.output_tokens < LONG_TOKENS, "a run that was cancelled was answered in full"
        await bench.until(lambda: stage.engine.running() == 0, "the engine still answers a run that was cancelled")
        bench.backend.cancel(request, 1)
        bench.backend.cancel(10**9, 1)
        await bench.says(None)
        assert len(bench.ends(request)) == 1, f"a cancelled run ended twice: {bench.ends(request)}"


async def _all_released(bench: Bench) -> None:
    await bench.until(lambda: all(weights.released for weights in bench.weights), "weights were not released")
    released = [weights.released for weights in bench.weights]
    assert set(released) == {1}, f"weights must be released once, and were {released} times"
