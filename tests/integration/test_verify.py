"""`sidecar adapters verify` over real emulated engines and the demo's adapters: what is in force, and what is not."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from sidecar.core.effects import Dispatch, Load
from sidecar.lab.demo.model import ADAPTERS, SEED
from sidecar.lab.demo.run import LEARNED, PROMPTS
from sidecar.lab.engine.packed import unpack
from sidecar.lab.engine.shape import TINY
from sidecar.proto import admin_pb2 as pb
from tests.kit.cli_runs import Ended, runner
from tests.kit.emulated import add_lora, channel_to, core_request, running_engine, stream_answers, tokens_of
from tests.kit.peft_files import read_tensors, write_safetensors
from tests.kit.serving import Serving, serving, until

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SILENT = {"ignore_lora": True}


@dataclass
class Found:
    """What a verification said."""

    plan: Any = None
    answers: list[Any] = field(default_factory=list)
    checks: list[Any] = field(default_factory=list)

    def results(self) -> dict[str, str]:
        """Return each kind of check with its worst result."""
        order = ("skipped", "passed", "failed")
        found: dict[str, str] = {}
        for check in self.checks:
            found[check.check] = max(found.get(check.check, "skipped"), check.result, key=order.index)
        return found

    def failed(self, kind: str) -> list[Any]:
        return [check for check in self.checks if (check.check, check.result) == (kind, "failed")]

    def sentence(self, kind: str) -> str:
        return next(check.sentence for check in self.checks if check.check == kind)


async def verified(served: Serving, name: str, **fields: Any) -> Found:
    found = Found()
    prompts = [pb.VerifyPrompt(text=text) for text in fields.pop("prompts", ())]
    async for message in served.adapters.Verify(pb.VerifyRequest(name=name, prompts=prompts, **fields)):
        kind = message.WhichOneof("finding")
        if kind == "plan":
            assert found.plan is None
            assert not found.answers
            found.plan = message.plan
        else:
            getattr(found, f"{kind}s").append(getattr(message, kind))
    return found


def copied(folder: Path, name: str, probes: Sequence[tuple[str, str]] | None = None) -> Path:
    """Copy a demo adapter, with a probe.jsonl if there are lines for one."""
    shutil.copytree(ADAPTERS / name, folder / name)
    if probes is not None:
        lines = [json.dumps({"prompt": prompt, "expect": expect}) for prompt, expect in probes]
        (folder / name / "probe.jsonl").write_text("\n".join(lines) + "\n")
    return folder / name


def learned(name: str) -> list[tuple[str, str]]:
    return list(zip(PROMPTS, LEARNED[name], strict=True))


@asynccontextmanager
async def house(engines: Sequence[dict[str, Any]], adapters: Path, **record: Any) -> AsyncIterator[Serving]:
    """Run a sidecar in front of engines with these options, all with the demo's base model."""
    async with AsyncExitStack() as stack:
        running = [await stack.enter_async_context(running_engine(seed=SEED, **options)) for options in engines]
        yield await stack.enter_async_context(serving(running, adapters=adapters, **record))


async def sent_before(served: Serving, backend: str, name: str, other: str) -> None:
    """Give an engine another adapter's weights under the id that the sidecar is going to use for `name`."""
    engine_address = served.sidecar.gateway.backends[backend].address
    await served.ask(other, 1)  # its packed form is in the store then
    copy = next(copy for copy in served.state.store.entries if copy.startswith(served.state.names[other].digest))
    lease = served.sidecar.gateway.store.lease(copy)
    rows = np.frombuffer(lease.config, np.int32).reshape(-1, 3)
    weights = np.fromfile(lease.path, np.float16, count=lease.shape[0] * lease.shape[1]).reshape(lease.shape)
    lease.release()
    assert unpack(weights, rows, TINY).factors
    async with channel_to(engine_address) as stub:
        request = add_lora(core_request(tokens=1), served.task_id(name), (weights, rows))
        assert tokens_of(await stream_answers(stub, request))


# Good ones.


