"""A sidecar in front of emulated trtllm-serves, which read adapters from a folder that they share with it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sidecar.lab.engine.shape import HF_MODULES
from tests.kit.serving import Serving, serving
from tests.kit.trtllm_emulated import BASE_CONFIG, expected


def entry_of(folder: Path, max_loras: int = 2, max_cpu_loras: int = 4, **lora_config: Any) -> dict[str, Any]:
    """Return what the entry of a trtllm-serve has besides its URL, for a folder that holds `shared`."""
    sizes = {"max_loras": max_loras, "max_cpu_loras": max_cpu_loras}
    base = folder / "base.json"
    folder.mkdir(parents=True, exist_ok=True)
    base.write_text(json.dumps(BASE_CONFIG))
    return {
        "adapters_dir": str(folder / "shared"),
        "base_model": {"name": "tiny-llama", "aliases": ["base"], "config": str(base)},
        "lora_config": sizes | {"lora_target_modules": list(HF_MODULES.values())} | lora_config,
    }


@asynccontextmanager
async def fronted(engines: Sequence[Any], folder: Path, **record: Any) -> AsyncIterator[Serving]:
    """Run a sidecar in front of trtllm-serves that read from `folder / "shared"`; `folder / "adapters"` is served."""
    backend = entry_of(folder) | record.pop("backend", {})
    roots = record.pop("roots", [folder])
    async with serving(engines, folder / "adapters", roots, backend=backend, **record) as served:
        yield served


def staged(folder: Path) -> set[str]:
    """Return the packed keys that are staged."""
    return {path.name for path in (folder / "shared").iterdir() if not path.name.startswith((".", "lora-sidecar"))}


def answer_of(folder: Path, name: str, tokens: int = 4) -> list[int]:
    """Return what an engine with dummy compute answers for the adapter in `folder / "adapters"`."""
    return expected(folder / "adapters" / name, tokens)
