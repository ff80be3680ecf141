"""Times by name in Redis, of which the latest of several replicas stays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic

from sidecar.state.codec import R
from sidecar.state.redis.link import FAULTS, Link


class RedisTimes(Generic[R]):
    """A sorted set of names with times in Unix seconds. Raises Refused(STATE_UNAVAILABLE)."""

    def __init__(self, link: Link[R], name: str) -> None:
        self._link = link
        self._name = name

    async def write(self, times: Mapping[str, float]) -> None:
        """Store times; a stored one that is later stays."""
        try:
            await self._link.raise_times(self._name, times)
        except FAULTS as error:
            raise self._link.refused(error) from error

    async def read(self) -> dict[str, float]:
        try:
            return await self._link.times(self._name)
        except FAULTS as error:
            raise self._link.refused(error) from error
