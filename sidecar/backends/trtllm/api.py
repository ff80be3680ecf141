"""Questions to trtllm-serve besides clients' requests, and the meaning of its answers and errors.

The server answers nearly every failure with status 400, so an error is classified by its text. The texts are those of
1.2.1 and of 1.3.0rc22 and later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from sidecar.backends.faults import Wrote, nobody_wrote
from sidecar.backends.http_client import Reply, WireError
from sidecar.backends.openai.run import epoch_header, message_of
from sidecar.backends.openai.server import PROBE_TIMEOUT_S, OpenAiServer
from sidecar.core.enums import Fault
from sidecar.errors import Misused, Reason

OWNER = "tensorrt_llm"

_TEXTS: tuple[tuple[tuple[str, ...], Fault], ...] = (
    (("Invalid low_rank",), Fault.DEADLY),
    (("not enabled for this model",), Fault.DEADLY),
    (("has to few values",), Fault.DEADLY),
    (("Expected layerId",), Fault.DEADLY),
    (("LoRA weights dtype",), Fault.DEADLY),
    (("more LoRA task ID than loRA slot size",), Fault.FULL),
    (("PEFT Cache is full",), Fault.LOST),
    (("no done tasks to evict",), Fault.LOST),
    (("copyTask ensure batch",), Fault.LOST),
    (("Event loop terminated",), Fault.LOST),
    (("Fatal error",), Fault.LOST),
    (("Hang detected",), Fault.LOST),
    (("LLM is unavailable",), Fault.LOST),
    (("lora_path", "does not exist"), Fault.MISS),
    (("Failed to load", "Errno 2"), Fault.MISS),
    (("not found in cache",), Fault.MISS),
)
"""Texts, by substring and in order: a failed step quotes its cause. What ends the engine comes first."""


def fault_of(status: int, text: str, wrote: Wrote = nobody_wrote) -> Fault:
    """Return the fault of an error; REJECTED if it is unknown, or quotes what the client wrote.

    A full cache ends the engine, so it is LOST. DEADLY means that the adapter has ended the engine.
    """
    for parts, fault in _TEXTS:
        if all(part in text for part in parts) and not any(wrote(part) for part in parts):
            return fault
    return Fault.LOST if status == HTTPStatus.SERVICE_UNAVAILABLE else Fault.REJECTED


@dataclass(frozen=True)
class Measures:
    """Values of the newest record of /metrics: steps so far, KV tokens in total and in use, requests held.

    None for a value that is not published, or not since the last question: /metrics is emptied by reading.
    """

    steps: int | None = None
    kv_tokens: int | None = None
    kv_used: int | None = None
    active: int | None = None


@dataclass(frozen=True)
class Lora:
    """An adapter as a request names it: the id by which the engine knows it for ever, and its folder there."""

    name: str
    task_id: int
    path: str

    @property
    def record(self) -> dict[str, Any]:
        return {"lora_name": self.name, "lora_int_id": self.task_id, "lora_path": self.path}


class TrtllmApi(OpenAiServer):
    """One server. Version 1.2.1 reports itself healthy even if its engine is gone."""

    async def version(self) -> str:
        """Return the server's version, "" if it does not say."""
        reply = await self._client.get("/version", PROBE_TIMEOUT_S)
        try:
            return str(reply.json()["version"])
        except (ValueError, KeyError, TypeError):
            return ""

    async def model(self) -> str:
        """Return the served model's name. Raises Misused if this is no trtllm-serve, or a disaggregated one's front."""
        reply = await self._client.get("/v1/models", PROBE_TIMEOUT_S)
        try:
            entry = reply.json()["data"][0]
            if entry["owned_by"] == OWNER:
                return str(entry["id"])
        except (ValueError, KeyError, TypeError, IndexError):
            pass
        if await self._is_front_of_others():
            raise Misused(
                Reason.BACKEND_UNREACHABLE,
                f"{self._backend}: this is the front of a disaggregated trtllm-serve, which is not served: each of its "
                "servers would load adapters by itself; start one trtllm-serve that computes prompts and answers",
            )
        raise Misused(
            Reason.BACKEND_UNREACHABLE,
            f"{self._backend}: /v1/models answers {reply.status} and not as trtllm-serve does; "
            f"is another server there? ({reply.text[:120]})",
        )

    async def _is_front_of_others(self) -> bool:
        reply = await self._client.get("/cluster_info", PROBE_TIMEOUT_S)
        return reply.is_ok

    async def seats(self) -> int | None:
        """Return max_batch_size, which newer servers tell; None otherwise. Raises Misused for a part of a disaggregated
        server.
        """
        reply = await self._client.get("/server_info", PROBE_TIMEOUT_S)
        record = _json(reply)
        if not isinstance(record, dict):
            return None
        if record.get("disaggregated_params"):
            raise Misused(
                Reason.BACKEND_UNREACHABLE,
                f"{self._backend}: this server computes prompts or answers only (disaggregated), which is not served; "
                "start one trtllm-serve that does both",
            )
        return _whole(record.get("max_batch_size"))

    async def measures(self) -> Measures:
        """Return the newest values of /metrics, which reading empties; all None if there are none."""
        try:
            records = _json(await self._client.get("/metrics", PROBE_TIMEOUT_S))
        except WireError:
            return Measures()
        if not isinstance(records, list) or not records or not isinstance(records[-1], dict):
            return Measures()
        newest = records[-1]
        cache = newest.get("kvCacheStats") or {}
        block = _whole(cache.get("tokensPerBlock")) or 0
        total, used = _whole(cache.get("maxNumBlocks")), _whole(cache.get("usedNumBlocks"))
        return Measures(
            _whole(newest.get("iter")),
            total * block if total and block else None,
            used * block if used is not None and block else None,
            _whole(newest.get("numActiveRequests")),
        )

    async def ask(
        self, prompt: Sequence[int], tokens: int, timeout_s: float, lora: Lora | None = None, epoch: int = 0
    ) -> tuple[int, str]:
        """Ask for a greedy answer, with an adapter or without; return the status, and its ids or the error's text."""
        body: dict[str, Any] = {
            "model": "base",
            "prompt": list(prompt),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "detokenize": False,
        }
        if lora is not None:
            body["lora_request"] = lora.record
        reply = await self._client.post("/v1/completions", body, timeout_s, epoch_header(epoch))
        if not reply.is_ok:
            return reply.status, message_of(reply.body)
        record = _json(reply)
        choices = record.get("choices") if isinstance(record, dict) else None
        return reply.status, str(choices[0].get("token_ids") or choices[0].get("text")) if choices else ""


def _json(reply: Reply) -> Any:
    try:
        return reply.json() if reply.is_ok else None
    except ValueError:
        return None


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None
