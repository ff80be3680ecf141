"""Index live requests by their clients' own ids, so that `stop=true` finds the request it means.

A client is a connection and a tenant. Ids may repeat: a stop means the newest request with the id on its own stream, or
else the newest on the connection, as in the engine's own map of ids.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Any

from sidecar.access.access import unknown
from sidecar.backends import wire
from sidecar.backends.api import Ticket
from sidecar.core.causes import Said
from sidecar.core.effects import Settle
from sidecar.errors import Reason, SidecarError
from sidecar.fronts.kserve.request import KServeRequest
from sidecar.telling.endings import Voice, message_of


@dataclass(eq=False)
class Live:
    """One request that is queued or running. `stream` is the call that brought it, compared by identity."""

    asked: KServeRequest
    ticket: Ticket
    peer: str
    stream: object
    stopped: bool = False
    """Its client has stopped it: it ends without an error, as the engine's stopped requests do."""


class NotAccepted(Exception):
    """A request was refused; `client_id` is its own id, "" if that is unknown or malformed."""

    def __init__(self, error: SidecarError, request_id: str, client_id: str) -> None:
        super().__init__(error.message)
        self.error = error
        self.request_id = request_id
        self.client_id = client_id


class LiveRequests:
    """Live requests by connection, tenant and client's id. Requests without an id cannot be stopped."""

    def __init__(self) -> None:
        self._by_id: dict[tuple[str, str, str], list[Live]] = {}

    def __len__(self) -> int:
        return sum(len(live) for live in self._by_id.values())

    def add(self, live: Live) -> None:
        if live.asked.client_id:
            self._by_id.setdefault(_key(live.asked, live.peer), []).append(live)

    def remove(self, live: Live) -> None:
        same_id = self._by_id.get(_key(live.asked, live.peer), [])
        if live in same_id:
            same_id.remove(live)
        if not same_id:
            self._by_id.pop(_key(live.asked, live.peer), None)

    def find(self, asked: KServeRequest, peer: str, stream: object) -> Live | None:
        """Return the request that a stop means; None if there is none, since it may have ended meanwhile."""
        same_id = [live for live in self._by_id.get(_key(asked, peer), []) if not live.stopped]
        of_stream = [live for live in same_id if live.stream is stream]
        candidates = of_stream or same_id
        return candidates[-1] if candidates else None


def _key(asked: KServeRequest, peer: str) -> tuple[str, str, str]:
    return peer, asked.facts.tenant, asked.client_id


def stop_answer(asked: KServeRequest) -> Any:
    """Return the answer to a stop itself: only the id, whether or not there was a request to stop."""
    return wire.ModelInferResponse(model_name=asked.model, model_version=asked.version, id=asked.client_id)


def stopped_answer(asked: KServeRequest) -> Any:
    """Return the last response of a stopped request, with no tokens in its tensors.

    An engine answers a stopped request that does not stream with the tokens so far. Here that answer is empty.
    """
    response = stop_answer(asked)
    for name, datatype, shape, data in TEXT_ENDING if asked.is_text else TOKENS_ENDING:
        if not asked.payload.outputs or name in asked.payload.outputs:
            response.outputs.add(name=name, datatype=datatype, shape=shape)
            response.raw_output_contents.append(data)
    return response


def for_client(live: Live, ending: Settle, voice: Voice) -> Settle:
    """Return an ending in its client's words: its ids and regions stand where the engine's message has ours."""
    asked, message, dispatch = live.asked, message_of(ending, voice), live.ticket.dispatch
    if asked.task and ending.reason is Reason.UNKNOWN_ADAPTER:
        error = unknown(asked.task, asked.request_id)
        return replace(ending, cause=Said(error.message), name=asked.task)
    for ours, theirs in asked.hidden_regions.items():
        message = message.replace(f"'{ours}'", f"'{theirs}'")
    if dispatch is not None:
        ours = wire.engine_id(dispatch.request, dispatch.attempt)
        message = message.replace(f"[request id: {ours}]", f"[request id: {asked.client_id or '<id_unknown>'}]")
    return replace(ending, cause=Said(message))


TEXT_ENDING = (("text_output", "BYTES", (1,), struct.pack("<I", 0)),)
TOKENS_ENDING = (
    ("output_ids", "INT32", (1, 1, 0), b""),
    ("sequence_length", "INT32", (1, 1), struct.pack("<i", 0)),
)
