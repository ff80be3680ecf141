"""What any OpenAI server can be asked about itself, apart from completions."""

from __future__ import annotations

from sidecar.backends.http_client import HttpClient
from sidecar.errors import Misused, Reason

PROBE_TIMEOUT_S = 5.0
"""Time for an answer to a question about the server; trtllm-serve's /metrics takes two seconds while it is idle."""


class OpenAiServer:
    """One server. Every question raises WireError if it is not answered."""

    def __init__(self, backend: str, client: HttpClient) -> None:
        self._backend = backend
        self._client = client

    async def healthy(self) -> None:
        """Raise Misused if the server reports that its engine is gone."""
        reply = await self._client.get("/health", PROBE_TIMEOUT_S)
        if not reply.is_ok:
            raise Misused(Reason.BACKEND_UNREACHABLE, f"{self._backend}: /health answers {reply.status}")
