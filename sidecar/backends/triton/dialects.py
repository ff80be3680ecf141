"""The two ways in which TensorRT-LLM's models behind Triton take a request and an adapter.

The core model takes token ids, a task id and packed weights. The LLM-API model takes text and, for an adapter, an id, a
name and a path that its own process can read. It loads from that path by itself, and again after it has evicted the
adapter, so every request has the path. Its tensors have no batch dimension.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Protocol

from sidecar.adapters.staging import AdaptersDir as AdaptersDir
from sidecar.backends import wire
from sidecar.core.effects import Dispatch, Load
from sidecar.errors import Misused, Reason

TRITON, TRITON_LLMAPI = "triton", "triton_llmapi"
DUMMY_TEXT = b"a"


class Dialect(Protocol):
    """How one model is asked. `serves_adapters` is False for a model without inputs for them."""

    @property
    def kind(self) -> str: ...

    @property
    def serves_adapters(self) -> bool: ...

    def probe(self, model: str, request_id: str) -> Any:
        """Return a `ModelInferRequest` of ours: a dummy token or two in, one out, by the base model."""

    def fragment(self, engine_id: str, effect: Dispatch, raw: bool, stream: bool) -> bytes:
        """Return the bytes to append to a client's request: our id, and the adapter.

        With `raw` the client's tensors are in `raw_input_contents`; with `stream` the end is to be reported.
        """


@dataclass(frozen=True)
class TensorRtLlm:
    """The core model of an engine: `input_ids`, `lora_task_id`, `lora_weights`, `lora_config`."""

    serves_adapters: bool = True
    kind = TRITON

    def probe(self, model: str, request_id: str) -> Any:
        return wire.load_head(model, request_id)

    def fragment(self, engine_id: str, effect: Dispatch, raw: bool, stream: bool) -> bytes:
        return wire.request_fragment(engine_id, effect.task_id, raw, stream)


@dataclass(frozen=True)
class LlmApi:
    """The LLM-API model: `text_input`, `lora_id`, `lora_name`, `lora_path`. With None it serves only the base model."""

    adapters_dir: AdaptersDir | None
    kind = TRITON_LLMAPI

    @property
    def serves_adapters(self) -> bool:
        return self.adapters_dir is not None

    def probe(self, model: str, request_id: str) -> Any:
        request = wire.ModelInferRequest(model_name=model, id=request_id)
        request.parameters[wire.EMPTY_FINAL].bool_param = True
        _add_raw(request, "text_input", "BYTES", _element(DUMMY_TEXT))
        _add_raw(request, "sampling_param_max_tokens", "INT32", struct.pack("<i", 1))
        return request

    def load(self, model: str, effect: Load) -> Any:
        """Return the request whose answer proves that the engine has the adapter. Its files must be staged."""
        request = self.probe(model, f"lora-sidecar-load-{effect.load}")
        request.parameters["lora_name"].string_param = effect.name
        self._add_adapter(request, effect.packed.task_id, effect.name, effect.packed.key, raw=True)
        return request

    def fragment(self, engine_id: str, effect: Dispatch, raw: bool, stream: bool) -> bytes:
        fragment = wire.ModelInferRequest(id=engine_id)
        if stream:
            fragment.parameters[wire.EMPTY_FINAL].bool_param = True
        if effect.packed_key:
            self._add_adapter(fragment, effect.task_id, effect.name, effect.packed_key, raw)
        return bytes(fragment.SerializeToString())

    def _add_adapter(self, request: Any, lora_id: int, name: str, key: str, raw: bool) -> None:
        texts = (("lora_name", f"{name}@{key[:12]}"), ("lora_path", self._path(key)))
        if raw:
            _add_raw(request, "lora_id", "UINT64", struct.pack("<Q", lora_id))
            for tensor, text in texts:
                _add_raw(request, tensor, "BYTES", _element(text.encode()))
            return
        request.inputs.add(name="lora_id", datatype="UINT64", shape=[1]).contents.uint64_contents.append(lora_id)
        for tensor, text in texts:
            request.inputs.add(name=tensor, datatype="BYTES", shape=[1]).contents.bytes_contents.append(text.encode())

    def _path(self, key: str) -> str:
        assert self.adapters_dir is not None, "an adapter for a model that takes none"
        return self.adapters_dir.engine_path(key)


def dialect_of(config: Any, adapters_dir: AdaptersDir | None) -> TensorRtLlm | LlmApi:
    """Return the dialect of a model, by its ModelConfig.

    Raises Misused if the model cannot be asked: it reads adapters from files and there is no shared folder, or it has a
    batch dimension that its own code refuses.
    """
    inputs = {tensor.name for tensor in config.input}
    if not inputs & {"lora_path", "sampling_param_max_tokens"}:
        return TensorRtLlm(serves_adapters="lora_weights" in inputs)
    if config.max_batch_size > 0:
        raise Misused(
            Reason.CONFIG_INVALID,
            f"{config.name} is an LLM-API model with max_batch_size {config.max_batch_size}, with which it refuses "
            "every prompt; set triton_config.max_batch_size: 0 in its model.yaml",
        )
    if "lora_path" not in inputs:
        return LlmApi(None)
    if adapters_dir is None:
        raise Misused(
            Reason.CONFIG_INVALID,
            f"{config.name} is an LLM-API model, which reads adapters from files; name a folder that this process can "
            "write and the engine can read with backends[].adapters_dir, as in {ours: /mnt/adapters, engine: "
            "/mnt/adapters} with the path on each side",
        )
    return LlmApi(adapters_dir)


def _add_raw(request: Any, name: str, datatype: str, data: bytes) -> None:
    request.inputs.add(name=name, datatype=datatype, shape=[1])
    request.raw_input_contents.append(data)


def _element(text: bytes) -> bytes:
    """Return one element of a BYTES tensor."""
    return struct.pack("<I", len(text)) + text
