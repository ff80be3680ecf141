"""What an adapter version is called: its digest, the key of one packed form of it, and the engine's task id.

Equal content has equal names on every replica and for ever; new content, another layout, another revision
of the packer or another generation has a new task id, so no engine can confuse them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from sidecar.adapters.layout import Layout
from sidecar.adapters.tensors import TensorFile

PACKER_REVISION = 1
"""Raise it whenever the same source and layout would give other packed bytes."""


def digest_of(
    file: TensorFile,
    base_model: str,
    config_identity: Mapping[str, Any],
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Return the SHA-256 (hex) over base model, config fields, and each tensor's name, dtype, shape and
    bytes.

    Tensors are taken in the order of their names, not of the file. `progress(done_bytes, total_bytes)`.
    """
    tensors = [file.tensors[name] for name in sorted(file.tensors)]
    head = {
        "base_model": base_model,
        "config": config_identity,
        "tensors": [[tensor.name, tensor.dtype, tensor.shape] for tensor in tensors],
    }
    # The head says how many bytes each tensor has, so what follows cannot be read in two ways.
    digest = hashlib.sha256(json.dumps(head, sort_keys=True, separators=(",", ":")).encode())
    done, total = 0, sum(tensor.size_bytes for tensor in tensors)
    for tensor in tensors:
        for chunk in file.raw_chunks(tensor):
            digest.update(chunk)
        done += tensor.size_bytes
        if progress is not None:
            progress(done, total)
    return digest.hexdigest()


def packed_key(digest: str, layout: Layout, generation: int = 0) -> str:
    """Return the name of one packed form: safe as a file name, equal on every replica."""
    return f"{digest}.{layout.label}.p{PACKER_REVISION}.g{generation}"


def task_id(packed_key: str) -> int:
    """Return the engine's id of a packed form: 63 bits of the key's SHA-256, never 0 (engines read 0 as
    none).
    """
    value = int.from_bytes(hashlib.sha256(packed_key.encode()).digest()[:8], "big") >> 1
    return value or 1
