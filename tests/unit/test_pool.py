"""From a configuration to its backends: what is said of them at start."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from sidecar.backends.kind import Wiring
from sidecar.backends.triton.loads import LoaderProcess
from sidecar.serve.pool import make_backends
from tests.kit.entries import entries

MODEL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 160,
}  # fmt: skip


async def said_of(caplog: pytest.LogCaptureFixture, *backends: dict[str, Any]) -> list[str]:
    """Return the warnings that come with a configuration's backends."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "sidecar.serve.pool"):
        for backend, _ in make_backends(entries(*backends), Wiring(LoaderProcess())):
            await backend.stop()
    return [record.getMessage() for record in caplog.records]


async def test_vllms_whose_adapters_are_checked_against_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Are named once, all together, with the way out: such an engine takes smaller adapters in silence."""
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    folder, files = {"adapters_dir": str(tmp_path)}, {"name": "llama", "config": str(tmp_path)}
    (sentence,) = await said_of(
        caplog,
        {"url": "vllm://host:1", "id": "nameless", **folder},
        {"url": "vllm://host:2", "id": "named", "base_model": "llama", **folder},
        {"url": "vllm://host:3", "id": "without adapters", "base_model": "llama"},
        {"url": "triton://host:4", "id": "triton"},
    )
    assert sentence.startswith("nameless, named: ")
    assert "vLLM takes an adapter of smaller ones in silence" in sentence
    assert "backends[].base_model: {name: …, config: the folder of the model}" in sentence
    checked = {"url": "vllm://host:1", "id": "checked", "base_model": files, **folder}
    assert await said_of(caplog, checked) == []
    beside = {"url": "vllm://host:2", "id": "of the same name", "base_model": "llama", **folder}
    assert await said_of(caplog, checked, beside) == []
