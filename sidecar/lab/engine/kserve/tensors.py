"""Input tensors from the wire: raw bytes, typed `contents` or shared memory, and their NumPy form.

The order of the checks and their texts follow Triton's gRPC front end (`grpc/infer_handler.cc`, InferGRPCToInput).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidecar.lab.engine.kserve.datatypes import DATATYPES, Datatype, split_bytes
from sidecar.lab.engine.kserve.errors import Rejection, id_prefix
from sidecar.lab.engine.kserve.shared_memory import Region, Regions, release

_INVALID = Datatype("<invalid>", None, np.uint8, None)
"""The type that the front end gives to an unknown one; the core refuses it."""
_CONTENTS_FIELDS = sorted({d.contents for d in DATATYPES.values() if d.contents is not None})


@dataclass
class Tensor:
    """One input as received: its wire shape with the batch dimension, and its data.

    `data` is a buffer, a list of elements for typed contents, or an array as a Python model has it. `shared` means that
    the client may overwrite it.
    """

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    data: Any
    shared: bool = False

    @property
    def size_bytes(self) -> int:
        """Bytes of the data; a typed BYTES element counts as in its serialized form."""
        if not isinstance(self.data, list):
            return len(self.data)
        if self.datatype.numpy is None:
            return sum(len(element) + 4 for element in self.data)
        return len(self.data) * self.datatype.size_bytes

    def array(self) -> NDArray[Any]:
        """Return the tensor as an array (of bytes objects for BYTES); a view of the data where possible."""
        if isinstance(self.data, np.ndarray):
            return self.data
        if self.datatype.numpy is None:
            elements = self.data if isinstance(self.data, list) else split_bytes(self.data)
            return np.array(elements, dtype=object).reshape(self.shape)
        if isinstance(self.data, list):
            return np.array(self.data, dtype=self.datatype.numpy).reshape(self.shape)
        return np.frombuffer(self.data, dtype=self.datatype.numpy).reshape(self.shape)


@dataclass
class Inputs:
    """The tensors of one request by name, and the regions held until `release`."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    regions: list[Region] = field(default_factory=list)

    def release(self) -> None:
        """Release the shared memory; the tensors must not be read afterwards."""
        release(self.regions)
        self.regions = []


def read_inputs(request: Any, regions: Regions) -> Inputs:
    """Return the tensors of a ModelInferRequest. Raises Rejection for what the front end refuses."""
    inputs = Inputs()
    raw = iter(request.raw_input_contents)
    try:
        for message in request.inputs:
            if message.name in inputs.tensors:
                raise Rejection(f"{id_prefix(request.id)}input '{message.name}' already exists in request")
            inputs.tensors[message.name] = _read(message, request, raw, regions, inputs)
    except Rejection:
        inputs.release()
        raise
    return inputs


def _read(message: Any, request: Any, raw: Iterator[bytes], regions: Regions, inputs: Inputs) -> Tensor:
    datatype = DATATYPES.get(message.datatype, _INVALID)
    shape = tuple(message.shape)
    where = f"input tensor '{message.name}' for model '{request.model_name}'"
    if "shared_memory_region" in message.parameters:
        if message.HasField("contents"):
            raise Rejection(f"unexpected 'content' provided when using shared memory for {where}")
        region, view = _shared(message, regions)
        inputs.regions.append(region)
        return Tensor(message.name, datatype, shape, view, shared=True)
    if message.HasField("contents"):
        if request.raw_input_contents:
            raise Rejection(
                "contents field must not be specified when using raw_input_contents for "
                f"'{message.name}' for model '{request.model_name}'"
            )
        return Tensor(message.name, datatype, shape, _typed(message, datatype, where))
    data = next(raw, None)
    if data is None:
        raise Rejection(f"unable to find data for {where} in request.")
    return Tensor(message.name, datatype, shape, data)


def _shared(message: Any, regions: Regions) -> tuple[Region, memoryview]:
    parameters = message.parameters
    size = parameters["shared_memory_byte_size"].int64_param if "shared_memory_byte_size" in parameters else 0
    if not size:
        raise Rejection(
            "'shared_memory_byte_size' must be specified along with 'shared_memory_region' parameter for "
            f"tensor '{message.name}'"
        )
    offset = parameters["shared_memory_offset"].int64_param if "shared_memory_offset" in parameters else 0
    return regions.use(parameters["shared_memory_region"].string_param, offset, size)


def _typed(message: Any, datatype: Datatype, where: str) -> list[Any]:
    for name in _CONTENTS_FIELDS:
        values = getattr(message.contents, name)
        if not values:
            continue
        if name != datatype.contents:
            raise Rejection(
                f"unexpected explicit tensor data for {where} of type '{name.removesuffix('_contents').upper()}', "
                f"expected datatype '{datatype.name}'"
            )
        return list(values)
    return []
