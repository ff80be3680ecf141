"""A request of Triton's Python backend as a query: its tensors are views, nothing is copied here."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from sidecar.lab.engine.kserve.datatypes import DATATYPES, Datatype
from sidecar.lab.engine.kserve.inference import Query
from sidecar.lab.engine.kserve.models import Model
from sidecar.lab.engine.kserve.tensors import Tensor
from tests.e2e.triton.models.capsules import bits_of


class UnreadableInput(Exception):
    """An input whose data a Python model cannot reach; the text goes to the client."""


def query_of(request: Any, model: Model) -> Query:
    """Return the query; it holds the request, whose memory its arrays are in, until it lets go of them.

    Raises UnreadableInput.
    """
    tensors = {tensor.name: tensor for tensor in (_tensor(given, model) for given in request.inputs())}
    held = [request]
    names = set(request.requested_output_names())
    return Query(
        model=model,
        triton_id=request.request_id(),
        tensors=tensors,
        parameters=json.loads(request.parameters() or "{}"),
        # Triton puts all outputs in the place of an empty list.
        requested=() if names == set(model.outputs) else tuple(names),
        taken=held.clear,
    )


def _tensor(given: Any, model: Model) -> Tensor:
    name = given.name()
    datatype = DATATYPES[model.inputs[name].datatype]
    if not given.is_cpu():
        raise UnreadableInput(f"Expected {name.replace('_', ' ')} to be in CPU memory")
    array = _array(given, datatype)
    return Tensor(name, datatype, array.shape, array, shared=True)


def _array(given: Any, datatype: Datatype) -> Any:
    if datatype.name == "BF16":
        # The backend refuses to make an array of these.
        return bits_of(given)
    array = given.as_numpy()
    return array if datatype.numpy is None else np.asarray(array, datatype.numpy)
