"""Load calls: a new version of a name on every engine that can serve it, and only then the name's own.

1. The files are copied, and their content becomes a version of the name. The name does not move yet; a new name is
   hidden from all tenants.
2. Every engine gets a request for one token by the version. It queues like a client's, so that what is open there
   gives way to it in time, and it to that. The core loads a version that has not answered yet on one engine first, then
   on the others side by side. An engine that is down, or goes down meanwhile, does not hold up the name: it gets the
   version with the first request for it once it is back.
3. The name moves to the version, on all replicas, and the oldest versions are dropped. What was received before is
   answered by the version that it found, and that is kept until then.

If that fails the version is dropped again, and the name is what it was.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic, time

from sidecar.adapters.names import check_name
from sidecar.adapters.origins.allowing import AllowList
from sidecar.backends.api import Prompt as PromptKind
from sidecar.backends.registry import model_kind
from sidecar.config.openai import LOAD_WAIT_S_MAX, LOADS
from sidecar.core import eligibility
from sidecar.core.state import State
from sidecar.errors import Reason, Refused
from sidecar.shell.asking import Question
from sidecar.shell.background import Locks
from sidecar.shell.catalogue import ATTEMPTS_MAX, Catalogue, tried
from sidecar.shell.evidence import Prompt, Reply
from sidecar.shell.gateway import Gateway
from sidecar.shell.managing import Wanted, taken_over
from sidecar.state import records
from sidecar.state.records import Record
from sidecar.tasks import ended, undisturbed

logger = logging.getLogger(__name__)

LOADS_MAX = 8
"""Load calls at work at a time; further ones wait."""
REFUSALS = 2
"""Engines that must refuse a version before it counts as bad: one alone may be short of memory."""
LOOK_S = 0.25
PROMPTS = {PromptKind.TOKENS: Prompt(token_ids=(1,)), PromptKind.TEXT: Prompt(text="1")}
UNNAMED = "base"
"""The base model of a pool none of whose engines says what it serves."""
PATH = "lora_path"
"""The label of a version that says from where it was loaded."""
_OF_THE_ADAPTER = (Reason.ADAPTER_UNAVAILABLE, Reason.BACKEND_REJECTED, Reason.QUARANTINED)
_OF_THIS_PROCESS = (Reason.DRAINING, Reason.SIDECAR_FAILED, Reason.CRASHED)

Ask = Callable[[Question], Awaitable[Reply]]


class AlreadyLoaded(Refused):
    """The name exists, and is not to be replaced."""


class RefusedByEngines(Refused):
    """Engines do not take the adapter."""


@dataclass
class Loaded:
    """The version that a name stands for now, the engines that have it, and those without it, each with the reason."""

    name: str
    ordinal: int
    backends: list[str] = field(default_factory=list)
    without: dict[str, str] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    """Those of `without` that refused it themselves."""

    @property
    def version(self) -> str:
        return f"{self.name}@v{self.ordinal}"


class Loading:
    """Carries out load calls. `ask` makes a request and returns its ending instead of raising."""

    def __init__(self, gateway: Gateway, ask: Ask, versions_kept: int) -> None:
        self._gateway = gateway
        self._ask = ask
        self._versions_kept = versions_kept
        self._of_a_name = Locks()
        self._at_work = asyncio.Semaphore(LOADS_MAX)

    @property
    def _catalogue(self) -> Catalogue:
        return self._gateway.catalogue

    @property
    def _state(self) -> State:
        return self._gateway.state

    async def load(self, name: str, path: str, in_place: bool, allow: AllowList | None = None) -> Loaded:
        """Load what a local folder that `allow` admits holds under a name; return once the name answers by it.

        Raises AlreadyLoaded; Invalid for a bad name, path or adapter, or a name of another owner; RefusedByEngines; and
        Refused for a failure that may pass.
        """
        check_name(name)
        async with self._of_a_name.of(name), self._at_work:
            begun_s = monotonic()
            before = self._catalogue.registry.get(name)
            _check_free(name, before, in_place)
            record, ordinal = await self._stage(name, path, allow)
            is_new = before is None or before.with_content(record.of(ordinal).adapter.digest) is None
            try:
                loaded = await self._bring(name, ordinal)
                await self._catalogue.change_declared(
                    name, LOADS, lambda now: records.published(now, ordinal, self._versions_kept)
                )
            except BaseException:
                if is_new or record.is_unseen:
                    await undisturbed(self._withdraw(name, ordinal))
                raise
            _log(loaded, monotonic() - begun_s)
            return loaded

    async def unload(self, name: str) -> None:
        """Forget a name. Requests for it that are here are still served; then the engines forget it.

        Raises Refused(UNKNOWN_ADAPTER), and Invalid for another owner's name.
        """
        async with self._of_a_name.of(name):
            record = self._catalogue.known(name)
            if record.is_unseen:
                raise Refused(Reason.UNKNOWN_ADAPTER, f"{name} has not been loaded yet", adapter=name)
            await self._catalogue.remove(name, Wanted(managed_by=LOADS))
            logger.info("%s was unloaded", name)

    async def _stage(self, name: str, path: str, allow: AllowList | None) -> tuple[Record, int]:
        """Make the files in a folder a version of a name, without moving the name."""
        async with self._gateway.sources.copied(name, path, allow) as (folder, config):
            base = "" if config.get("base_model_name_or_path") else self._only_base
            wanted = Wanted(managed_by=LOADS, stage=True, unseen=True, labels=((PATH, path),), base=base)
            entered = await self._catalogue.push(name, folder, wanted)
            return entered.record, entered.ordinal

    @property
    def _only_base(self) -> str:
        """The base model of the whole pool, for adapters that name none; "" if there are several."""
        facts = (backend.facts for backend in self._state.backends.values())
        bases = {each.base_models[0] for each in facts if each.base_models} or {UNNAMED}
        return bases.pop() if len(bases) == 1 else ""

    async def _withdraw(self, name: str, ordinal: int) -> None:
        registry = self._catalogue.registry

        async def withdraw() -> None:
            record = registry.get(name)
            if record is None or record.managed_by != LOADS:
                return
            left = records.without(record, ordinal)
            if left is None:
                await registry.delete(name, record)
            elif left != record:
                await registry.put(left, record)

        try:
            await tried(withdraw, ATTEMPTS_MAX)
        except Refused as refused:  # hidden, or superseded by the next load
            logger.warning("%s@v%s, which was not loaded, is still registered: %s", name, ordinal, refused.message)

    # Engines.

    async def _bring(self, name: str, ordinal: int) -> Loaded:
        """Bring a version to every engine that serves it and is up. Raises Refused if none takes it.

        Those that were asked may all have begun to drain, or gone down, while others came up: then these are asked.
        """
        loaded = Loaded(name, ordinal)
        done: set[str] = set()
        while not loaded.backends and not loaded.refusals:
            engines = [each for each in self._engines(name, ordinal) if each not in done]
            serving = [each for each in engines if self._gateway.serves(each)]
            loaded.without |= {each: "it is down" for each in engines if each not in serving}
            if not serving:
                break
            await self._bring_to_each(serving, loaded)
            done.update(each for each in serving if self._gateway.serves(each))
        if not loaded.backends or len(loaded.refusals) >= REFUSALS:  # in whatever order they have answered
            raise _not_taken(name, loaded)
        return loaded

    async def _bring_to_each(self, backends: Sequence[str], loaded: Loaded) -> None:
        """Bring a version to engines side by side, and note the results, until too many refuse it."""
        # The first to be asked is the first to load it.
        left = {asyncio.create_task(self._bring_to(each, loaded)) for each in sorted(backends, key=self._in_line)}
        try:
            while left and (loaded.backends or len(loaded.refusals) < REFUSALS):
                done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            await ended(*left)

    def _engines(self, name: str, ordinal: int) -> Sequence[str]:
        known = self._state.names.get(name)
        version = None if known is None else known.versions.get(ordinal)
        if version is None:
            raise Refused(Reason.CHANGED_MEANWHILE, f"{name} was unloaded meanwhile", adapter=name)
        return [backend.id for backend in eligibility.servers_of(self._state, version)]

    def _in_line(self, backend: str) -> int:
        """Return how much is ahead of a request at a backend; 0 for another replica's."""
        known = self._state.backends[backend]
        return len(known.queued) + known.in_flight

    async def _bring_to(self, backend: str, loaded: Loaded) -> None:
        """Bring a version to one engine, and note the result. Raises Refused if this process is going down."""
        reply = await self._answer_of(backend, loaded)
        if reply.reason is None:
            loaded.backends.append(backend)
            loaded.without.pop(backend, None)
            return
        why = reply.error.removesuffix(f" [{reply.reason.value}]")
        if reply.reason in _OF_THIS_PROCESS:
            raise Refused(Reason.DRAINING, f"{loaded.version} was not loaded: {why}")
        loaded.without[backend] = why
        if reply.reason in _OF_THE_ADAPTER:
            loaded.refusals[backend] = why

    async def _answer_of(self, backend: str, loaded: Loaded) -> Reply:
        """Return the answer of one engine by a version, or why there is none; an engine that is down is left alone."""
        engine = self._state.backends.get(backend)
        if engine is None:
            return Reply(error="it is gone", reason=Reason.NO_BACKEND)
        kind = model_kind(engine.facts.kind)
        takes_tokens = kind.asking is None or PromptKind.TOKENS in kind.asking.prompts
        prompt = PROMPTS[PromptKind.TOKENS if takes_tokens else PromptKind.TEXT]
        question = Question(backend, prompt, 1, LOAD_WAIT_S_MAX, (loaded.name, loaded.ordinal), LOADS)
        asking = asyncio.ensure_future(self._ask(question))
        try:
            while not asking.done():
                await asyncio.wait([asking], timeout=LOOK_S)
                if not asking.done() and not self._gateway.serves(backend):
                    return Reply(error="it went down meanwhile", reason=Reason.NO_BACKEND)
            return asking.result()
        finally:
            await ended(asking)


