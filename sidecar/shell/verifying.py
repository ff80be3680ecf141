"""Verify an adapter: ask backends the same greedy prompts, as the base model and as the adapter, and compare.

The requests are like any client's, the caller's: they take its budgets, queue in its class, cause loads and are healed.
Each is restricted to its backend. A backend gets one at a time, so that our own requests never put base model and
adapter into one batch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

from sidecar.adapters.folder import Folder, NoAdapter
from sidecar.adapters.probes import Probe, read_probes
from sidecar.adapters.registration import changes_something
from sidecar.core import eligibility
from sidecar.core.enums import Phase
from sidecar.core.facts import version_id
from sidecar.errors import Reason, Refused, SidecarError
from sidecar.model.reference import Reference
from sidecar.shell.asking import (
    EXPECT_TOKENS_MAX,
    INSTANCES_MAX,
    PROBES_MAX,
    PROMPTS,
    Order,
    Question,
    check_order,
)
from sidecar.shell.evidence import Answers, Evidence, Prompt, Reply
from sidecar.shell.gateway import Gateway
from sidecar.shell.verdicts import Check, checks_of
from sidecar.state.records import Record, Version
from sidecar.telling.misfits import sentence

NO_BASE = "this sidecar refuses requests that name no adapter (base_requests: refuse)"
FAILURES_MAX = 2
"""Prompts that a backend may leave unanswered before it is asked no more."""


@dataclass(frozen=True)
class Plan:
    """What will be asked, and where. `probes` says why expected answers are missing, or that not all are asked."""

    version: str
    digest: str
    backends: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    prompts: tuple[Prompt, ...]
    probes: str


Finding = Plan | Answers | Check
Ask = Callable[[Question], Awaitable[Reply]]
Fitting = Callable[[str, Sequence[Prompt]], Awaitable[tuple[tuple[Prompt, ...], str]]]
Report = Callable[[Finding], Awaitable[None]]


@dataclass
class _Source:
    """What the adapter's folder holds."""

    folder: Folder | None = None
    probes: list[Probe] = field(default_factory=list)
    trouble: str = ""
    wrong: bool = False


