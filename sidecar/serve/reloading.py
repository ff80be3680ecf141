"""Change the configuration of a process that serves: from its file, and backends by an operator's word.

A change is checked as a whole before anything is touched. It then takes effect at once; only what has to end first, as
the runs at a backend that is taken out, takes its time.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import time
from typing import Any, TypeVar

from sidecar.access.access import OURSELVES
from sidecar.access.principal import SYSTEM, Action
from sidecar.adapters.origins.allowing import AllowList
from sidecar.adapters.staging import Staging
from sidecar.backends.registry import entries_of, full_record
from sidecar.config import Config
from sidecar.config.backends import Backend as Entry
from sidecar.config.reloading import changed_backends, changed_keys, fixed_of_backends, is_reloadable
from sidecar.errors import Misused, Reason, Refused, SidecarError
from sidecar.files import DOCUMENT_BYTES_MAX, read_regular
from sidecar.serve.access_parts import AccessParts
from sidecar.serve.configured import ConfiguredBackends, settings_of
from sidecar.serve.discovered import DiscoveredPools
from sidecar.serve.listening import Listening, chat_templates
from sidecar.serve.pool import base_models, facts_of, prompt_counter_of, stagings_of
from sidecar.serve.served_folders import ServedFolders, adapters_in, roots_of
from sidecar.shell.gateway import Gateway
from sidecar.tasks import Tasks

logger = logging.getLogger(__name__)
T = TypeVar("T")

WATCH_S = 2.0
"""How often the file is compared with what was read last."""


class Source:
    """Where the configuration comes from: its file, and what reads it together with the environment and options.

    Make one before the configuration is read: `seen` is a hash of what the file held.
    """

    def __init__(self, file: Path, read: Callable[[], Config]) -> None:
        self.file = file
        self.read = read
        self.seen = _digest(file)


@dataclass(frozen=True)
class Parts:
    """What a changed configuration is told to; `has_shared_memory` says whether the store is in shared memory."""

    gateway: Gateway
    access: AccessParts
    listening: Listening
    backends: ConfiguredBackends
    pools: DiscoveredPools
    served: ServedFolders
    has_shared_memory: bool


@dataclass
class Figures:
    """How the last reload ended, and when the configuration in force was read, in Unix seconds."""

    successful: bool = True
    read_at: float = field(default_factory=time)


class Reloads:
    """Holds the configuration in force, and replaces it. `source` is None for a process without a file."""

    def __init__(self, config: Config, parts: Parts, source: Source | None = None) -> None:
        self.config = config
        self.figures = Figures()
        self._parts = parts
        self._source = source
        self._lock = asyncio.Lock()
        self._tasks = Tasks()
        self._watching: asyncio.Task[None] | None = None

    # What operators ask for (`fronts.admin.configuration.Changes`).

    def effective(self) -> dict[str, Any]:
        """Return the configuration in force, with all defaults."""
        return full_record(self.config)

    async def reload(self, why: str = "an operator asked") -> list[str]:
        """Read the file again, take what has changed, and return its keys. Raises Misused; then nothing has changed."""
        return await self._to_its_end(self._reload(why))

    async def _reload(self, why: str) -> list[str]:
        async with self._lock:
            try:
                changed = await self._change(await self._read())
            except Exception as error:
                self.figures.successful = False
                if isinstance(error, SidecarError):
                    logger.error("the configuration stays as it is (%s): %s", why, error.message)
                raise
            self.figures.successful, self.figures.read_at = True, time()
        logger.info(
            "the configuration was read again: %s", f"changed are {', '.join(changed)}" if changed else "the same"
        )
        return changed

    async def add_backend(self, name: str, url: str, like: str = "") -> None:
        """Add a backend, with the settings of another one if `like` names it. Raises Misused."""
        await self._to_its_end(self._add_backend(name, url, like))

    async def _add_backend(self, name: str, url: str, like: str) -> None:
        async with self._lock:
            record = self._record_of(like) if like else {}
            entries = entries_of(self.config)
            if any(entry.identity == name for entry in entries):
                raise Misused(Reason.CONFIG_INVALID, f"there is a backend {name} already; remove it first")
            await self._change(self._with(*self.config.backends, record | {"id": name, "url": url}))

    async def remove_backend(self, name: str) -> None:
        """Take a backend out. Raises Misused for one that is not configured."""
        await self._to_its_end(self._remove_backend(name))

    async def _remove_backend(self, name: str) -> None:
        async with self._lock:
            left = [
                record
                for record, entry in zip(self.config.backends, entries_of(self.config), strict=True)
                if entry.identity != name
            ]
            if len(left) == len(self.config.backends):
                raise self._unknown(name)
            await self._change(self._with(*left))

    async def _to_its_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Carry out a change to its end, also if the call that asked for it is cut off: half of one must not stay."""
        return await asyncio.shield(self._tasks.spawn(work))

    def _record_of(self, name: str) -> dict[str, Any]:
        """Return the settings of a backend with an address, without its id and its addresses."""
        for record, entry in zip(self.config.backends, entries_of(self.config), strict=True):
            if entry.identity == name and entry.discover is None:
                return {key: value for key, value in record.items() if key not in ("id", "url", "metrics")}
        raise self._unknown(name)

    def _unknown(self, name: str) -> Misused:
        configured = ", ".join(entry.identity for entry in entries_of(self.config)) or "none"
        return Misused(
            Reason.UNKNOWN_BACKEND, f'no backend of the configuration is called "{name[:80]}"; there are {configured}'
        )

    def _with(self, *backends: dict[str, Any]) -> Config:
        return self.config.model_copy(update={"backends": backends})

    # By itself.

    def start(self) -> None:
        """Read the file again whenever it changes, if the configuration asks for it."""
        if self.config.watch_config and self._source is not None:
            self._watching = self._tasks.spawn(self._watch(self._source))

    def watch_no_longer(self) -> None:
        """Read the file no more. A change that has begun goes on to its end."""
        if self._watching is not None:
            self._watching.cancel()

    async def stop(self) -> None:
        await self._tasks.stop()

    def hung_up(self) -> None:
        """Read the file again, as a SIGHUP asks for."""
        self._tasks.spawn(self._reload_and_tell("SIGHUP"))

    async def _watch(self, source: Source) -> None:
        last = b""
        while True:
            await asyncio.sleep(WATCH_S)
            before, last = last, await asyncio.to_thread(_digest, source.file)
            # A file that cannot be read now is being replaced, and one that changes between two looks is being written.
            if last not in (b"", source.seen) and last == before:
                await self._reload_and_tell(f"{source.file} has changed")

    async def _reload_and_tell(self, why: str) -> None:
        """Reload, and record in the audit how that ended, as the admin listener does for operators."""
        before: dict[str, Any] = {"why": why}
        try:
            after, error = {"changed": await self.reload(why)}, ""
        except SidecarError as refused:
            after, error = {}, refused.message
        except Exception as broken:
            after, error = {}, f"the sidecar failed: {broken}"
            logger.exception("a reload of the configuration broke (%s)", why)
        await self._parts.access.access.changed(
            OURSELVES, "Configuration.Reload", Action.MANAGE, SYSTEM, before, after, "", error
        )

    # The change itself.

    async def _read(self) -> Config:
        source = self._source
        if source is None:
            raise Misused(
                Reason.CONFIG_INVALID,
                "this process has no configuration file to read again: start it with sidecar serve --config FILE",
            )

        def read() -> tuple[bytes, Config | SidecarError]:
            seen = _digest(source.file)  # first: what is written meanwhile is read once more
            try:
                if seen == EMPTY:
                    why = f"{source.file} is empty, which would take everything out; write the whole file"
                    raise Misused(Reason.CONFIG_INVALID, why)
                return seen, source.read()
            except SidecarError as error:
                return seen, error

        source.seen, config = await asyncio.to_thread(read)
        if isinstance(config, SidecarError):
            raise config
        if self.config.backends and not config.backends:
            raise Misused(
                Reason.CONFIG_INVALID,
                f"{source.file} has no backends, which would take all engines out; name those that stay, or take each "
                "out with sidecar backends remove",
            )
        return config

    async def _change(self, after: Config) -> list[str]:
        """Let a configuration take effect, and return the keys that differ. Raises Misused before anything changes."""
        parts, before = self._parts, self.config
        if parts.gateway.state.draining:
            raise Refused(Reason.DRAINING, "the sidecar is shutting down: its configuration does not change any more")
        entries = entries_of(after)
        changed = [*changed_keys(before, after), *changed_backends(entries_of(before), entries)]
        self._check(before, after, entries, changed)
        facts = await asyncio.to_thread(facts_of, entries)
        new = await asyncio.to_thread(
            _Files.of, after, entries, _tokenizers(entries) != _tokenizers(entries_of(before))
        )
        stagings = await self._opened(entries)
        try:
            wanted = settings_of(entries, facts)
            pools = parts.pools.made_of(entries)
            core = replace(after.core(), pools={name: facts[name] for name in pools})
            made = parts.backends.make(wanted)
        except BaseException:
            for staging in stagings:
                await asyncio.to_thread(staging.close)
            raise
        # From here on nothing fails, and nothing of the old configuration decides any more.
        self.config = after
        parts.gateway.sources.allow = AllowList.of(after.origins.allow, roots_of(after.adapters))
        parts.backends.change(wanted, made)  # before pools go: what waits for one may wait for a new backend
        parts.gateway.configure(core, new.bases, stagings, after.queue.inbox_max)
        answers = parts.gateway.answers
        answers.each_bytes, answers.all_bytes = after.queue.answer_bytes_max, after.queue.answers_bytes_max
        if new.counter_changed:
            former, parts.gateway.counter = parts.gateway.counter, new.counter
            if former is not None:
                former.close()
        parts.access.configure(after)
        parts.listening.configure(after.queue, new.templates)
        await parts.pools.change(pools)
        await parts.served.change(after.adapters, new.adapters)
        return changed

    def _check(self, before: Config, after: Config, entries: Sequence[Entry], changed: Sequence[str]) -> None:
        """Raise Misused naming each changed key that a running process does not take."""
        former = entries_of(before)
        fixed = [key for key in changed if not is_reloadable(key)] + fixed_of_backends(former, entries)
        if not self._parts.has_shared_memory:
            known = {entry.identity for entry in former if entry.shared_memory == "must"}
            fixed += [
                f"backends.{entry.identity}.weights_transport"
                for entry in entries
                if entry.shared_memory == "must" and entry.identity not in known
            ]
        if fixed:
            keys = ", ".join(dict.fromkeys(fixed))
            raise Misused(
                Reason.CONFIG_INVALID,
                f"a change of {keys} needs a restart; nothing was changed. Restart the sidecar, or take the change out",
            )

    async def _opened(self, entries: Sequence[Entry]) -> list[Staging]:
        """Open the folders for adapters' files that are not open yet. Raises Misused naming one that cannot be used."""
        known, opened = set(self._parts.gateway.store.folders), []
        try:
            for staging in stagings_of(entries):
                if staging.directory not in known:
                    await asyncio.to_thread(staging.open)
                    opened.append(staging)
        except BaseException:
            for staging in opened:
                staging.close()
            raise
        return opened


@dataclass(frozen=True)
class _Files:
    """What is read of the files that a configuration names."""

    bases: dict[str, Any]
    templates: dict[str, Any]
    adapters: list[Path]
    counter: Any
    counter_changed: bool

    @classmethod
    def of(cls, config: Config, entries: Sequence[Entry], counter_changed: bool) -> _Files:
        """Read them. Raises Misused."""
        templates, adapters = chat_templates(entries), adapters_in(config.adapters.serve)
        counter = prompt_counter_of(entries) if counter_changed else None  # last: it has a thread
        return cls(base_models(entries), templates, adapters, counter, counter_changed)


def _tokenizers(entries: Sequence[Entry]) -> list[Any]:
    return [
        (base.name, base.aliases, base.tokenizer)
        for base in (entry.base_model for entry in entries)
        if base is not None and base.tokenizer is not None
    ]


EMPTY = hashlib.sha256(b"").digest()


def _digest(file: Path) -> bytes:
    """Return a hash of a file's content; b"" for one that cannot be read."""
    try:
        return hashlib.sha256(read_regular(file, DOCUMENT_BYTES_MAX)).digest()
    except OSError:
        return b""
