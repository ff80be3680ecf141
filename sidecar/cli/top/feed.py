"""Watch a page of the pool in a thread, again whenever another page is asked for or the sidecar was away."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import grpc

from sidecar.cli.client import Client, call_failed
from sidecar.cli.exits import CommandError

RETRY_S = 1.0
LASTING = (
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INVALID_ARGUMENT,
)
"""Errors that asking again doesn't end."""


class Feed:
    """Gives `shown` what was asked for last and each view of it, and `failed` an error and whether it will last.

    Both are called in the feed's thread.
    """

    def __init__(self, client: Client, shown: Callable[[Any, Any], None], failed: Callable[[CommandError, bool], None]):
        self._client = client
        self._shown, self._failed = shown, failed
        self._asked = 0
        self._call: Any = None
        self._changed = threading.Condition()

    def ask(self, request: Any) -> None:
        """Show what this request asks for, and nothing else from now on."""
        with self._changed:
            self._end_call()
            threading.Thread(target=self._watch, args=(request, self._asked), daemon=True).start()

    def stop(self) -> None:
        with self._changed:
            self._end_call()

    def _end_call(self) -> None:
        self._asked += 1
        if self._call is not None:
            self._call.cancel()
        self._changed.notify_all()

    def _watch(self, request: Any, asked: int) -> None:
        while True:
            try:
                with self._changed:
                    if asked != self._asked:
                        return
                    call = self._call = self._client.ask(self._client.pool.Watch, request, timeout_s=None)
                for view in call:
                    if asked != self._asked:
                        return
                    self._shown(request, view)
            except CommandError as error:  # the credential can't be read, or must not be sent
                self._failed(error, True)
                return
            except grpc.RpcError as error:
                if asked != self._asked:
                    return
                lasts = error.code() in LASTING
                self._failed(call_failed(error, self._client.endpoint), lasts)
                if lasts:
                    return
            with self._changed:
                self._changed.wait_for(lambda: asked != self._asked, RETRY_S)