async def test_an_adapter_that_is_in_force(tmp_path: Path) -> None:
    """Two sound engines: it changes the answers, both agree, and its own probe.jsonl holds on both."""
    copied(tmp_path, "pirate", learned("pirate"))
    async with house([{}, {}], tmp_path) as served:
        found = await verified(served, "pirate")
        assert (found.plan.version, list(found.plan.backends)) == ("pirate@v1", ["trt-0", "trt-1"])
        assert (found.plan.prompts, found.plan.expected, found.plan.probes) == (8, 4, "")
        assert found.results() == dict.fromkeys(("answered", "changes", "agreement", "expectations"), "passed")
        assert len(found.answers) == 16
        assert sum(answer.matches for answer in found.answers) == 8
        assert "4 of 4 lines of probe.jsonl match on trt-0" in found.sentence("expectations")
        dispatches = served.recorder.of(Dispatch)
        assert {backend: sum(d.backend == backend for d in dispatches) for backend in ("trt-0", "trt-1")} == {
            "trt-0": 16,
            "trt-1": 16,
        }
        assert sorted(load.backend for load in served.recorder.of(Load)) == ["trt-0", "trt-1"]


async def test_one_backend_and_ones_own_prompts(tmp_path: Path) -> None:
    """Only the backend that is named is asked, and only what is given; there is nobody to compare it with."""
    copied(tmp_path, "chef")
    async with house([{}, {}], tmp_path) as served:
        found = await verified(served, "chef@v1", backends=["trt-1"], prompts=[PROMPTS[0]], max_tokens=8)
        assert [(answer.backend, answer.prompt.text) for answer in found.answers] == [("trt-1", PROMPTS[0])]
        assert found.answers[0].adapter.text == LEARNED["chef"][0][:8]
        assert found.results() == {
            "answered": "passed", "changes": "passed", "agreement": "skipped", "expectations": "skipped",
        }  # fmt: skip
        assert found.plan.probes == "chef ships no probe.jsonl, so no answer is known to be right"
        assert {dispatch.backend for dispatch in served.recorder.of(Dispatch)} == {"trt-1"}


# What must be found: an engine that ignores adapters.


async def test_the_only_engine_ignores_adapters(tmp_path: Path) -> None:
    """Its answers are the base model's, and the advice names the type that the weights go in."""
    copied(tmp_path, "pirate")
    async with house([SILENT], tmp_path) as served:
        found = await verified(served, "pirate")
        (check,) = found.failed("changes")
        assert check.sentence == "pirate@v1 changes nothing on trt-0: it answers all 4 prompts as the base model"
        assert "--lora_plugin float16" in check.advice
        assert "TYPE_FP16 of lora_weights" in check.advice
        assert "its effect is too small" in check.advice
        assert not any(answer.changed for answer in found.answers)


async def test_an_engine_ignores_adapters_of_another_type(tmp_path: Path) -> None:
    """A bfloat16 engine whose config.pbtxt says FP16: with the adapter's probe.jsonl nothing matches either."""
    copied(tmp_path, "sql", learned("sql"))
    async with house([SILENT | {"dtype": "bfloat16", "lora_weights": "fp16"}], tmp_path) as served:
        found = await verified(served, "sql")
        assert found.results() == {
            "answered": "passed", "changes": "failed", "agreement": "skipped", "expectations": "failed",
        }  # fmt: skip
        (check,) = found.failed("expectations")
        assert check.sentence.startswith("0 of 4 lines of probe.jsonl match on trt-0; ")
        assert check.advice == "trt-0 answers as the base model; mend that first"


# One of two backends silently answers as the base model.


async def test_one_of_two_ignores_adapters(tmp_path: Path) -> None:
    """The silent one is named, whichever it is; the other passes."""
    copied(tmp_path, "pirate")
    for engines, silent, sound in (([{}, SILENT], "trt-1", "trt-0"), ([SILENT, {}], "trt-0", "trt-1")):
        async with house(engines, tmp_path) as served:
            found = await verified(served, "pirate", prompts=PROMPTS)
            assert [list(check.backends) for check in found.failed("changes")] == [[silent]]
            assert "its effect is too small" not in found.failed("changes")[0].advice
            (check,) = found.failed("agreement")
            assert check.sentence.startswith(f"{silent} differs from {sound} on 4 of 4 prompts, first on ")
            assert "at character 1:" in check.sentence
            assert check.advice == f"{silent} answers as the base model; mend that first"


async def test_one_of_three_ignores_adapters(tmp_path: Path) -> None:
    """Two agree, the third does not, and only it is told of; known answers say the same."""
    copied(tmp_path, "weather", learned("weather")[:2])
    async with house([{}, SILENT, {}], tmp_path) as served:
        found = await verified(served, "weather")
        assert [list(check.backends) for check in found.failed("agreement")] == [["trt-1", "trt-0"]]
        assert [list(check.backends) for check in found.failed("expectations")] == [["trt-1"]]


# An engine holds other weights under the adapter's id.