class Verification:
    """One verification. `ask` makes a request and returns its ending instead of raising. `fitting` returns the prompts
    that a backend's model takes, and if there may be none, why.
    """

    def __init__(self, gateway: Gateway, order: Order, ask: Ask, fitting: Fitting) -> None:
        check_order(order)
        self._gateway = gateway
        self._order = order
        self._ask = ask
        self._fitting = fitting
        self._reporting = asyncio.Lock()
        self._asked: list[Answers] = []

    async def run(self, report: Report) -> None:
        """Report the plan, then each answer as it comes, then the checks. Raises Refused if no backend can be asked."""
        record, version = self._version()
        source = await self._source(record, version)
        plan, prompts_of = await self._plan(record, version, source)
        await report(plan)
        async with asyncio.TaskGroup() as group:
            for backend, prompts in prompts_of.items():
                group.create_task(self._ask_backend(record, version.ordinal, backend, prompts, report))
        for check in checks_of(await self._evidence(plan, source)):
            await report(check)

    def _version(self) -> tuple[Record, Version]:
        name, selector = Reference.of(self._order.reference)
        record = self._gateway.catalogue.known(name)
        if not selector:
            return record, record.version
        if (version := record.selected(selector)) is not None:
            return record, version
        has = ", ".join(f"v{version.ordinal} ({version.adapter.digest[:12]})" for version in record.versions)
        raise Refused(
            Reason.UNKNOWN_ADAPTER, f'adapter "{name}" has no version "{selector[:80]}"; it has {has}', adapter=name
        )

    async def _source(self, record: Record, version: Version) -> _Source:
        none = f"{record.name} ships no probe.jsonl, so no answer is known to be right"
        try:
            open_folder = await self._gateway.sources.opened(version.origin, version.adapter.digest)
            folder = await asyncio.to_thread(open_folder)
        except NoAdapter:  # its folder has gone, which is no reason not to ask
            return _Source(trouble=none)
        except SidecarError as error:
            return _Source(trouble=f"its source cannot be reached, so there are no known answers: {error.message}")
        try:
            probes = await asyncio.to_thread(read_probes, folder, record.name)
        except SidecarError as error:
            return _Source(folder, trouble=error.message, wrong=True)
        if probes is None:
            return _Source(folder, trouble=none)
        return _Source(folder, probes)

    async def _plan(
        self, record: Record, version: Version, source: _Source
    ) -> tuple[Plan, dict[str, tuple[Prompt, ...]]]:
        own = [Prompt(probe.prompt, expect=probe.expect) for probe in source.probes[:PROBES_MAX]]
        general = self._order.prompts or tuple(Prompt(text) for text in PROMPTS)
        known = {(prompt.text, prompt.token_ids) for prompt in own}
        prompts = (*own, *(prompt for prompt in general if (prompt.text, prompt.token_ids) not in known))
        key = version_id(version.adapter.digest, version.generation)
        skipped: list[tuple[str, str]] = []
        prompts_of: dict[str, tuple[Prompt, ...]] = {}
        for backend in self._order.backends or tuple(self._gateway.state.backends):
            if backend not in self._gateway.state.backends and not self._order.backends:
                continue  # it has been removed meanwhile
            why = self._unable(backend, key)
            fitting: tuple[Prompt, ...] = ()
            if not why:
                fitting, why = await self._fitting(backend, prompts)
            if fitting:
                prompts_of[backend] = fitting
            else:
                skipped.append((backend, why))
        if not prompts_of:
            reasons = "; ".join(f"{backend}: {why}" for backend, why in skipped) or "no backend is configured"
            message = f"{record.name}: there is no backend to ask. {reasons}"
            raise Refused(Reason.NO_BACKEND, message, adapter=record.name)
        label = f"{record.name}@v{version.ordinal}"
        probes = source.trouble or _left_out(source.probes)
        return Plan(label, version.adapter.digest, tuple(prompts_of), tuple(skipped), prompts, probes), prompts_of

    def _unable(self, backend: str, version: str) -> str:
        """Return why a backend cannot be asked, "" if it can. Raises Misused for an unknown backend."""
        unfit = eligibility.cannot_serve(self._gateway.state, self._gateway.known_backend(backend), version)
        if unfit is not None:
            return sentence(unfit)
        if not self._is_up(backend):
            return f"it is down: {self._gateway.backends[backend].detail()}"
        return ""

    async def _ask_backend(
        self, record: Record, ordinal: int, backend: str, prompts: Sequence[Prompt], report: Report
    ) -> None:
        failures = 0
        for prompt in prompts:
            asked = await self._ask_prompt(record.name, ordinal, backend, prompt)
            self._asked.append(asked)
            async with self._reporting:
                await report(asked)
            failures += not asked.answered
            if failures and (failures >= FAILURES_MAX or not self._is_up(backend)):
                return

    async def _ask_prompt(self, name: str, ordinal: int, backend: str, prompt: Prompt) -> Answers:
        tokens = max(self._order.tokens_max, min(len(prompt.expect.encode()), EXPECT_TOKENS_MAX))
        as_base = Question(backend, prompt, tokens, self._order.timeout_s)
        as_adapter = replace(as_base, version=(name, ordinal))
        base = await self._ask(as_base) if self._asks_base else Reply(error=NO_BASE)
        if base.error and not self._is_up(backend):
            return Answers(backend, prompt, base, Reply(error=base.error), tokens)
        # Instances behind one address take turns, so consecutive requests reach different ones.
        known = self._gateway.state.backends.get(backend)
        times = 1 if known is None else min(known.facts.caches, INSTANCES_MAX)
        first, *again = [await self._ask(as_adapter) for _ in range(times)]
        return Answers(backend, prompt, base, first, tokens, tuple(again))

    def _is_up(self, backend: str) -> bool:
        known = self._gateway.state.backends.get(backend)
        return known is not None and known.phase is Phase.UP

    @property
    def _asks_base(self) -> bool:
        return self._gateway.state.config.base_requests

    async def _evidence(self, plan: Plan, source: _Source) -> Evidence:
        state = self._gateway.state
        evidence = Evidence(
            version=plan.version,
            asked=self._asked,
            facts={each: state.backends[each].facts for each in plan.backends if each in state.backends},
            probes=source.trouble,
            probes_wrong=source.wrong,
            no_base="" if self._asks_base else NO_BASE,
        )
        if source.folder is None or not evidence.changes_nowhere:
            return evidence
        return replace(evidence, weightless=await _is_weightless(source.folder, plan.version))


async def _is_weightless(folder: Folder, version: str) -> bool:
    """Return True if an adapter's files are known to change nothing; False also if they can no longer be read."""
    try:
        return not await asyncio.to_thread(changes_something, folder, version)
    except SidecarError:
        return False


def _left_out(probes: Sequence[Probe]) -> str:
    if len(probes) <= PROBES_MAX:
        return ""
    return f"of the {len(probes)} lines of its probe.jsonl the first {PROBES_MAX} are asked"
