"""Look at a live engine and say, check by check, whether it serves adapters, and what to change where it does not.

The checks go from the wire inwards, each within a bounded time; one that is ruled out by an earlier failure is skipped
and says so. A serving engine is not disturbed: a few requests of one token, and up to two tiny adapters, which take a
page of its cache each, or one of vLLM's slots.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import grpc.aio
import httpx

from sidecar.backends.checks.finding import Finding, State, Target, failed, skipped
from sidecar.backends.kind import Checks, CheckStep
from sidecar.backends.registry import kind_of
from sidecar.backends.triton.probe import words
from sidecar.errors import SidecarError

LOOK_S = 15.0
"""The longest that one of the small checks may take in all its parts."""
SPARE_S = 10.0
"""What a check may take beyond the requests that it waits for."""


def checks_of(model_kind: str) -> Checks | None:
    """Return the checks for a kind of model; None where there are none."""
    kind = kind_of(model_kind)
    return None if kind is None or kind.checks is None else kind.checks()


def names_of(model_kind: str) -> list[str]:
    """Return the names of the checks for a kind of model, in order."""
    checks = checks_of(model_kind)
    return [] if checks is None else [step.name for step in checks.steps if step.kind in (None, model_kind)]


async def check(target: Target, begun: Callable[[str], None] = lambda name: None) -> AsyncGenerator[Finding, None]:
    """Yield what each check found, in order, as soon as it is known; `begun` hears the name of each before.

    Raises Misused for TLS files or a key that are not there.
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
    """Run one check, unless one that it needs has failed; `blamed` has the failed ones, each with the first cause."""
    causes = [blamed[name] for name in step.needs if name in blamed]
    if causes:
        blamed[step.name] = causes[0]
        return skipped(f'not looked at, because of "{causes[0]}"')
    finding = await _within_its_time(step, look)
    if finding.state in (State.FAILED, State.SKIPPED):
        blamed[step.name] = step.name
    return finding


async def _within_its_time(step: CheckStep, look: Any) -> Finding:
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
