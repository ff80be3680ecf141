"""Have the proxy of the replica that received a request carry it, while the owner of its backend decides and follows.

Only the decision crosses, and of the answer what comes to the receiving replica anyway.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from http import HTTPStatus
from typing import Any

from sidecar.backends.api import Carrier
from sidecar.backends.http_client import (
    Answer,
    Ending,
    NotReached,
    Request,
    Sighting,
    Unseen,
    WireError,
    chunks_of,
    joined,
)
from sidecar.backends.unseen import Sightings
from sidecar.proto import peers_pb2

logger = logging.getLogger(__name__)

ENDINGS = frozenset(ending.value for ending in Ending)
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

    @property
    def goes_on(self) -> bool:
        """True if the rest of an answer goes past us."""
        return self._unseen.goes_on

    def hear(self, carried: Any) -> None:
        """Take what the other replica says. What only a newer one says is passed over."""
        which = carried.WhichOneof("brought")
        if which == "sighting":
            self._unseen.take(sighting_of(carried.sighting))
        elif which is not None:
            self._brought.put_nowait(carried)

    def lose(self) -> None:
        """Give up an answer that goes past us: the replica whose proxy's log tells its end is gone.

        Its seat counts as free, as after the end of our own process. To wait until the engine has fewer requests than
        it was given may keep an adapter from being asked for half a minute.
        """
        self._unseen.take(Sighting(0, Ending.LOST))

    async def redirect(self, body: bytes) -> bool:
        return False

    async def carry(self, request: Request) -> Answer | None:
        if self._has_carried:
            return None  # a proxy sends a request once, and the rest of that answer may still come
        headers = [peers_pb2.ForwardedMetadata(key=key, value=value) for key, value in request.headers.items()]
        self._send(peers_pb2.Carriage(url=request.url, headers=headers, body=b"".join(request.body)))
        first = await self._brought.get()
        which = first.WhichOneof("brought")
        if which == "declined":
            return None
        self._has_carried = True
        if which == "failed":
            raise NotReached(first.failed)
        told = joined((each.key, each.value) for each in first.head.headers)
        if first.head.is_unread:
            return Answer(first.head.status, told, chunks_of(), is_unread=True)
        return Answer(first.head.status, told, self._chunks(), unseen=self._unseen, trailers=self._trailers)

    async def _chunks(self) -> AsyncIterator[bytes]:
        while (carried := await self._brought.get()).WhichOneof("brought") == "chunk":
            yield carried.chunk
        if carried.WhichOneof("brought") == "failed":
            raise WireError(carried.failed)
        self._unseen.goes_on = carried.end.goes_on
        self._trailers |= {each.key: each.value for each in carried.end.trailers}


class _RemoteUnseen(Sightings):
    """An answer that goes past both replicas; the other one tells what it sees."""

    is_lost = tells = False  # as far as is known

    def close(self) -> None:
        """Do nothing: it ends with its request."""


async def carry(
    carrier: Carrier | None, carriage: Any, number: int, tell: Tell, came: Callable[[int], None]
) -> Unseen | None:
    """Have a carrier carry what the owner decided, and tell the owner what comes of it, also if that fails.

    Calls `came(size_bytes)` for each part of an answer that the client sees. Returns the rest of such an answer if it
    goes past us: then the owner waits for sightings. None if all of it was seen.
    """
    if carrier is None:
        tell(peers_pb2.Carried(number=number, declined=True))
        return None
    try:
        return await _carry(carrier, carriage, number, tell, came)
    except WireError as error:
        tell(peers_pb2.Carried(number=number, failed=str(error)))
    except Exception as error:
        logger.exception("an answer that a proxy brings for another replica cannot be read")
        why = f"the replica that was asked failed: {str(error) or type(error).__name__}"
        tell(peers_pb2.Carried(number=number, failed=why))
    return None


async def _carry(
    carrier: Carrier, carriage: Any, number: int, tell: Tell, came: Callable[[int], None]
) -> Unseen | None:
    headers = [(each.key, each.value) for each in carriage.headers]
    answer = await carrier.carry(Request.to_url(carriage.url, joined(headers), carriage.body))
    if answer is None:
        tell(peers_pb2.Carried(number=number, declined=True))
        return None
    head = peers_pb2.CarriedHead(status=answer.status, is_unread=answer.is_unread)
    for key, value in answer.headers.items():
        head.headers.add(key=key, value=value)
    tell(peers_pb2.Carried(number=number, head=head))
    if answer.is_unread:
        return None
    async for chunk in answer.chunks:
        if answer.status == HTTPStatus.OK:
            came(len(chunk))
        tell(peers_pb2.Carried(number=number, chunk=chunk))
    unseen = answer.unseen
    goes_on = unseen is not None and unseen.goes_on
    end = peers_pb2.CarriedEnd(goes_on=goes_on)
    for key, value in answer.trailers.items():
        end.trailers.add(key=key, value=value)
    tell(peers_pb2.Carried(number=number, end=end))
    return unseen if goes_on else None


def sighting_sent(sighting: Sighting, exchange: str = "") -> Any:
    ending = "" if sighting.ending is None else sighting.ending.value
    return peers_pb2.Sighting(exchange=exchange, body_bytes=sighting.body_bytes, ending=ending, cause=sighting.cause)


def sighting_of(sent: Any) -> Sighting:
    """Return a sighting as another replica tells it. An ending that only a newer one knows is LOST."""
    ending = None
    if sent.ending:
        ending = Ending(sent.ending) if sent.ending in ENDINGS else Ending.LOST
    return Sighting(sent.body_bytes, ending, sent.cause)
