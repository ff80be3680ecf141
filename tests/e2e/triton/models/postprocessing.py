"""The last step of `ensemble`: token ids to text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from sidecar.lab.engine.tokens import ByteTokenizer


class TritonPythonModel:
    """Stateless; each request is answered by itself."""

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Return one response for each request."""
        return [_answer(request) for request in requests]


def _answer(request: Any) -> Any:
    tokens = pb_utils.get_input_tensor_by_name(request, "TOKENS_BATCH").as_numpy()
    lengths = pb_utils.get_input_tensor_by_name(request, "SEQUENCE_LENGTH").as_numpy()
    texts = [
        ByteTokenizer().decode(row[0, : length[0]].tolist()).encode()
        for row, length in zip(tokens, lengths, strict=True)
    ]
    return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("OUTPUT", np.array(texts, np.object_))])