async def test_one_of_two_answers_with_another_adapter(tmp_path: Path) -> None:
    """Weights sent first under the id stay: the engine answers as somebody else until a refresh."""
    copied(tmp_path, "pirate", learned("pirate"))
    copied(tmp_path, "chef")
    async with house([{}, {}], tmp_path) as served:
        await sent_before(served, "trt-1", "pirate", "chef")
        found = await verified(served, "pirate")
        assert found.results() == {
            "answered": "passed", "changes": "passed", "agreement": "failed", "expectations": "failed",
        }  # fmt: skip
        (check,) = found.failed("agreement")
        assert check.sentence.startswith("trt-1 differs from trt-0 on ")
        assert f'trt-1 says "{LEARNED["chef"][0][:30]}' in check.sentence
        assert '"sidecar adapters refresh pirate"' in check.advice
        assert "which of the two" not in check.advice
        assert [list(check.backends) for check in found.failed("expectations")] == [["trt-1"]]
        await served.adapters.Refresh(pb.RefreshRequest(name="pirate"))
        assert "failed" not in (await verified(served, "pirate")).results().values()


async def test_nobody_knows_which_of_two_is_right(tmp_path: Path) -> None:
    """Without known answers the two only differ; the advice says how to tell."""
    copied(tmp_path, "pirate")
    copied(tmp_path, "chef")
    async with house([{}, {}], tmp_path) as served:
        await sent_before(served, "trt-0", "pirate", "chef")
        found = await verified(served, "pirate", prompts=PROMPTS[:1])
        (check,) = found.failed("agreement")
        assert LEARNED["pirate"][0][:20] in check.sentence
        assert LEARNED["chef"][0][:20] in check.sentence
        assert "which of the two is right only known answers tell" in check.advice


async def test_the_only_engine_answers_with_another_adapter(tmp_path: Path) -> None:
    """Nobody is there to disagree: only the known answers show it."""
    copied(tmp_path, "pirate", learned("pirate"))
    copied(tmp_path, "legal")
    async with house([{}], tmp_path) as served:
        await sent_before(served, "trt-0", "pirate", "legal")
        found = await verified(served, "pirate")
        assert found.results()["changes"] == "passed"
        (check,) = found.failed("expectations")
        said, expected = LEARNED["legal"][0][: len(LEARNED["pirate"][0])], LEARNED["pirate"][0]
        assert check.sentence == (
            f'0 of 4 lines of probe.jsonl match on trt-0; "{PROMPTS[0]}" is answered with "{said}" and not "{expected}"'
        )
        assert '"sidecar adapters refresh pirate"' in check.advice


async def test_one_instance_of_two_answers_with_another_adapter(tmp_path: Path) -> None:
    """Behind one address the instances take turns: asked as often as there are, the backend contradicts itself."""
    copied(tmp_path, "pirate")
    copied(tmp_path, "chef")
    async with house([{"instances": 2}], tmp_path) as served:
        await sent_before(served, "trt-0", "pirate", "chef")
        found = await verified(served, "pirate", prompts=PROMPTS[:2])
        (check,) = found.failed("agreement")
        assert check.sentence.startswith(f'trt-0 answers 2 of 2 prompts in more than one way, "{PROMPTS[0]}" with ')
        assert "its 2 instances do not hold the same" in check.sentence
        assert all(len(answer.again) == 1 for answer in found.answers)


# Adapters and files that are at fault themselves.


async def test_an_adapter_without_effect(tmp_path: Path) -> None:
    """Every B is zero, as before training: the engines are right, the adapter is not."""
    folder = copied(tmp_path, "haiku")
    tensors = read_tensors(folder)
    emptied = {name: np.zeros_like(value) if "lora_B" in name else np.asarray(value) for name, value in tensors.items()}
    write_safetensors(folder / WEIGHTS, emptied)
    async with house([{}, {}], tmp_path) as served:
        found = await verified(served, "haiku")
        (check,) = found.failed("changes")
        assert check.sentence == "haiku@v1 changes nothing: A or B is zero in all of its modules"
        assert "before it was trained" in check.advice
        assert found.results()["agreement"] == "passed"


async def test_a_probe_file_that_is_wrong(tmp_path: Path) -> None:
    """A line that is none fails the check, by its number; the rest is asked all the same."""
    folder = copied(tmp_path, "sql", learned("sql")[:1])
    with (folder / "probe.jsonl").open("a") as file:
        file.write('\n{"prompt": "x"}\n')
    async with house([{}], tmp_path) as served:
        found = await verified(served, "sql")
        (check,) = found.failed("expectations")
        assert "line 3 of probe.jsonl has no text under" in check.sentence
        assert found.results()["changes"] == "passed"


