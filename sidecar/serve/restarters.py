"""Restart one engine: by the command that its entry declares, or by deleting its pod."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import IO

from sidecar.config.backends import Backend as Entry
from sidecar.config.restart import Restart
from sidecar.errors import Misused
from sidecar.kubernetes.access import Access, find_access
from sidecar.kubernetes.api import Api, Collection
from sidecar.kubernetes.failures import FORBIDDEN, NOT_FOUND, ApiError

SAID_BYTES_MAX = 300
"""The end of a failed command's output that is logged."""

Restarter = Callable[[], Awaitable[str]]
"""Restarts an engine, and returns "" or why that failed."""


def restarter_of(entry: Entry, restart: Restart, pod: str, namespace: str | None) -> Restarter:
    """Return the restarter of one engine. `pod` is its name if it is one that was found in `namespace`."""
    if restart.delete_pod:
        return lambda: delete_pod(find_access, namespace, pod)
    about = {
        "ENGINE_ID": entry.identity,
        "ENGINE_URL": entry.url,
        "ENGINE_ADDRESS": entry.address,
    }
    return lambda: run_command(restart, about)


async def run_command(restart: Restart, about: Mapping[str, str]) -> str:
    """Run a command to its end. `about` is added to its environment.

    Its output goes to a file: by a pipe, an engine that it starts and that keeps its output open would hold up the end.
    """
    with tempfile.TemporaryFile() as said:
        try:
            process = await asyncio.create_subprocess_exec(
                *restart.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env={**os.environ, **about},
                start_new_session=True,  # all of it can be killed, and signals to the sidecar do not reach it
            )
        except OSError as error:
            return f"{restart.command[0]} cannot be run ({error.strerror}); see restart.command"
        try:
            async with asyncio.timeout(restart.timeout_s):
                code = await process.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
            return (
                f"{restart.command[0]} did not end within {restart.timeout_s:g} s and was killed{_end_of(said)}; "
                "raise restart.timeout_s if it needs longer"
            )
        return "" if code == 0 else f"{restart.command[0]} ended with {code}{_end_of(said)}"


def _end_of(said: IO[bytes]) -> str:
    size = said.seek(0, os.SEEK_END)
    said.seek(max(0, size - SAID_BYTES_MAX))
    text = " ".join(said.read().decode(errors="replace").split())
    return f" ({text})" if text else ""


async def delete_pod(find: Callable[[], Access], namespace: str | None, pod: str) -> str:
    """Delete a pod; one that is gone already is as good. Its workload makes another one."""
    try:
        access = find()
        api = Api(access)
        try:
            await api.delete(Collection("", "v1", "pods", namespace or access.namespace), pod)
        finally:
            await api.close()
    except Misused as error:
        return error.message
    except ApiError as error:
        if error.code == NOT_FOUND:
            return ""
        role = "; a Role must allow it to delete pods there (the chart makes one)" if error.code == FORBIDDEN else ""
        return f"{error.message}{role}"
    return ""
