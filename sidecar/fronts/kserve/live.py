"""Live requests by their clients' own ids, so that `stop=true` finds the one it means.

A client is a connection and a tenant. Its ids may collide, with others' and among themselves: a stop means the newest
request with the id on its own stream, else the newest on the connection, as the engine's own map of ids would have it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from sidecar.backends.api import Ticket
from sidecar.backends.triton import wire
from sidecar.core.effects import Settle
from sidecar.fronts.kserve.request import KServeRequest


@dataclass(eq=False)
class Live:
    """One request that is queued or running. `stream` is what it came by, to be compared by identity."""

    asked: KServeRequest
    ticket: Ticket
    peer: str
    stream: object
    stopped: bool = False
    """Its client has asked for its end: it ends as the engine's stopped requests do, without an error."""


class LiveRequests:
    """What is live, by connection, tenant and client's id. Requests without an id cannot be stopped."""

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
        """Return the request that a stop means, None when there is none: it may have ended by itself."""
        same_id = [live for live in self._by_id.get(_key(asked, peer), []) if not live.stopped]
        of_stream = [live for live in same_id if live.stream is stream]
        candidates = of_stream or same_id
        return candidates[-1] if candidates else None


def _key(asked: KServeRequest, peer: str) -> tuple[str, str, str]:
    return peer, asked.facts.tenant, asked.client_id


def stop_answer(asked: KServeRequest) -> Any:
    """Return the answer to a stop itself: the id and nothing else, whether or not there was something to stop."""
    return wire.ModelInferResponse(model_name=asked.model, model_version=asked.version, id=asked.client_id)


def stopped_answer(asked: KServeRequest) -> Any:
    """Return the last response of a request that was stopped: no more tokens, in the tensors that carry them.

    The engine's answer to a stopped request that does not stream has the tokens so far. Those stay with the engine:
    here the answer is empty.
    """
    response = stop_answer(asked)
    for name, datatype, shape, data in TEXT_ENDING if asked.is_text else TOKENS_ENDING:
        if not asked.outputs or name in asked.outputs:
            response.outputs.add(name=name, datatype=datatype, shape=shape)
            response.raw_output_contents.append(data)
    return response


def words_for_client(live: Live, ending: Settle) -> str:
    """Return an ending's message. An engine's words name the request by our id; its client knows it by its own."""
    dispatch = live.ticket.dispatch
    if dispatch is None:
        return ending.message
    ours = wire.engine_id(dispatch.request, dispatch.attempt)
    return ending.message.replace(f"[request id: {ours}]", f"[request id: {live.asked.client_id or '<id_unknown>'}]")


TEXT_ENDING = (("text_output", "BYTES", (1,), struct.pack("<I", 0)),)
TOKENS_ENDING = (
    ("output_ids", "INT32", (1, 1, 0), b""),
    ("sequence_length", "INT32", (1, 1), struct.pack("<i", 0)),
)
