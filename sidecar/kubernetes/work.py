"""The work on one declared name: one step at a time, tried again after a while when it fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Hashable
from time import monotonic
from typing import Any

from sidecar.errors import Reason, Refused, SidecarError
from sidecar.kubernetes.pauses import Pauses
from sidecar.kubernetes.standings import Attempt

logger = logging.getLogger(__name__)

FIRST_RETRY_S, LAST_RETRY_S = 1.0, 300.0


class Work:
    """What is done about a name. `changed` is called when a step has ended."""

    def __init__(self, name: str, changed: Callable[[], None]) -> None:
        self._name = name
        self._changed = changed
        self._pauses = Pauses(FIRST_RETRY_S, LAST_RETRY_S)
        self._task: asyncio.Task[None] | None = None
        self._about: Hashable = None
        self._error: SidecarError | None = None
        self.due_s = 0.0
        """When (monotonic seconds) it may be tried again."""

    @property
    def attempt(self) -> Attempt:
        return Attempt(self.is_running, self._error)

    @property
    def is_running(self) -> bool:
        return self._task is not None and not self._task.done()

    @property
    def is_unknown_to_others(self) -> bool:
        """Whether the last step may have been written down without every replica knowing of it."""
        return self._error is not None and self._error.reason is Reason.STATE_UNAVAILABLE

    def about(self, wish: Hashable) -> None:
        """Say what is wished for now: when that is another than before, a step towards that one is given up."""
        if wish == self._about:
            return
        self._about = wish
        self._error, self.due_s = None, 0.0
        self._pauses.end()
        if self._task is not None:
            self._task.cancel()

    def begin(self, step: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Take a step, unless one is being taken or the last one failed a moment ago."""
        if not self.is_running and monotonic() >= self.due_s:
            self._task = asyncio.create_task(self._take(step))

    def rest(self) -> None:
        """There is nothing to do."""
        self._error = None

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _take(self, step: Callable[[], Coroutine[Any, Any, object]]) -> None:
        try:
            await step()
        except SidecarError as error:
            self._failed(error)
        except Exception as error:
            logger.error("the work on %s broke", self._name, exc_info=error)
            self._failed(Refused(Reason.ADAPTER_UNAVAILABLE, f"{self._name}: {error!r}; the log has more"))
        else:
            self._error, self.due_s = None, 0.0
            self._pauses.end()
        finally:
            asyncio.get_running_loop().call_soon(self._changed)

    def _failed(self, error: SidecarError) -> None:
        self._error = error
        self.due_s = monotonic() + self._pauses.next_s(error.retry_after_s or 0.0)
