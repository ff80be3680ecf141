"""The digest that names an adapter version: equal content has an equal name on every replica and for ever."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from sidecar.adapters.shards import Tensors


def digest_of(
    file: Tensors,
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
