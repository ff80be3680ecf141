"""Look at a live engine and say, check by check, whether it serves adapters, and what to change where it does not.

The checks go from the wire inwards, each within a bounded time; one that is ruled out by an earlier failure is skipped
and says so. A serving engine is not disturbed: a few requests of one token, and up to two tiny adapters, which take a
page of its cache each, or one of vLLM's slots.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import grpc.aio
import httpx
from tritonclient.grpc import service_pb2_grpc

from sidecar.backends.checks.finding import Finding, Look, State, Target, failed, skipped
from sidecar.backends.credentials import open_channel
from sidecar.backends.triton.checks import engine, memory, metrics, model, runs, server, staged
from sidecar.backends.triton.checks.runs import LOAD_S, RUN_S
from sidecar.backends.triton.dialects import TRITON, TRITON_LLMAPI, VLLM
from sidecar.backends.triton.probe import words
from sidecar.backends.vllm.checks import declared, registered
from sidecar.backends.vllm.checks import runs as vllm_runs
from sidecar.backends.vllm.checks import server as vllm_server
from sidecar.backends.vllm.checks.look import VllmLook, open_look
from sidecar.errors import SidecarError

AnyLook = TypeVar("AnyLook", Look, VllmLook)

LOOK_S = 15.0
"""The longest that one of the small checks may take in all its parts."""
SPARE_S = 10.0
"""What a check may take beyond the requests that it waits for."""


@dataclass(frozen=True)
class Step(Generic[AnyLook]):
    """One check: the earlier ones that it rests on, the kind of engine that it is for, the seconds that it may take."""

    name: str
    run: Callable[[AnyLook], Awaitable[Finding]]
    needs: tuple[str, ...] = ()
    limit_s: float = LOOK_S
    kind: str | None = None


STEPS: tuple[Step[Look], ...] = (
    Step("reachable", server.reachable, limit_s=2 * LOOK_S),
    Step("ready", server.ready, ("reachable",)),
    Step("model", server.model, ("ready",)),
    Step("kind", model.kind, ("model",)),
    Step("LoRA inputs", model.lora_inputs, ("kind",)),
    Step("dtype", model.dtype, ("LoRA inputs",), kind=TRITON),
    Step("decoupled", model.decoupled, ("model",)),
    Step("batch", model.batch, ("kind",)),
    Step("instances", model.instances, ("kind",), kind=TRITON),
    Step("engine", engine.engine, ("kind",)),
    Step("cache", engine.cache, ("LoRA inputs",), kind=TRITON),
    Step("metrics", metrics.metrics, ("reachable",)),
    Step("queue", model.queue, ("model",)),
    Step("shared memory", memory.shared_memory, ("reachable",), kind=TRITON),
    Step("TLS", server.encrypted, ("reachable",)),
    Step("base model", runs.base, ("batch",), RUN_S + SPARE_S),
    Step("adapter", runs.adapter, ("LoRA inputs", "base model"), LOAD_S + SPARE_S, TRITON),
    Step("adapter, shared", runs.adapter_shared, ("adapter",), LOAD_S + SPARE_S, TRITON),
    Step("resident", runs.resident, ("adapter",), RUN_S + SPARE_S, TRITON),
    Step("unknown id", runs.unknown_id, ("LoRA inputs", "base model"), RUN_S + SPARE_S, TRITON),
    Step("shared folder", staged.folder, ("LoRA inputs",), kind=TRITON_LLMAPI),
    Step("adapter", staged.adapter, ("shared folder", "base model"), LOAD_S + SPARE_S, TRITON_LLMAPI),
)


VLLM_STEPS: tuple[Step[VllmLook], ...] = (
    Step("reachable", vllm_server.reachable, limit_s=2 * LOOK_S),
    Step("version", vllm_server.version, ("reachable",)),
    Step("health", vllm_server.health, ("reachable",)),
    Step("TLS", vllm_server.encrypted, ("reachable",)),
    Step("API key", vllm_server.api_key, ("reachable",)),
    Step("model", vllm_server.model, ("API key",)),
    Step("LoRA updating", registered.updating, ("health", "API key")),
    Step("adapters", registered.registered, ("model",)),
    Step("metrics", declared.metrics, ("reachable",)),
    Step("shared folder", vllm_runs.folder, ("reachable",)),
    Step("base model", vllm_runs.base, ("health", "model"), RUN_S + SPARE_S),
    Step(
        "adapter",
        vllm_runs.adapter,
        ("version", "LoRA updating", "shared folder", "base model"),
        LOAD_S + RUN_S + SPARE_S,
    ),
    Step("slots", declared.slots, ("reachable",)),
    Step("kept in memory", declared.memory, ("reachable",)),
    Step("seats", declared.seats, ("reachable",)),
    Step("rank", declared.rank, ("reachable",)),
)
"""Slots come late: the metrics have them once something has been asked."""


def names_of(kind: str) -> list[str]:
    """Return the names of the checks for a kind of engine, in order."""
    steps: Sequence[Step[Look] | Step[VllmLook]] = VLLM_STEPS if kind == VLLM else STEPS
    return [step.name for step in steps if step.kind in (None, kind)]


async def check(target: Target, begun: Callable[[str], None] = lambda name: None) -> AsyncGenerator[Finding, None]:
    """Yield what each check found, in order, as soon as it is known; `begun` hears the name of each before.

    Raises Misused for TLS files or a key that are not there.
    """
    if target.facts.kind == VLLM:
        async with open_look(target) as vllm, aclosing(_all(VLLM_STEPS, vllm, begun)) as findings:
            async for finding in findings:
                yield finding
        return
    channel = open_channel(target.address, target.tls)
    try:
        look = Look(target, channel, service_pb2_grpc.GRPCInferenceServiceStub(channel), target.facts)
        async with aclosing(_all(STEPS, look, begun)) as findings:
            async for finding in findings:
                yield finding
    finally:
        await channel.close(None)


async def _all(
    steps: Sequence[Step[AnyLook]], look: AnyLook, begun: Callable[[str], None]
) -> AsyncGenerator[Finding, None]:
    blamed: dict[str, str] = {}
    for step in steps:
        if step.kind not in (None, look.facts.kind):
            continue
        begun(step.name)
        finding = await _carry_out(step, look, blamed)
        yield replace(finding, check=step.name)


async def _carry_out(step: Step[AnyLook], look: AnyLook, blamed: dict[str, str]) -> Finding:
    """Run one check, unless one that it needs has failed; `blamed` has the failed ones, each with the first cause."""
    causes = [blamed[name] for name in step.needs if name in blamed]
    if causes:
        blamed[step.name] = causes[0]
        return skipped(f'not looked at, because of "{causes[0]}"')
    finding = await _within_its_time(step, look)
    if finding.state in (State.FAILED, State.SKIPPED):
        blamed[step.name] = step.name
    return finding


async def _within_its_time(step: Step[AnyLook], look: AnyLook) -> Finding:
    try:
        async with asyncio.timeout(step.limit_s):
            return await step.run(look)
    except TimeoutError:
        return failed(f"it took longer than {step.limit_s:g} s", "check again when the engine is less busy")
    except grpc.aio.AioRpcError as error:
        return failed(f"the server does not answer it: {words(error)}")
    except httpx.HTTPError as error:
        return failed(f"the server does not answer it: {str(error) or type(error).__name__}")
    except SidecarError as error:
        return failed(error.message)
    except OSError as error:
        return failed(f"it could not be looked at: {error}")


def result_of(findings: list[Finding]) -> State:
    """Return the worst of what was found; a skipped check counts as what it was skipped for."""
    states = {finding.state for finding in findings}
    return next((state for state in (State.FAILED, State.WARNING) if state in states), State.OK)
