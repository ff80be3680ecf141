"""Send packed weights to one Triton server: by naming their shared-memory region, or in a gRPC message."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Literal

import grpc

from sidecar.adapters.shared_memory import SharedMemory
from sidecar.backends.api import Weights
from sidecar.backends.triton.sharing import RegionRefused, SharedBlobs
from sidecar.core.facts import MESSAGE_BYTES_MAX, EngineFacts
from sidecar.errors import Misused, Reason

logger = logging.getLogger(__name__)

Wanted = Literal["auto", "grpc", "shared_memory"]
REMEDY = (
    "run the engine and the sidecar on one machine with one /dev/shm (docker: --ipc, Kubernetes: a shared emptyDir of "
    "medium Memory), or set weights_transport: grpc"
)


class Transport:
    """The way to one server, chosen anew whenever it is reached. `summary` tells people what was chosen and why."""

    def __init__(self, backend: str, wanted: Wanted, memory: SharedMemory, stub: object) -> None:
        self.summary = ""
        self._backend = backend
        self._wanted = wanted
        self._why_not = memory.why_not
        mount = None if wanted == "grpc" else memory.mount
        self._shared = None if mount is None else SharedBlobs(backend, stub, mount)
        self._by_reference = False

    @property
    def by_reference(self) -> bool:
        """True if weights are named instead of sent."""
        return self._by_reference

    def described(self, facts: EngineFacts) -> EngineFacts:
        """Return an engine's facts with how its weights are sent."""
        limit = None if self._by_reference else MESSAGE_BYTES_MAX
        return replace(facts, by_reference=self._by_reference, message_bytes_max=limit)

    async def choose(self) -> None:
        """Find out what the server, which was just reached, can do.

        Raises Misused if shared memory is required and impossible, grpc.RpcError if the server does not answer.
        """
        if self._wanted == "grpc":
            self._choose(False, "weights by gRPC, as configured")
            return
        try:
            await self._probe()
        except RegionRefused as refused:
            self._refused(str(refused))
        else:
            self._choose(True, "weights by shared memory")

    async def _probe(self) -> None:
        if self._shared is None:
            raise RegionRefused(self._why_not)
        await self._shared.probe()
        await self._shared.settle()  # after the probe: regions of another mount are not ours to remove

    def _refused(self, why: str) -> None:
        if self._wanted == "shared_memory":
            raise Misused(
                Reason.BACKEND_UNREACHABLE, f"{self._backend}: no shared memory with the engine: {why}; {REMEDY}"
            )
        self._choose(False, f"weights by gRPC: {why}")

    def _choose(self, by_reference: bool, summary: str) -> None:
        self._by_reference = by_reference
        if summary != self.summary:
            self.summary = summary
            logger.info("%s: %s", self._backend, summary)

    async def refer(self, weights: Weights) -> str | None:
        """Return the region that holds weights; None if they must be sent.

        Raises Misused if the server refuses the region and shared memory is required.
        """
        if not self._by_reference or self._shared is None or not self._shared.has(weights.path):
            return None
        try:
            return await self._shared.refer(weights.path, weights.size_bytes)
        except RegionRefused as refused:
            self._refused(str(refused))
        except grpc.RpcError as error:
            logger.warning("%s did not answer a registration: %s", self._backend, error)
        return None

    def doubt(self) -> None:
        """Register every region again before its next use: the server has reported one as unknown."""
        if self._shared is not None:
            self._shared.doubt()

    async def forget(self, region: str) -> None:
        """Return once the server no longer refers to a region. Raises grpc.RpcError if it does not answer."""
        if self._shared is not None:
            await self._shared.forget(region)

    def lost(self, region: str) -> None:
        """Forget a region of a server that is gone; what it had is removed when it is back."""
        if self._shared is not None:
            self._shared.lost(region)

    async def close(self) -> None:
        """Unregister all regions. Raises grpc.RpcError if the server does not answer."""
        if self._shared is not None:
            await self._shared.close()
