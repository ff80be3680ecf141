"""The first step of `ensemble`: text to token ids, one byte a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from sidecar.lab.engine.tokens import EOS, PAD, ByteTokenizer


class TritonPythonModel:
    """Stateless; each request is answered by itself."""

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Return one response for each request."""
        return [_answer(request) for request in requests]


def _answer(request: Any) -> Any:
    texts = pb_utils.get_input_tensor_by_name(request, "QUERY").as_numpy()
    lengths = pb_utils.get_input_tensor_by_name(request, "REQUEST_OUTPUT_LEN").as_numpy()
    rows = [ByteTokenizer().encode(text.decode("utf-8", errors="replace")) for text in texts.reshape(-1)]
    longest = max(len(row) for row in rows)
    ids = [row + [PAD] * (longest - len(row)) for row in rows]
    tensors = [
        pb_utils.Tensor("INPUT_ID", np.array(ids, np.int32)),
        pb_utils.Tensor("REQUEST_INPUT_LEN", np.array([[len(row)] for row in rows], np.int32)),
        pb_utils.Tensor("REQUEST_OUTPUT_LEN", np.array(lengths, np.int32)),
        pb_utils.Tensor("OUT_END_ID", _given_or(request, "END_ID", EOS, len(rows))),
        pb_utils.Tensor("OUT_PAD_ID", _given_or(request, "PAD_ID", PAD, len(rows))),
    ]
    return pb_utils.InferenceResponse(output_tensors=tensors)


def _given_or(request: Any, name: str, default: int, rows: int) -> Any:
    given = pb_utils.get_input_tensor_by_name(request, name)
    return np.full((rows, 1), default, np.int32) if given is None else given.as_numpy()
