"""What a KServe request asks of us: which adapter, for whom, how large; and what we send on in its place.

Nothing is ever silently answered by the base model: a parameter that looks like ours and is not is refused, and so
are LoRA tensors of the client's own, unless the configuration says what they mean.
"""

from __future__ import annotations

import difflib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sidecar.adapters.names import shown
from sidecar.backends.api import Payload
from sidecar.backends.wire import EMPTY_FINAL, ModelInferRequest
from sidecar.errors import Reason, Refused
from sidecar.fronts.callers import earliest
from sidecar.shell.gateway import RequestFacts

PARAMETERS = ("lora_name", "lora_tenant", "lora_class", "lora_deadline_ms")
MISTAKES = ("lora", "adapter", "adapter_name", "adapter_id")
LORA_TENSORS = ("lora_task_id", "lora_weights", "lora_config")
CLIENT_TASK_IDS_END = 1 << 32
"""Ids from here on are ours: hashes of 63 bits. A client could otherwise put its weights under an id of ours."""
PARAMETER_CHARACTERS_MAX = 4096
OUTPUT_LENGTHS = ("request_output_len", "max_tokens")


@dataclass(frozen=True)
class Rules:
    """The parts of the configuration that decide what a client may send."""

    legacy_task_ids: Mapping[int, str]
    allow_client_lora: bool


@dataclass(frozen=True)
class Asked:
    """A parsed request: `stop` cancels an earlier one of the same id instead of running."""

    client_id: str
    model: str
    stop: bool
    wants_empty_final: bool
    facts: RequestFacts
    payload: Payload


def read(raw: bytes, unary: bool, metadata: Mapping[str, str], rules: Rules) -> Asked:
    """Read a request. Raises Refused(INVALID_REQUEST) with what is wrong with it."""
    try:
        message = ModelInferRequest.FromString(raw)
    except Exception as error:  # protobuf raises its own, implementation-dependent classes
        raise Refused(Reason.INVALID_REQUEST, "the request is not a ModelInferRequest: malformed protobuf") from error
    own = _own_parameters(message.parameters, metadata)
    adapter, head = _adapter(message, raw, own.get("lora_name"), rules)
    facts = RequestFacts(
        adapter=adapter,
        tenant=own.get("lora_tenant", ""),
        klass=own.get("lora_class") or "default",
        input_tokens=_input_tokens(message),
        output_tokens_max=_first_integer(message, OUTPUT_LENGTHS) or 0,
        deadline_s=_deadline_s(own.get("lora_deadline_ms")),
    )
    typed = any(tensor.HasField("contents") for tensor in message.inputs)
    return Asked(
        client_id=message.id,
        model=message.model_name,
        stop=_is_stop(message),
        wants_empty_final=EMPTY_FINAL in message.parameters and message.parameters[EMPTY_FINAL].bool_param,
        facts=facts,
        payload=Payload(message.model_name, head, raw=not typed, unary=unary),
    )


def with_deadline(facts: RequestFacts, remaining_s: float | None, tenant: str) -> RequestFacts:
    """Return the facts with the call's own deadline and the tenant that the listener made out."""
    return RequestFacts(
        facts.adapter,
        tenant,
        facts.klass,
        facts.input_tokens,
        facts.output_tokens_max,
        earliest(facts.deadline_s, remaining_s),
    )


def _own_parameters(parameters: Any, metadata: Mapping[str, str]) -> dict[str, str]:
    """Return our parameters as text; those of the request win over the call's metadata."""
    own = {name: metadata[key] for name in PARAMETERS if (key := name.replace("_", "-")) in metadata}
    for name in parameters:
        if name in PARAMETERS:
            own[name] = _text(name, parameters[name])
        elif name.startswith("lora_") or name in MISTAKES:
            near = difflib.get_close_matches(name[:80], PARAMETERS, n=1, cutoff=0.4) or ["lora_name"]
            raise Refused(Reason.INVALID_REQUEST, f'unknown parameter "{shown(name)}"; did you mean "{near[0]}"?')
    if own.get("lora_name") == "":
        raise Refused(
            Reason.INVALID_REQUEST, "lora_name is empty; name an adapter, or leave the parameter out for the base model"
        )
    return own