async def test_a_source_that_is_gone(tmp_path: Path) -> None:
    """The weights are in the store still; that nothing is known of its answers is said."""
    folder = copied(tmp_path, "sql", learned("sql"))
    async with house([{}], tmp_path) as served:
        await served.ask("sql", 1)
        shutil.rmtree(folder)
        found = await verified(served, "sql")
        assert found.plan.probes == "sql ships no probe.jsonl, so no answer is known to be right"
        assert found.results()["changes"] == "passed"


# Who is asked.


async def test_backends_that_cannot_be_asked(tmp_path: Path) -> None:
    """Drained ones are said to be skipped; without anybody left there is nothing to verify."""
    copied(tmp_path, "chef")
    async with house([{}, {}], tmp_path) as served:
        await served.backends.Drain(pb.BackendRequest(backend="trt-0"))
        found = await verified(served, "chef")
        assert [(each.backend, each.why) for each in found.plan.skipped] == [("trt-0", "it is drained")]
        assert {answer.backend for answer in found.answers} == {"trt-1"}
        for backend, code, said in (
            ("trt-0", grpc.StatusCode.UNAVAILABLE, "chef: there is no backend to ask. trt-0: it is drained"),
            ("trt-9", grpc.StatusCode.NOT_FOUND, 'no backend is called "trt-9"'),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await verified(served, "chef", backends=[backend])
            assert refused.value.code() is code
            assert said in (refused.value.details() or "")


async def test_an_engine_that_goes_is_skipped_or_told(tmp_path: Path) -> None:
    """One that is down is not asked; one that is lost on the way has not answered."""
    copied(tmp_path, "chef")
    async with (
        running_engine(seed=SEED) as sound,
        running_engine(seed=SEED, freeze_after=3) as frozen,
        serving([sound, frozen], adapters=tmp_path, backend={"progress_timeout_s": 3.0}) as served,
    ):
        found = await verified(served, "chef", timeout_s=10)
        assert sum(answer.backend == "trt-1" for answer in found.answers) < 4  # it is asked no more once it is lost
        assert {check.backends[0] for check in found.failed("answered")} == {"trt-1"}
        assert found.results()["changes"] == "passed"
        (skipped,) = (await verified(served, "chef", prompts=PROMPTS[:1])).plan.skipped
        assert skipped.backend == "trt-1"
        assert skipped.why.startswith("it is down: ")


async def test_a_server_without_a_text_model(tmp_path: Path) -> None:
    """It is skipped with the way out, and asked with token ids."""
    copied(tmp_path, "pirate")
    async with house([{"text_model": False}], tmp_path) as served:
        with pytest.raises(grpc.aio.AioRpcError, match="--prompt-tokens"):
            await verified(served, "pirate")
        request = pb.VerifyRequest(name="pirate", prompts=[pb.VerifyPrompt(token_ids=[256, *PROMPTS[0].encode()])])
        found = Found()
        async for message in served.adapters.Verify(request):
            if message.HasField("answer"):
                found.answers.append(message.answer)
        (answer,) = found.answers
        assert bytes(answer.adapter.token_ids).decode() == LEARNED["pirate"][0][:24]
        assert answer.changed


async def test_models_of_the_llm_api(tmp_path: Path) -> None:
    """They take text only, and one that ignores what it has loaded is found just so."""
    copied(tmp_path / "adapters", "pirate", learned("pirate"))
    copied(tmp_path / "adapters", "chef")
    engines: list[dict[str, Any]] = [{"protocol": "llmapi"}, {"protocol": "llmapi", "ignore_lora": True}]
    shared = {"adapters_dir": str(tmp_path / "shared")}
    async with house(engines, tmp_path / "adapters", backend=shared) as served:
        found = await verified(served, "pirate")
        assert [list(check.backends) for check in found.failed("changes")] == [["trt-1"]]
        assert "LoRA turned on" in found.failed("changes")[0].advice
        assert [list(check.backends) for check in found.failed("expectations")] == [["trt-1"]]
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await served.adapters.Verify(
                pb.VerifyRequest(name="chef", prompts=[pb.VerifyPrompt(token_ids=[256, 65])])
            ).read()
        assert "its model takes text only" in (refused.value.details() or "")


async def test_an_adapter_that_not_everybody_may_use(tmp_path: Path) -> None:
    """Who verifies without a tenant may ask all the same, and it is booked to none of those that may."""
    copied(tmp_path, "sql")
    copied(tmp_path, "chef")
    async with house([{}], tmp_path) as served:
        await served.adapters.Register(pb.RegisterRequest(name="mine", path=str(tmp_path / "sql"), allow=["acme"]))
        for name in ("mine", "chef"):
            assert "failed" not in (await verified(served, name, prompts=PROMPTS[:1])).results().values()
        tenants = [event.tenant for event in served.recorder.events if type(event).__name__ == "Received"]
        assert tenants == ["verify"] * 4


async def test_a_sidecar_that_serves_adapters_only(tmp_path: Path) -> None:
    """The base model is not asked then; agreement and known answers remain."""
    copied(tmp_path, "sql", learned("sql"))
    async with house([{}, {}], tmp_path, base_requests="refuse") as served:
        found = await verified(served, "sql")
        assert found.results() == {
            "answered": "passed", "changes": "skipped", "agreement": "passed", "expectations": "passed",
        }  # fmt: skip


async def test_orders_that_are_too_much(tmp_path: Path) -> None:
    """Unknown names and versions, too many tokens, a prompt that is none."""
    copied(tmp_path, "sql")
    async with house([{}], tmp_path) as served:
        for fields, said in (
            ({"name": "sqk"}, "did you mean sql?"),
            ({"name": "sql@v7"}, 'adapter "sql" has no version "v7"; it has v1'),
            ({"name": "sql", "max_tokens": 10_000}, "has 1 to 512"),
            ({"name": "sql", "prompts": [""]}, "a text or token ids, one of the two"),
            ({"name": "sql", "prompts": ["x"] * 33}, "33 prompts are given and 32 are taken"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await verified(served, **fields)
            assert said in (refused.value.details() or "")


async def test_a_client_that_leaves(tmp_path: Path) -> None:
    """What was asked for it ends with it."""
    copied(tmp_path, "chef")
    async with house([{"time_scale": 1.0, "slow_factor": 50.0}], tmp_path) as served:
        call = served.adapters.Verify(pb.VerifyRequest(name="chef"))
        assert (await call.read()).plan.version == "chef@v1"
        await until(lambda: bool(served.state.requests))
        call.cancel()
        await until(lambda: not served.state.requests and not served.sidecar.gateway.tickets)


# The command.


@pytest.fixture
def sidecar(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    return runner(capfd)


async def verify(served: Serving, sidecar: Callable[..., Ended], *arguments: str) -> Ended:
    """Run the command against the served sidecar, for the adapter "pirate"."""
    where = ("--admin", served.sidecar.admin_address)
    return await asyncio.to_thread(sidecar, "adapters", "verify", "pirate", *arguments, *where)


async def test_the_command(tmp_path: Path, sidecar: Callable[..., Ended]) -> None:
    """Its exit status is the verdict; people read what was asked and what to do, scripts one JSON object."""
    copied(tmp_path, "pirate", learned("pirate")[:1])
    async with house([{}, SILENT], tmp_path) as served:
        good = await verify(served, sidecar, "--backend", "trt-0")
        assert good.code == 0
        assert good.out.startswith("verifying pirate@v1 on trt-0: 5 prompts, 1 with a known answer\n")
        assert f'→ "{LEARNED["pirate"][0]}"' in good.out
        assert "✓ 1 of 1 lines of probe.jsonl match on trt-0\n" in good.out
        bad = await verify(served, sidecar, "--all", "--prompt", PROMPTS[1], "--tokens", "16")
        assert bad.code == 1
        said = "✗ pirate@v1 changes nothing on trt-1: it answers all 2 prompts as the base model\n  → its engine takes"
        assert said in bad.out
        ended = await verify(served, sidecar, "--json")
        found = ended.json()
        assert (ended.code, found["good"], found["version"]) == (1, False, "pirate@v1")
        assert len(found["answers"]) == 10
        assert {check["result"] for check in found["checks"] if check["check"] == "agreement"} == {"failed"}


async def test_the_command_misused_and_nothing_compared(tmp_path: Path, sidecar: Callable[..., Ended]) -> None:
    """Wrong usage is 2; when nothing can be told from the answers that is no success."""
    copied(tmp_path, "pirate")
    async with house([{}], tmp_path, base_requests="refuse") as served:
        for arguments in (("--all", "--backend", "trt-0"), ("--prompt-tokens", "1,x"), ("--prompt-tokens", "-1")):
            assert (await verify(served, sidecar, *arguments)).code == 2
        ended = await verify(served, sidecar, "--tokens", "2")
        assert ended.code == 1
        assert "nothing could be compared" in ended.out
        unknown = await verify(served, sidecar, "--backend", "trt-9", "--json")
        assert (unknown.code, unknown.error()["reason"]) == (1, "UNKNOWN_BACKEND")
