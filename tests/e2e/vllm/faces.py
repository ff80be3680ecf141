"""The same API behind two servers: a real vLLM, and the emulator's face of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.vllm.installed import chosen
from tests.kit.peft_files import Dims, write_adapter

VLLM, EMULATOR = "vllm", "emulator"
CONTEXT = 1024
EMULATED = {
    "max-loras": 2, "max-cpu-loras": 4, "max-lora-rank": 16, "max-num-seqs": 64, "max-model-len": CONTEXT,
    "vllm-version": chosen().version,
}  # fmt: skip
"""Options of the emulator's, equal to the shared server's."""
_VARYING = {
    "id": r"(chat)?cmpl-[0-9a-f]+|modelperm-[0-9a-f]+",
    "created": r"\d{10}",
    "system_fingerprint": r"vllm-0\.3[23]\.0-\w+",
}
"""Members whose values are others each time, and what they look like."""
_ANSWERS = ("text", "content")


@dataclass
class Face:
    """A running server: how it is reached, and how adapters are made that fit its model."""

    name: str
    address: str
    dims: Dims
    folder: Path
    size: float
    made: int = field(default=0)

    @property
    def is_real(self) -> bool:
        return self.name == VLLM

    def adapter(self, seed: int = 0, rank: int = 8, **config: Any) -> Path:
        """Write an adapter to a folder of its own; `config` overrides fields of its adapter_config.json."""
        self.made += 1
        fields = {"modules": ("q_proj", "v_proj"), "dtype": "float32", "size": self.size, "alpha": 2 * rank}
        path = self.folder / f"made-{self.made}"
        return write_adapter(
            path, shape=self.dims, rank=rank, seed=seed, base_model_name_or_path="base", **fields | config
        )

    def damaged(self, damage: Callable[[Path], Any], **options: Any) -> Path:
        """Write an adapter and do something to its folder."""
        path = self.adapter(**options)
        damage(path)
        return path


def remove(path: Path) -> None:
    shutil.rmtree(path)


def replaced(name: str, content: bytes) -> Callable[[Path], Any]:
    """Return what overwrites a file of an adapter."""
    return lambda folder: (folder / name).write_bytes(content)


def events_of(stream: str) -> list[str]:
    """Return the data of a stream's events. Fails for anything else between them."""
    parts = stream.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") and "\n" not in part for part in parts), stream
    return [part.removeprefix("data: ") for part in parts]


def pattern_of(text: str) -> str:
    """Return a JSON text with what is another each time replaced by "…": order and spelling are as they were.

    Fails when something that varies does not look as it should.
    """
    return to_json(_fixed(json.loads(text)))


def to_json(value: Any) -> str:
    """Return a value as the servers write it."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


INVALID, MISSING, FAILED = (400, "InvalidUserInput"), (404, "NotFoundError"), (500, "InternalServerError")
BAD_REQUEST, UNFIT = (400, "Bad Request"), (400, "BadRequestError")


def assert_error(reply: httpx.Response, kind: tuple[int, str], message: str, param: str | None = None) -> None:
    """The error is as vLLM words it, members in its order; `kind` is the status and the type."""
    error = {"error": {"message": message, "type": kind[1], "param": param, "code": kind[0]}}
    assert (reply.status_code, reply.text) == (kind[0], to_json(error))
    assert reply.headers["content-type"] == "application/json"


def _fixed(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _fixed(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [_fixed(inner, name) for inner in value]
    if name in _VARYING and not (name == "id" and "-" not in str(value)):
        assert re.fullmatch(_VARYING[name], str(value)), (name, value)
        return "…"
    if name in _ANSWERS:
        return "…"
    return value
