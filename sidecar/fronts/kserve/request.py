"""Read a KServe request: its adapter, its sender's claims, its size, and the bytes that are sent on to an engine.

Nothing is silently answered by the base model: a misspelt parameter is refused, and so are a client's own LoRA tensors
unless the configuration gives them a meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sidecar.backends.api import Payload, Whole
from sidecar.backends.registry import written_for
from sidecar.backends.triton.counting import FLAGS
from sidecar.backends.wire import EMPTY_FINAL
from sidecar.config.identities import session_of
from sidecar.errors import Reason, Refused
from sidecar.fronts.kserve.parameters import own_parameters, seconds_until
from sidecar.fronts.kserve.structure import Structure
from sidecar.fronts.kserve.tensors import CORE_LORA_TENSORS, LLMAPI_LORA_TENSORS, LORA_TENSORS, Tensors, check_word
from sidecar.shell.requests import RequestFacts, TraceOrigin

IDS = ("lora_task_id", "lora_id")
CLIENT_TASK_IDS_END = 1 << 32
"""Ids from here on are ours, hashes of 63 bits. Otherwise a client could store its weights under one of our ids."""
BEAMS, RETURNED = ("beam_width",), ("num_return_sequences", "sampling_param_n", "sampling_param_best_of")
STREAMS = ("streaming", "stream")
EXCLUDES = ("exclude_input_in_output", "sampling_param_exclude_input_from_output")
OUTPUT_LENGTHS = ("request_output_len", "max_tokens", "sampling_param_max_tokens")


@dataclass(frozen=True)
class Rules:
    """The parts of the configuration that decide what a client may send."""

    legacy_task_ids: Mapping[int, str]
    allow_client_lora: bool


@dataclass
class KServeRequest:
    """A parsed request, which is completed until it is submitted, and has no bytes any more after that.

    `client_id` is the message's own id; `request_id` is a made one where it has none. With `stop` it cancels an earlier
    request with its id instead of running. With `is_text` the prompt is text, and `facts.input_tokens` counts its
    bytes; `text` is the prompt if it was asked for and is one text in the message. `task` is what the client says
    instead of the adapter's name, "" if it says the name. `hidden_regions` has the client's names of regions by those
    that the engine is told.
    """

    client_id: str
    request_id: str
    model: str
    version: str
    stop: bool
    wants_empty_final: bool
    is_text: bool
    text: str | None
    facts: RequestFacts
    payload: Payload
    task: str = ""
    hidden_regions: Mapping[str, str] = field(default_factory=dict)


def read(
    structure: Structure,
    unary: bool,
    metadata: Mapping[str, str],
    rules: Rules,
    request_id: str,
    with_text: bool = False,
) -> KServeRequest:
    """Read a request, `with_text` if its prompt is to be counted. Raises Refused(INVALID_REQUEST) naming its fault."""
    message = structure.message
    check_word("model_name", message.model_name)
    if message.model_version:
        check_word("model_version", message.model_version)
    own = own_parameters(message.parameters, metadata)
    tensors = Tensors(structure)
    adapter, task = _adapter(tensors, own.get("lora_name"), rules)
    dropped = bool(adapter) and bool(tensors.lora)
    rows, beams, returned = tensors.rows(), _most(tensors, BEAMS), _most(tensors, RETURNED)
    sequences = rows * (1 if beams > 1 else returned)  # the beams of a request share one seat
    facts = RequestFacts(
        adapter=adapter,
        tenant=own.get("lora_tenant", ""),
        klass=own.get("lora_class") or "default",
        input_tokens=tensors.input_tokens(),
        output_tokens_max=_largest(tensors, OUTPUT_LENGTHS, 0) * sequences * beams,
        sequences=sequences,
        deadline_s=seconds_until(own.get("lora_deadline_ms")),
        session=session_of(own.get("lora_session", "")),
        size_bytes=structure.size_bytes,
        trace=TraceOrigin.of(metadata),
    )
    parameters = message.parameters
    return KServeRequest(
        client_id=message.id,
        request_id=request_id,
        model=message.model_name,
        version=message.model_version or "1",
        stop=tensors.flag("stop"),
        wants_empty_final=EMPTY_FINAL in parameters and parameters[EMPTY_FINAL].bool_param,
        is_text="text_input" in tensors,
        text=tensors.text() if with_text else None,
        facts=facts,
        payload=Payload(
            model=message.model_name,
            head=tensors.without(LORA_TENSORS) if dropped else structure.to_bytes(),
            raw=not tensors.typed,
            unary=unary,
            kind=written_for(tensors.rank).name,
            outputs=tuple([output.name for output in structure.outputs]),
            whole=_whole(tensors),
        ),
        task=task,
    )


def _whole(tensors: Tensors) -> Whole | None:
    """Return what a request for a whole answer says of its tokens; None if it streams."""
    if any(tensors.flag(name) for name in STREAMS):
        return None
    excludes = next((tensors.flag(name) or tensors.in_region(name) for name in EXCLUDES if name in tensors), None)
    prompt_tokens = max(0, min(*tensors.integers("input_lengths"), tensors.input_tokens(), tensors.input_tokens()))
    return Whole(excludes, prompt_tokens, tensors.rows(), not any(flag in tensors for flag in FLAGS))


def _most(tensors: Tensors, names: tuple[str, ...]) -> int:
    """Return the largest count in any row of any of these tensors; 1 if there is none."""
    for name in names:
        if name in tensors and tensors.in_region(name):
            raise Refused(
                Reason.INVALID_REQUEST,
                f"{name} says how many seats the request takes: send it in the message, not in a shared-memory region",
            )
    return _largest(tensors, names, 1)


def _largest(tensors: Tensors, names: tuple[str, ...], least: int) -> int:
    """Return the largest element of any of these tensors, `least` if none is larger."""
    found = least
    for name in names:
        if name in tensors:
            found = max(found, *tensors.integers(name), found)
    return found


def _adapter(tensors: Tensors, name: str | None, rules: Rules) -> tuple[str, str]:
    """Return the adapter's name, and what stands for it in the request, "" if it does itself.

    The name is "" for the base model, and for a LoRA that the client may send itself.
    """
    own_tensors = tensors.lora
    if name is not None:
        if own_tensors:
            raise Refused(
                Reason.INVALID_REQUEST,
                f"the request has lora_name and {own_tensors[0]}; drop the lora_* tensors: the sidecar sends them",
            )
        return name, ""
    if not own_tensors:
        return "", ""
    if any(name in CORE_LORA_TENSORS for name in own_tensors) and any(
        name in LLMAPI_LORA_TENSORS for name in own_tensors
    ):
        names = " and ".join(own_tensors)
        raise Refused(Reason.INVALID_REQUEST, f"the request has {names}, which are of different models; send one's")
    ids = tensors.integers(*IDS)
    task_id = ids[0] if len(ids) == 1 else None
    if task_id is not None and task_id in rules.legacy_task_ids:
        return rules.legacy_task_ids[task_id], f"{_id_name(tensors)} {task_id}"
    if not rules.allow_client_lora:
        which = own_tensors[0] if task_id is None else f"{_id_name(tensors)} {task_id}"
        raise Refused(
            Reason.INVALID_REQUEST,
            f"the request has {which} of its own; name the adapter with the request parameter lora_name instead, or "
            "map old ids with legacy_task_ids in the configuration",
        )
    if task_id is None or not 0 <= task_id < CLIENT_TASK_IDS_END:
        raise Refused(
            Reason.INVALID_REQUEST,
            f"{_id_name(tensors)} {'is missing' if task_id is None else task_id}; a client's own must be in the "
            f"request and below {CLIENT_TASK_IDS_END}: larger ids are the sidecar's",
        )
    return "", ""


def _id_name(tensors: Tensors) -> str:
    """Return the name that the request's model has for an adapter's id."""
    return "lora_id" if any(name in tensors for name in LLMAPI_LORA_TENSORS) else "lora_task_id"
