"""A server that registers adapters by a call: each version by a name of its own, `sql@3f0c2e9a1b7d`.

A name is loaded before requests use it, and unloaded before its files are removed: vLLM dies of the missing files of a
registered name. Changed files at a path that an engine has seen give wrong answers out of its prefix cache, so no path
ever holds two contents; what is loaded in place is what was there.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from sidecar.backends.api import UNTOLD, HttpForm, LoadResult, Weights
from sidecar.backends.http_client import Reply, TimedOut, WireError
from sidecar.backends.openai.backend import OpenAiBackend, version_name
from sidecar.backends.openai.dialect import Dialect, Found, Measures
from sidecar.backends.openai.fitting import Fitting
from sidecar.backends.openai.naming import AsModel
from sidecar.backends.openai.run import OpenAiRun
from sidecar.core.effects import Dispatch, Load
from sidecar.core.enums import Fault
from sidecar.core.events import RunFailed
from sidecar.core.facts import EngineFacts
from sidecar.errors import Misused

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0
UNLOAD_TIMEOUT_S = 30.0
FORGET_AGAIN_S, FORGET_AGAIN_MAX_S = 0.05, 5.0


class RegisteringBackend(OpenAiBackend):
    """One such server."""

    def __init__(self, dialect: Dialect, entry: Any, declared: EngineFacts) -> None:
        super().__init__(dialect, entry, declared)
        self._fitting: Fitting | None = None
        """None if nothing has to be tried."""
        if dialect.tries_fit(entry):
            self._fitting = Fitting(dialect, self._server, entry.shared_dir, entry.load_timeout_s)
        self._registered: dict[str, str] = {}
        """The engine's name of each packed key that is registered there."""
        self._users: Counter[str] = Counter()
        """How many runs use a key, where that matters."""
        self._loading = asyncio.Lock()
        self._others = 0

    async def _identified(self, found: Found) -> None:
        """Forget names that a restart has lost, and unload those whose files are gone.

        A server without a list may still have all of them: then a name that it has lost is found by a miss.
        """
        adapters = found.served.adapters
        if adapters is None:
            return
        self._registered = {key: name for key, name in self._registered.items() if self._is_ours(key, name, adapters)}
        await self._unload_gone(adapters)

    def _is_ours(self, key: str, name: str, adapters: Mapping[str, str]) -> bool:
        """Return True if a name is registered, and with what this sidecar gives the engine."""
        if not self._dialect.is_particular:
            return name in adapters
        return adapters.get(name) == (self._path(key) if self._declared.reads_files else self._dialect.sent_root)

    async def _examined(self, before: Measures) -> None:
        if self._fitting is not None:
            self._fitting.forget()

    async def files_removed(self) -> None:
        try:
            if self._up:
                await self._unload_gone((await self._dialect.served(self._server)).adapters or {})
        except (WireError, Misused) as error:
            logger.info("%s keeps names whose files have gone: %s", self.id, self._error_text(error))

    async def _unload_gone(self, adapters: dict[str, str]) -> None:
        ours = set(self._registered.values())
        self._others = 0
        for name, path in adapters.items():
            if name in ours:
                continue
            if await asyncio.to_thread(self._is_gone, path):
                logger.info("%s: unloading %s, whose files have gone", self.id, name)
                if not await self._dialect.forget(self._server, name, path, UNLOAD_TIMEOUT_S):
                    logger.warning("%s keeps the name %s until it is restarted: its files have gone", self.id, name)
            else:
                self._others += 1

    def _is_gone(self, engine_path: str) -> bool:
        """Return True if the engine knows a folder in the shared place that no longer exists."""
        shared_dir = self._entry.shared_dir
        ours = None if shared_dir is None else shared_dir.ours_of(engine_path)
        return ours is not None and not ours.is_dir()

    def _held(self) -> str:
        if self._found.takes_none:
            registered = f"takes no adapters: {self._found.takes_none}"
        else:
            registered = f"{len(self._registered)} adapters registered"
        others = f"; {self._others} adapters that others loaded are left alone" if self._others else ""
        return f", {registered}{others}"

    # Runs.

    def _naming(self, effect: Dispatch, form: HttpForm) -> AsModel:
        base = self._found.served.base
        name = base
        if effect.packed_key:
            registered = self._registered.get(effect.packed_key, version_name(effect))
            name = self._dialect.model_name(base, registered)
        id_member = "" if effect.request == UNTOLD else self._dialect.id_member
        return AsModel(form, name, self._dialect.hidden, id_member)

    async def _go(self, run: OpenAiRun, weights: Weights | None) -> None:
        key = run.effect.packed_key
        if not key or not self._dialect.is_particular:
            return await super()._go(run, weights)
        if key not in self._registered:
            text = f"{self.id} has unloaded {version_name(run.effect)}"
            self._post(RunFailed(run.effect.request, run.effect.attempt, Fault.MISS, text, 0))
            return None
        self._registered[key] = self._registered.pop(key)  # the one that was used last is the last
        self._users[key] += 1
        try:
            return await super()._go(run, weights)
        finally:
            self._users[key] -= 1

    # Loads.

    async def _perform(self, effect: Load, weights: Weights) -> LoadResult:
        key = effect.packed.key
        await weights.ready()
        self._load_sent(effect.load)
        try:
            misfit = await self._misfit(key)
            if misfit is not None:
                return LoadResult(misfit, means=Fault.REJECTED)
            await self._make_room(key)
            name = self._registered.setdefault(key, version_name(effect))
            reply = await self._give(effect, name, weights)
            if not reply.is_ok and self._dialect.is_loaded(reply) and self._dialect.is_particular:
                adapters = (await self._dialect.served(self._server)).adapters or {}
                if not self._is_ours(key, name, adapters):  # somebody else has given the name another content
                    await self._dialect.forget(self._server, name, self._path(key), UNLOAD_TIMEOUT_S)
                    reply = await self._give(effect, name, weights)
        except TimedOut:
            text = f"the engine did not take the adapter within {self._entry.load_timeout_s:g} s"
            return LoadResult(text, unanswered=True)
        except WireError as error:
            return LoadResult(self._error_text(error), lost=True)
        if self._dialect.is_loaded(reply):
            return LoadResult(None)
        text, status = self._dialect.refusal(reply), reply.status
        # A bad adapter may be a 500 of a healthy engine; so is an engine's end.
        is_lost = self._dialect.fault_of(status, text) is Fault.LOST
        is_lost = is_lost or (status >= 500 and await self._wire_broke(text))
        self._registered.pop(key, None)
        return LoadResult(text, lost=is_lost)

    async def _give(self, effect: Load, name: str, weights: Weights) -> Reply:
        """Register an adapter, from its files or by its weights."""
        timeout_s = self._entry.load_timeout_s
        if self._declared.reads_files:
            return await self._dialect.load(self._server, name, self._path(effect.packed.key), timeout_s, effect.epoch)
        return await self._dialect.send(self._server, name, weights, self._found, self._declared, timeout_s)

    async def _make_room(self, key: str) -> None:
        """Unload idle adapters, so that the engine has no need to drop one and to wait for the requests of it."""
        room = self._facts().host_pages
        if room is None or not self._dialect.is_particular:
            return
        async with self._loading:
            idle = [each for each in self._registered if each != key and not self._users[each]]
            for each in idle[: max(0, len(self._registered.keys() | {key}) + self._others - room)]:
                name = self._registered.pop(each)
                await self._dialect.forget(self._server, name, self._path(each), UNLOAD_TIMEOUT_S)

    async def _misfit(self, key: str) -> str | None:
        """Return why the engine would answer wrongly by a staged version, if its model's sizes are not known here."""
        if self._fitting is None:
            return None
        try:
            return await self._fitting.misfit(self._entry.shared_dir.ours / key)
        except OSError as error:
            logger.warning("%s: sizes are not tried: %s", self.id, error)
            return None

    async def forget(self, key: str) -> None:
        pause_s = FORGET_AGAIN_S
        while self._up and key in self._registered:
            if self._users[key]:
                await asyncio.sleep(FORGET_AGAIN_S)
                continue
            try:
                name, path = self._registered[key], self._path(key)
                if await self._dialect.forget(self._server, name, path, UNLOAD_TIMEOUT_S):
                    await self._read_no_more()
                    break
                trouble = "it keeps the name"
            except WireError as error:
                trouble = self._error_text(error)
            logger.info("%s does not forget %s yet: %s", self.id, key, trouble)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, FORGET_AGAIN_MAX_S)
        self._registered.pop(key, None)

    async def _read_no_more(self) -> None:
        """Return when no step can read the files of a name that has just been unloaded.

        vLLM's Rust front end takes the engine's copy away at once. If a request that was cancelled is not withdrawn
        yet, the next step reads the files again; had they gone, the engine would die.
        """
        before = await self._steps() if self._found.unloads == "weights" else None
        while self._up and before is not None:
            now = await self._dialect.measures(self._server)
            if not now.inside or now.steps is None or now.steps > before + 1:
                return
            await asyncio.sleep(FORGET_AGAIN_S)

    async def _leave(self) -> None:
        if self._client.is_closed:
            return  # a process that crashes stops its backends whatever was stopped already
        await self._unload_all()
        await super()._leave()

    async def _unload_all(self) -> None:
        """Have the server forget what it would look for in vain: the files go with this process."""
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                for key, name in list(self._registered.items()):  # a load may end meanwhile
                    await self._dialect.forget(self._server, name, self._path(key), CLOSE_TIMEOUT_S)
        except (WireError, TimeoutError) as error:
            logger.info("%s was not told to forget its adapters: %s", self.id, self._error_text(error))
