"""A request's LoRA tensors as the executor takes them: checked against the engine, then rows and a payload.

Source: `cpp/tensorrt_llm/runtime/loraUtils.cpp` (loraValidateRequestTensors).
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidecar.lab.engine.kserve.errors import FETCH_ERROR
from sidecar.lab.engine.kserve.generation import LoraTensors
from sidecar.lab.engine.kserve.options import DATATYPE_OF_DTYPE
from sidecar.lab.engine.kserve.work import Work
from sidecar.lab.engine.messages import Request
from sidecar.lab.engine.packed import PackedAdapter, unpack
from sidecar.lab.engine.spec import EngineSpec
from sidecar.lab.engine.validation import Rejected, check_adapter


def adapter_fault(work: Work, spec: EngineSpec, weights_datatype: str) -> str | None:
    """Return the executor's error text for an adapter that this engine refuses, or None."""
    lora = work.generation.lora
    fault = None if lora is None else _fault(work, lora, spec, weights_datatype)
    return None if fault is None else f"{FETCH_ERROR}{fault}"


def _fault(work: Work, lora: LoraTensors, spec: EngineSpec, weights_datatype: str) -> str | None:
    if lora.weights is None and lora.config is not None:
        return "Request for LoRA inference must have both lora_weights and lora_keys"
    if lora.weights is None or lora.config is None or not spec.lora_modules:
        return None
    if DATATYPE_OF_DTYPE[spec.dtype] != weights_datatype:
        return "Expected lora weights to be the same data type as base model"
    try:
        check_adapter(Request(work.request_id, 1, 1, lora.task_id, work.rows), spec)
    except Rejected as rejected:
        return str(rejected)
    return _short_row(lora.weights, lora.config, spec)


def _short_row(weights: NDArray[Any], config: NDArray[np.int32], spec: EngineSpec) -> str | None:
    for module_id, _, rank in config.tolist():
        module = spec.modules.get(module_id)
        if module is not None and rank * (module.in_dim + module.out_dim) > weights.shape[1]:
            return f"lora_weights has to few values for {module.name}"
    return None


def packed_of(lora: LoraTensors, spec: EngineSpec) -> PackedAdapter | None:
    """Return the weights as the executor applies them, copied, since the client may overwrite its own later."""
    if lora.weights is None or lora.config is None:
        return None
    return unpack(lora.weights, lora.config, spec.shape)


def digest_of(lora: LoraTensors) -> str:
    """Return the hex SHA-256 of the weights' bytes."""
    assert lora.weights is not None
    return hashlib.sha256(np.ascontiguousarray(lora.weights).tobytes()).hexdigest()
