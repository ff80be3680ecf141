"""A Python model that answers with a checksum of a BF16 tensor, read in another thread after `execute` has returned."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from tests.e2e.triton.models.capsules import bits_of


class TritonPythonModel:
    """Reads as the engine does: the request is held, the array is a view of its memory."""

    def initialize(self, args: dict[str, str]) -> None:
        self._taken: SimpleQueue[Any] = SimpleQueue()
        self._thread = Thread(target=self._answer, daemon=True)
        self._thread.start()

    def execute(self, requests: Sequence[Any]) -> None:
        for request in requests:
            bits = bits_of(pb_utils.get_input_tensor_by_name(request, "bits"))
            self._taken.put((request, request.get_response_sender(), bits))

    def finalize(self) -> None:
        self._taken.put(None)
        self._thread.join()

    def _answer(self) -> None:
        while (taken := self._taken.get()) is not None:
            _, sender, bits = taken
            sums = np.array([[zlib.crc32(bits), *bits.shape]], np.int64)
            answer = pb_utils.InferenceResponse([pb_utils.Tensor("checksum", sums)])
            sender.send(answer, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            del taken, sender, bits
