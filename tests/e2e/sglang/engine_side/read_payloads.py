"""Read payloads as SGLang does: `read_payloads.py FOLDER`, for each N.payload the tensors' bytes to N.read, as JSON.

A payload that its unpickler refuses gives the error instead.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

import torch
from sglang.srt.utils import MultiprocessingSerializer


def read(payload: Path) -> object:
    try:
        found = MultiprocessingSerializer.deserialize(payload.read_text())
    except Exception as error:  # noqa: BLE001  # whatever it is, the server would have ended by it
        return f"{type(error).__name__}: {error}"
    return {name: [str(tensor.dtype), list(tensor.shape), _base64(tensor)] for name, tensor in found.items()}


def _base64(tensor: torch.Tensor) -> str:
    return base64.b64encode(tensor.contiguous().view(torch.uint8).numpy().tobytes()).decode()


for each in sorted(Path(sys.argv[1]).glob("*.payload")):
    each.with_suffix(".read").write_text(json.dumps(read(each)))
