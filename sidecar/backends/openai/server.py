"""Questions that every OpenAI server answers: its health, its models, and completions of our own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from sidecar.backends.http_client import HttpClient, Reply, WireError
from sidecar.backends.openai.events import message_of
from sidecar.backends.openai.paths import COMPLETIONS, POOLING, ROWS
from sidecar.errors import Misused, Reason

PROBE_TIMEOUT_S = 5.0
"""Time for an answer to a question about the server; trtllm-serve's /metrics takes two seconds while it is idle."""


@dataclass(frozen=True)
class Served:
    """The base model's name on the server, its longest sequence, and the adapters' names with their folders.

    `adapters` is None if the server does not list them. `names` are all names of the base model, and where it was read
    from.
    """

    base: str
    sequence_tokens_max: int | None = None
    adapters: dict[str, str] | None = None
    names: tuple[str, ...] = ()


class OpenAiServer:
    """One server. Every question raises WireError if it is not answered."""

    def __init__(self, backend: str, client: HttpClient) -> None:
        self.backend = backend
        self.client = client
        self._pools = False

    def unusable(self, text: str, fix: str = "") -> Misused:
        """Return the error of an engine that cannot be used, and what to change where that is not its address."""
        return Misused(Reason.BACKEND_UNREACHABLE, f"{self.backend}: {text}", fix=fix)

    async def get(self, path: str, timeout_s: float = PROBE_TIMEOUT_S) -> Reply:
        return await self.client.get(path, timeout_s)

    async def record(self, path: str, timeout_s: float = PROBE_TIMEOUT_S) -> Any:
        """Return the JSON at a path; None if there is none."""
        reply = await self.get(path, timeout_s)
        try:
            return reply.json() if reply.is_ok else None
        except ValueError:
            return None

    async def healthy(self, path: str = "/health") -> None:
        """Raise Misused if the server reports that its engine is gone."""
        reply = await self.get(path)
        if not reply.is_ok:
            raise self.unusable(f"{path} answers {reply.status}")

    async def models(self) -> Served:
        """Return what is served: an adapter is a model with a parent. Raises Misused if the answer is another one."""
        reply = await self.get("/v1/models")
        try:
            entries = reply.json()["data"]
            bases = [entry for entry in entries if not entry.get("parent")]
            adapters = {entry["id"]: str(entry.get("root") or "") for entry in entries if entry.get("parent")}
            names = (*(str(each["id"]) for each in bases), *(str(each["root"]) for each in bases if each.get("root")))
            return Served(bases[0]["id"], bases[0].get("max_model_len"), adapters, tuple(dict.fromkeys(names)))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise self.unusable(f"/v1/models answers {reply.status}: {reply.text[:200]}") from error

    async def paths(self) -> tuple[str, ...] | None:
        """Return the paths that the server has; None if a proxy in between does not let that be asked.

        It answers a GET with 405 where it has one. From now on it is tried by a path that it has.
        """
        try:
            statuses = {row.path: (await self.get(row.at_engine)).status for row in ROWS.values()}
        except WireError:
            return None
        found = {path for path, status in statuses.items() if status == HTTPStatus.METHOD_NOT_ALLOWED}
        self._pools = POOLING in found and COMPLETIONS not in found
        return tuple(sorted(found)) if found & {COMPLETIONS, POOLING} else None

    async def try_out(self, body: Mapping[str, Any], timeout_s: float, epoch: int = 0) -> Reply:
        """Send the request for a completion; a server that pools gets its prompt."""
        path = COMPLETIONS
        if self._pools:
            path, body = ROWS[POOLING].at_engine, {"model": body["model"], "input": body["prompt"]}
        return await self.client.post(path, body, timeout_s, epoch_header(epoch))

    async def ask(self, body: Mapping[str, Any], timeout_s: float, epoch: int = 0) -> tuple[int, str]:
        """Return the status, and the answer's token ids, or its text, or what a pooler makes of it, or the error's."""
        reply = await self.try_out(body, timeout_s, epoch)
        if not reply.is_ok:
            return reply.status, message_of(reply.body)
        try:
            record = reply.json()
            if self._pools:
                return HTTPStatus.OK, str(record["data"][0]["data"])
            choices = record["choices"]
            return HTTPStatus.OK, str(choices[0].get("token_ids") or choices[0].get("text"))
        except (ValueError, KeyError, TypeError, IndexError):
            return HTTPStatus.OK, ""


def epoch_header(epoch: int) -> dict[str, str]:
    """Return a header for an engine's log with the epoch of the replica that sends; empty if there is only one."""
    return {"x-lora-epoch": str(epoch)} if epoch else {}
