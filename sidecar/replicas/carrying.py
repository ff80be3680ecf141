"""Have the proxy of the replica that received a request carry it, while the owner of its backend decides and follows.

Only the decision crosses, and of the answer what comes to the receiving replica anyway.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import httpx

from sidecar.backends.api import TRAILERS, UNREAD, UNSEEN, Carrier, Chunks, Ending, Sighting, Unseen
from sidecar.backends.unseen import Sightings
from sidecar.proto import peers_pb2

Tell = Callable[[Any], None]


class RemoteCarrier:
    """The owner's end. `send` sends a carriage to the replica that received the request."""

    estimates = True  # the receiving replica has decided that it may be carried
    head: Callable[[], Iterable[tuple[bytes, bytes]]] = tuple

    def __init__(self, send: Tell, answer_id: str) -> None:
        self._send = send
        self.answer_id = answer_id
        self._trailers: dict[str, str] = {}
        self._brought: asyncio.Queue[Any] = asyncio.Queue()
        self._unseen = _RemoteUnseen()
        self._has_carried = False

    def hear(self, carried: Any) -> None:
        """Take what the other replica says."""
        if carried.WhichOneof("brought") == "sighting":
            self._unseen.take(sighting_of(carried.sighting))
        else:
            self._brought.put_nowait(carried)

    def lose(self) -> None:
        """Give up an answer that goes past us: the replica whose proxy's log tells its end is gone.

        Its seat counts as free, as after the end of our own process. To wait until the engine has fewer requests than
        it was given may keep an adapter from being asked for half a minute.
        """
        self._unseen.take(Sighting(0, Ending.LOST))

    async def redirect(self, body: bytes) -> bool:
        return False

    async def carry(self, request: httpx.Request) -> httpx.Response | None:
        if self._has_carried:
            return None  # a proxy sends a request once, and the rest of that answer may still come
        content = await request.aread()
        headers = [peers_pb2.ForwardedMetadata(key=key, value=value) for key, value in request.headers.items()]
        self._send(peers_pb2.Carriage(url=str(request.url), headers=headers, body=content))
        first = await self._brought.get()
        which = first.WhichOneof("brought")
        if which == "declined":
            return None
        self._has_carried = True
        if which == "failed":
            raise httpx.ConnectError(first.failed, request=request)
        fields = [(each.key, each.value) for each in first.head.headers]
        extensions: dict[str, Any] = {UNREAD: True} if first.head.is_unread else {UNSEEN: self._unseen}
        if not first.head.is_unread:
            extensions[TRAILERS] = self._trailers
        return httpx.Response(first.head.status, headers=fields, stream=Chunks(self._chunks()), extensions=extensions)

    async def _chunks(self) -> AsyncIterator[bytes]:
        while (carried := await self._brought.get()).WhichOneof("brought") == "chunk":
            yield carried.chunk
        self._unseen.goes_on = carried.end.goes_on
        self._trailers |= {each.key: each.value for each in carried.end.trailers}


class _RemoteUnseen(Sightings):
    """An answer that goes past both replicas; the other one tells what it sees."""

    is_lost = tells = False  # as far as is known

    def close(self) -> None:
        """Do nothing: it ends with its request."""


async def carry(
    carrier: Carrier, carriage: Any, number: int, tell: Tell, begun: Callable[[bool], None]
) -> Sighting | None:
    """Have a carrier carry what the owner decided, and tell the owner what comes of it.

    Calls `begun(goes_on)` when an answer has begun that the client sees, and when the rest goes past us. Returns how
    such an answer ended, None if it was seen whole.
    """
    try:
        headers = [(each.key, each.value) for each in carriage.headers]
        answer = await carrier.carry(httpx.Request("POST", carriage.url, headers=headers, content=carriage.body))
        if answer is None:
            tell(peers_pb2.Carried(number=number, declined=True))
            return None
        is_unread = UNREAD in answer.extensions
        head = peers_pb2.CarriedHead(status=answer.status_code, is_unread=is_unread)
        for key, value in answer.headers.items():
            head.headers.add(key=key, value=value)
        tell(peers_pb2.Carried(number=number, head=head))
        if is_unread:
            return None
        async for chunk in answer.aiter_raw():
            if answer.status_code == httpx.codes.OK:
                begun(False)
            tell(peers_pb2.Carried(number=number, chunk=chunk))
    except httpx.HTTPError as error:
        tell(peers_pb2.Carried(number=number, failed=str(error)))
        return None
    unseen: Unseen | None = answer.extensions.get(UNSEEN)
    goes_on = unseen is not None and unseen.goes_on
    end = peers_pb2.CarriedEnd(goes_on=goes_on)
    for key, value in (answer.extensions.get(TRAILERS) or {}).items():
        end.trailers.add(key=key, value=value)
    tell(peers_pb2.Carried(number=number, end=end))
    if unseen is None or not goes_on:
        return None
    begun(True)
    try:
        while (sighting := await unseen.next()).ending is None:
            tell(peers_pb2.Carried(number=number, sighting=sighting_sent(sighting)))
    finally:
        unseen.close()
    tell(peers_pb2.Carried(number=number, sighting=sighting_sent(sighting)))
    return sighting


def sighting_sent(sighting: Sighting, exchange: str = "") -> Any:
    ending = "" if sighting.ending is None else sighting.ending.value
    return peers_pb2.Sighting(exchange=exchange, body_bytes=sighting.body_bytes, ending=ending, cause=sighting.cause)


def sighting_of(sent: Any) -> Sighting:
    return Sighting(sent.body_bytes, Ending(sent.ending) if sent.ending else None, sent.cause)