def _check_free(name: str, record: Record | None, in_place: bool) -> None:
    """Raise AlreadyLoaded or Invalid if a load call may not have a name."""
    if record is None:
        return
    if not in_place and not record.is_unseen:
        raise AlreadyLoaded(Reason.INVALID_REQUEST, f"{name} stands for v{record.current} already", adapter=name)
    taken_over(record, Wanted(managed_by=LOADS), time())


def _not_taken(name: str, loaded: Loaded) -> Refused:
    """Return the error for a version that no engine has taken."""
    if loaded.refusals:
        backend, why = next(iter(loaded.refusals.items()))
        return RefusedByEngines(Reason.ADAPTER_UNAVAILABLE, why, adapter=name, backend=backend)
    reasons = "; ".join(f"{backend}: {why}" for backend, why in loaded.without.items()) or "no engine serves its model"
    return Refused(
        Reason.NO_BACKEND, f"{name}: no engine can take it now ({reasons}); try again", retry_after_s=1.0, adapter=name
    )


def _log(loaded: Loaded, took_s: float) -> None:
    for backend, why in loaded.without.items():
        logger.warning("%s was not loaded on %s: %s", loaded.version, backend, why)
    logger.info("%s was loaded on %s in %.3f s", loaded.version, ", ".join(loaded.backends), took_s)