def _text(name: str, parameter: Any) -> str:
    kind = parameter.WhichOneof("parameter_choice")
    text = str(getattr(parameter, kind)) if kind else ""
    if kind == "bool_param" or (kind != "string_param" and name != "lora_deadline_ms"):
        raise Refused(Reason.INVALID_REQUEST, f'parameter "{name}" must be a string, not {kind}')
    if len(text) > PARAMETER_CHARACTERS_MAX:
        raise Refused(
            Reason.INVALID_REQUEST,
            f'parameter "{name}" has {len(text)} characters ("{shown(text)}"); at most {PARAMETER_CHARACTERS_MAX} make '
            "sense",
        )
    return text


def _deadline_s(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        value = float(text) / 1000
    except ValueError:
        value = -1.0
    if not 0 < value < 1e9:
        raise Refused(
            Reason.INVALID_REQUEST, f'lora_deadline_ms is "{shown(text)}"; it must be milliseconds from now, above 0'
        )
    return value


def _adapter(message: Any, raw: bytes, name: str | None, rules: Rules) -> tuple[str, bytes]:
    """Return the adapter's name ("" for the base model) and the request as it is sent on."""
    own_tensors = [tensor.name for tensor in message.inputs if tensor.name in LORA_TENSORS]
    if name is not None:
        if own_tensors:
            raise Refused(
                Reason.INVALID_REQUEST,
                f"the request has lora_name and {own_tensors[0]}; drop the lora_* tensors: the sidecar sends them",
            )
        return name, raw
    if not own_tensors:
        return "", raw
    task_id = _first_integer(message, ("lora_task_id",))
    if task_id is not None and task_id in rules.legacy_task_ids:
        return rules.legacy_task_ids[task_id], _without_lora_tensors(message)
    if not rules.allow_client_lora:
        raise Refused(
            Reason.INVALID_REQUEST,
            f"the request has {own_tensors[0]} of its own; name the adapter with the request parameter lora_name "
            "instead, or map old ids with legacy_task_ids in the configuration",
        )
    if task_id is None or task_id >= CLIENT_TASK_IDS_END:
        raise Refused(
            Reason.INVALID_REQUEST,
            f"lora_task_id must be given, below {CLIENT_TASK_IDS_END}: larger ids are the sidecar's own",
        )
    return "", raw


def _without_lora_tensors(message: Any) -> bytes:
    """Return the request without the client's LoRA tensors. Raw contents go with the tensors they belong to."""
    stripped = ModelInferRequest()
    stripped.CopyFrom(message)
    del stripped.inputs[:], stripped.raw_input_contents[:]
    contents = iter(message.raw_input_contents)
    for tensor in message.inputs:
        in_region = "shared_memory_region" in tensor.parameters
        data = None if in_region or not message.raw_input_contents else next(contents, None)
        if tensor.name in LORA_TENSORS:
            continue
        stripped.inputs.add().CopyFrom(tensor)
        if data is not None:
            stripped.raw_input_contents.append(data)
    return bytes(stripped.SerializeToString())


def _is_stop(message: Any) -> bool:
    for index, tensor in enumerate(message.inputs):
        if tensor.name == "stop":
            if tensor.contents.bool_contents:
                return bool(tensor.contents.bool_contents[0])
            return (_raw_of(message, index) or b"\0") != b"\0"
    return False


def _raw_of(message: Any, index: int) -> bytes | None:
    """Return a tensor's raw contents; tensors in shared memory have none and take no place among them."""
    if "shared_memory_region" in message.inputs[index].parameters:
        return None
    place = sum("shared_memory_region" not in tensor.parameters for tensor in message.inputs[:index])
    return message.raw_input_contents[place] if place < len(message.raw_input_contents) else None


def _first_integer(message: Any, names: tuple[str, ...]) -> int | None:
    for index, tensor in enumerate(message.inputs):
        if tensor.name not in names:
            continue
        for values in (tensor.contents.int_contents, tensor.contents.uint64_contents, tensor.contents.int64_contents):
            if values:
                return int(values[0])
        data = _raw_of(message, index)
        if data is not None and len(data) in (4, 8):
            unsigned = tensor.datatype.startswith("U")
            return int.from_bytes(data, "little", signed=not unsigned)
    return None


def _input_tokens(message: Any) -> int:
    """Return the prompt's length: token ids by their shape, text as a token a byte, its upper bound."""
    for index, tensor in enumerate(message.inputs):
        if tensor.name == "input_ids" and tensor.shape:
            return max(0, int(tensor.shape[-1]))
        if tensor.name == "text_input":
            if tensor.contents.bytes_contents:
                return len(tensor.contents.bytes_contents[0])
            data = _raw_of(message, index)
            return struct.unpack_from("<I", data)[0] if data is not None and len(data) >= 4 else 0
    return 0
