"""Waiting for an answer to begin: say what it waits for, and give up after a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from threading import Event, Thread
from time import monotonic
from typing import Any

import grpc

from sidecar.cli.client import Client, connected
from sidecar.cli.exits import CommandError, say
from sidecar.cli.show import duration
from sidecar.proto import admin_pb2 as pb

SAID_AFTER_S = 2.0
"""An answer that has not begun by then is worth a line; so is each later change of the reason."""
ASKED_S_MAX = 2.0
LISTED_MAX = 1000


def until_begun(call: Any, what: str, limit_s: float | None, why: Callable[[], str], quiet: bool) -> Iterator[Any]:
    """Yield a call's messages. Until the first one, print on stderr what it waits for, unless `quiet`.

    Raises CommandError, with the reason, if none has come after `limit_s` (None: no limit); the call is cancelled then.
    """
    begun, given_up, reasons = Event(), Event(), [""]

    def watch() -> None:
        end_s = monotonic() + limit_s if limit_s is not None else float("inf")
        while not begun.wait(max(0.0, min(SAID_AFTER_S, end_s - monotonic()))):
            reason = why()
            if begun.is_set():
                return
            if reason != reasons[-1] and not quiet:
                say(f"waiting for {what}: {reason}", error=True)
            reasons.append(reason)
            if monotonic() >= end_s:
                given_up.set()
                call.cancel()
                return

    Thread(target=watch, daemon=True).start()
    try:
        for message in call:
            begun.set()
            yield message
    except grpc.RpcError:
        if not given_up.is_set():
            raise
        raise CommandError(
            f"{what}: no answer began within {duration(limit_s or 0)}: {reasons[-1]}; --timeout TIME waits longer"
        ) from None
    finally:
        begun.set()


def reason_of(client: Client, admin: str, request_id: str) -> str:
    """Return why a request has no answer yet, as the admin listener knows it, or why that does not say."""
    endpoint = replace(client.endpoint, address=admin, listener="admin", option="--admin")
    try:
        with connected(endpoint) as operator:
            request = pb.QueueRequest(limit=LISTED_MAX)
            view = operator.ask(operator.queues.Get, request, timeout_s=ASKED_S_MAX)
    except CommandError as error:
        return (
            f"the admin listener at {admin} does not say why ({error.reason or error.exit_code.name}); --admin names it"
        )
    for waiting in view.requests:
        if waiting.request_id == request_id:
            return _because(waiting)
    for run in view.runs:
        if run.request_id == request_id:
            return f"it runs on {run.backend}, which has sent nothing of it yet"
    return f"the sidecar at {admin} does not show it; --admin names the admin listener of the one that has it"


def _because(waiting: Any) -> str:
    from sidecar.core.eligibility import Why
    from sidecar.telling.waits import because

    backend, adapter = waiting.backend or "any backend", waiting.adapter or "the base model"
    return because(Why(waiting.why), backend, adapter)
