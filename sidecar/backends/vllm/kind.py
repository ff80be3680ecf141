"""The backend kind `vllm`: its configuration, how it is connected, and what it can be asked.

Put our own requests to vLLM, and read its answers: its completions take text and token ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from sidecar.adapters.base_model import read_base_model
from sidecar.backends.api import Backend, HttpForm, Reply
from sidecar.backends.kind import Ask, Asking, Checks, Kind, ModelKind, Native, Piece, Wiring, with_kind
from sidecar.backends.openai.asking import CHAT, COMPLETIONS, completion
from sidecar.backends.openai.events import record_of
from sidecar.config.backends import Backend as Entry
from sidecar.core.facts import EngineFacts


def _write(ask: Ask, streams: bool) -> HttpForm:
    return completion(ask, streams, return_token_ids=True, **({} if ask.salt is None else {"cache_salt": ask.salt}))


class _Reader:
    """Reads events of a stream, or a whole answer, with token ids."""

    def __init__(self, is_text: bool) -> None:
        self._is_text = is_text

    def read(self, reply: Reply) -> Piece:
        choices = record_of(reply.raw).get("choices", [])
        if not choices:
            return Piece()
        ids = choices[0].get("token_ids") or ()
        return Piece(choices[0].get("text") or "", (), len(ids)) if self._is_text else Piece("", ids, len(ids))


ASKING = Asking(_write, lambda ask: "", _Reader)


MODEL = ModelKind(
    name="vllm",
    title="vLLM",
    native=Native.OPENAI,
    asking=ASKING,
    salted=(COMPLETIONS, CHAT),
    reads_files=True,
    page_is_adapter=True,
    pages="the engine keeps {host} in memory (max_cpu_loras) and has {device} slots (max_loras)",
)
_PACKED = "nothing is packed for vLLM; base_model.config says what adapters are checked against"


class VllmEntry(Entry):
    """A vLLM server, by `vllm://HOST:PORT`; `vllms://HOST:PORT` by TLS, this machine's CAs trusted unless others are
    named. `api_key_file` has the key that it wants, `old_versions` uses it though it may answer by another adapter.
    """

    SCHEMES: ClassVar = {"vllm": False, "vllms": True}
    ELSEWHERE: ClassVar = {
        "triton://": {
            "model": "vLLM serves one model, and is asked what it calls it",
            "text_model": "vLLM takes text and tokens by one model",
            "models": "vLLM serves one model, and is asked what it calls it",
            "metrics": "vLLM's metrics are at its own url, under /metrics",
            "weights_transport": "vLLM reads adapters' files itself, from adapters_dir",
            "engine.config": "it names TensorRT-LLM's config.json; what vLLM was started with is said by "
            "engine.device_pages (--max-loras), engine.host_pages (--max-cpu-loras), engine.seats (--max-num-seqs) and "
            "engine.rank_max (--max-lora-rank)",
            "engine.modules": "nothing is packed for vLLM: what a page holds there is one adapter",
            "engine.rank_multiple": "nothing is packed for vLLM",
            "engine.tp": "nothing is packed for vLLM, which splits adapters itself",
            "engine.heads": _PACKED,
            "engine.kv_heads": _PACKED,
            "engine.head_size": _PACKED,
        }
    }

    api_key_file: str | None = None
    old_versions: bool = False

    def files(self) -> dict[str, str | None]:
        return super().files() | {"api_key_file": self.api_key_file}


def _declare(entry: VllmEntry, declared: EngineFacts, all_of_kind: Sequence[VllmEntry]) -> EngineFacts:
    return replace(with_kind(declared, MODEL), base_only=entry.adapters_dir is None)


def _connect(entry: VllmEntry, declared: EngineFacts, wiring: Wiring) -> tuple[Backend, EngineFacts]:
    from sidecar.backends.vllm.backend import VllmBackend

    return VllmBackend(entry, declared, tries_sizes=_tries_sizes(entry)), declared


def _tries_sizes(entry: VllmEntry) -> bool:
    """Return True if the engine must be tried: its model's sizes are not known, or a model's parts have two names."""
    base = entry.base_model
    if base is None or base.config is None:
        return True
    return read_base_model(Path(base.config).expanduser()).is_multimodal


def _checks() -> Checks:
    from sidecar.backends.vllm.checks import CHECKS

    return CHECKS


def _notes(entry: VllmEntry, declared: EngineFacts) -> Iterator[str]:
    from sidecar.backends.vllm.checks.declared import undeclared

    return undeclared(declared, entry.adapters_dir is not None)


def _unchecked(backends: Sequence[str]) -> str:
    from sidecar.backends.vllm.checks.declared import sizes_unknown

    return sizes_unknown(backends)


VLLM = Kind("vllm", VllmEntry, (MODEL,), _connect, _declare, _checks, _notes, _unchecked)
