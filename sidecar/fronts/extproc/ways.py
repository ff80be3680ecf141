"""The ways by which Envoy brings requests to the sidecar's own listeners, in path."""

from __future__ import annotations

import logging

from sidecar.backends.http_client import NotReached
from sidecar.fronts.extproc import heads
from sidecar.proto import envoy_pb2 as envoy

logger = logging.getLogger(__name__)


class Way:
    """The HOST:PORT at which Envoy reaches one listener, by `setting`; None if it cannot. Troubles are logged once."""

    def __init__(self, address: str | None, setting: str, listener: str) -> None:
        self.address = address
        self._setting, self._listener = setting, listener
        self._told: set[str] = set()

    async def resolved(self) -> str | None:
        """Return the address with an IP address as its host; None if there is no way, or its name is not known."""
        if self.address is None:
            return None
        try:
            return await heads.resolved(self.address)
        except NotReached as error:
            self._warn_once(
                "unknown", f"the sidecar cannot resolve {self._setting}, so requests are not sent there: {error}"
            )
            return None

    def judge(self, answer: envoy.ProcessingRequest) -> None:
        """Take the head of an answer from this way: Envoy's own says that the listener was not reached."""
        if heads.is_unreached(answer):
            self._warn_once(
                "unreached",
                f"Envoy does not reach the {self._listener} listener at {self.address} ({self._setting}): "
                f"{heads.details_of(answer)}",
            )

    def _warn_once(self, trouble: str, text: str) -> None:
        if trouble not in self._told:
            self._told.add(trouble)
            logger.warning("%s", text)
