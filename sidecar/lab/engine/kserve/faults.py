"""Faults that an engine can be told to show, each as a real engine shows it."""

from __future__ import annotations

import os

from sidecar.lab.engine.cache import CLAIM_FAILED, NO_DONE_TASKS
from sidecar.lab.engine.kserve.adapters import digest_of
from sidecar.lab.engine.kserve.errors import FETCH_ERROR
from sidecar.lab.engine.kserve.options import Options
from sidecar.lab.engine.kserve.work import Work

ABORTED = 134
"""The exit status of a process that ended by abort()."""


class Faults:
    """Decides at each load and step whether the engine fails now."""

    def __init__(self, options: Options) -> None:
        self._crash_names = options.crash_on_load
        self._crash_digests = tuple(prefix.lower() for prefix in options.crash_on_weights)
        self._step_names = list(options.fail_step_on_load)
        self._full_left = options.full_errors
        self._claim_left = options.claim_errors
        self._freeze_after = options.freeze_after

    def at_put(self, work: Work) -> str | None:
        """Return the error with which storing the request's adapter fails, or None; the process may die here."""
        if not work.brings_weights:
            return None
        if self._crashes(work):
            os._exit(ABORTED)
        if self._full_left:
            self._full_left -= 1
            return _put_error(work, NO_DONE_TASKS)
        if self._claim_left:
            self._claim_left -= 1
            return _put_error(work, CLAIM_FAILED)
        return None

    def at_first_step(self, work: Work) -> str | None:
        """Return the error with which the step after this load fails as a whole, or None; once for each name."""
        named = [name for name in _names_of(work) if name in self._step_names]
        if not work.brings_weights or not named:
            return None
        self._step_names.remove(named[0])
        return f"can't move a processing task taskId={work.task_id}"

    def frozen(self, iterations: int) -> bool:
        """Return True if the executor has stopped for good after this many iterations."""
        return self._freeze_after is not None and iterations >= self._freeze_after

    def _crashes(self, work: Work) -> bool:
        if any(name in self._crash_names for name in _names_of(work)):
            return True
        lora = work.generation.lora
        if not self._crash_digests or lora is None:
            return False
        return digest_of(lora).startswith(self._crash_digests)


def _names_of(work: Work) -> tuple[str, str]:
    """Return what a fault option may call the adapter: the parameter `lora_name`, or the task id in decimal."""
    return str(work.parameters.get("lora_name", "")), str(work.task_id)


def _put_error(work: Work, text: str) -> str:
    return f"{FETCH_ERROR}Error storing task={work.task_id} in PEFT cache -- {text}"
