"""The configured folder of adapters: each subfolder is registered under its own name."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from sidecar.config.adapters import Adapters
from sidecar.errors import Invalid, Misused, Reason, Refused
from sidecar.shell.catalogue import Catalogue, Wanted
from sidecar.tasks import ended

logger = logging.getLogger(__name__)

AGAIN_S = 1.0


class ServedFolders:
    """Registers the adapters of the folder, and restores their names when an override has run out."""

    def __init__(self, wanted: Adapters, catalogue: Catalogue) -> None:
        self._wanted = wanted
        self._catalogue = catalogue
        catalogue.is_configured = lambda name: any(path.name == name for path in self._paths)
        self._paths: list[Path] = []
        self.left: set[Path] = set()
        """Folders that could not be registered yet."""
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Register all; a failure that may pass is tried again. Raises Misused if the folder does not exist."""
        for note in missing_roots(self._wanted):
            logger.warning("%s", note)
        self._paths = adapters_in(self._wanted.serve)
        await asyncio.gather(*(self._register(path) for path in self._paths))
        self._task = asyncio.create_task(self._reconcile())

    async def change(self, wanted: Adapters, paths: Sequence[Path]) -> None:
        """Register what is new in the folder, and all of it if it or its allow lists are others.

        Names that only the former folder has stay, as after a restart with a data directory.
        """
        is_other = (wanted.serve, wanted.allow) != (self._wanted.serve, self._wanted.allow)
        former = () if is_other else self._paths
        self._wanted, self._paths = wanted, list(paths)
        self.left &= {*paths}
        registering = (self._register(path) for path in paths if path not in former)
        for failure in await asyncio.gather(*registering, return_exceptions=True):
            if isinstance(failure, Exception):
                logger.error("not served: %s", failure)

    async def stop(self) -> None:
        await ended(self._task)

    async def _register(self, path: Path) -> None:
        """Register one adapter under its folder's name; a bad one is logged and left out.

        A failure that may pass, such as a registry that does not answer, is tried again: a replica must not need it to
        start.
        """
        self.left.discard(path)
        try:
            allow = self._wanted.allow.get(path.name, ())
            await self._catalogue.register(path.name, str(path), Wanted(allow, managed_by="config"))
        except Invalid as error:
            logger.error("not served: %s", error.message)
        except Refused as refused:
            logger.warning("%s is not registered yet: %s", path.name, refused.message)
            self.left.add(path)

    async def _reconcile(self) -> None:
        """Register again those that failed, and those whose override has run out."""
        while True:
            await asyncio.sleep(AGAIN_S)
            for path in self._paths:
                try:
                    ended = await self._catalogue.hold_ended(path.name)
                except Refused as refused:  # may pass: it is tried again in a moment
                    logger.warning("%s is not yet as configured again: %s", path.name, refused.message)
                    continue
                if ended:
                    logger.info("%s is no longer held and is as configured again", path.name)
                if ended or path in self.left:
                    await self._register(path)


def roots_of(adapters: Adapters) -> list[Path]:
    """Return the folders from which adapters may be registered."""
    return [Path(root).expanduser() for root in (*adapters.roots, *([adapters.serve] if adapters.serve else []))]


def missing_roots(adapters: Adapters) -> Iterator[str]:
    """Yield a line for each configured root that is not there. It may be made later."""
    for root in adapters.roots:
        if not Path(root).expanduser().is_dir():
            yield f"adapters.roots: there is no folder {root}; no adapter can be registered from it until there is one"


def adapters_in(serve: str | None) -> list[Path]:
    """Return the adapters of a served folder. Raises Misused if it does not exist."""
    if serve is None:
        return []
    folder = Path(serve).expanduser()
    if not folder.is_dir():
        raise Misused(Reason.CONFIG_INVALID, f"adapters.serve: {folder} is not a folder")
    return [path for path in sorted(folder.iterdir()) if (path / "adapter_config.json").is_file()]
