"""Check a live engine step by step: does it serve adapters, and if not, what must be changed.

The checks go from the network inwards, each within a time limit. A check that rests on a failed one is skipped and says
so. A serving engine is hardly disturbed: it gets a few requests of one token and up to two tiny adapters, each of which
takes a page of its cache, or one of vLLM's slots.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import grpc.aio

from sidecar.backends.checks.finding import Finding, State, Target, failed, skipped
from sidecar.backends.http_client import WireError
from sidecar.backends.kind import Checks, CheckStep
from sidecar.backends.registry import kind_of
from sidecar.backends.wire import describe
from sidecar.errors import SidecarError


def checks_of(model_kind: str) -> Checks | None:
    """Return the checks for a kind of model; None if there are none."""
    kind = kind_of(model_kind)
    return None if kind is None or kind.checks is None else kind.checks()


def names_of(model_kind: str) -> list[str]:
    """Return the names of the checks for a kind of model, in order."""
    checks = checks_of(model_kind)
    return [] if checks is None else [step.name for step in checks.steps if step.kind in (None, model_kind)]


async def check(target: Target, begun: Callable[[str], None] = lambda name: None) -> AsyncGenerator[Finding, None]:
    """Yield the finding of each check as soon as it is known; `begun` is called with each check's name before.

    Raises Misused for missing TLS files or a missing key.
    """
    checks = checks_of(target.facts.kind)
    assert checks is not None, f"no checks for {target.facts.kind}"
    async with checks.open(target) as look, aclosing(_all(checks.steps, look, begun)) as findings:
        async for finding in findings:
            yield finding


async def _all(steps: Sequence[CheckStep], look: Any, begun: Callable[[str], None]) -> AsyncGenerator[Finding, None]:
    blamed: dict[str, str] = {}
    for step in steps:
        if step.kind not in (None, look.facts.kind):
            continue
        begun(step.name)
        finding = await _carry_out(step, look, blamed)
        yield replace(finding, check=step.name)


async def _carry_out(step: CheckStep, look: Any, blamed: dict[str, str]) -> Finding:
    """Run one check unless one that it needs has failed. `blamed` maps each failed check to the first cause."""
    causes = [blamed[name] for name in step.needs if name in blamed]
    if causes:
        blamed[step.name] = causes[0]
        return skipped(f'not looked at, because of "{causes[0]}"')
    finding = await _within_limit(step, look)
    if finding.state in (State.FAILED, State.SKIPPED):
        blamed[step.name] = step.name
    return finding


async def _within_limit(step: CheckStep, look: Any) -> Finding:
    try:
        async with asyncio.timeout(step.limit_s):
            return await step.run(look)
    except TimeoutError:
        return failed(f"it took longer than {step.limit_s:g} s", "check again when the engine is less busy")
    except grpc.aio.AioRpcError as error:
        return failed(f"the server does not answer it: {describe(error)}")
    except WireError as error:
        return failed(f"the server does not answer it: {error}")
    except SidecarError as error:
        return failed(error.message)
    except OSError as error:
        return failed(f"it could not be looked at: {error}")


def result_of(findings: list[Finding]) -> State:
    """Return the worst state. A skipped check counts as the one for which it was skipped."""
    states = {finding.state for finding in findings}
    return next((state for state in (State.FAILED, State.WARNING) if state in states), State.OK)
