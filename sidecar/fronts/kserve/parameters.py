"""Our request parameters, and those that were meant to be ours: a slip of the name must not reach the base model.

The same words come as metadata of a call, whatever it asks: `lora-name` and so on.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from sidecar.config import identities
from sidecar.config.identities import SHOWN_CHARACTERS_MAX, checked, clipped
from sidecar.errors import Reason, Refused

PARAMETERS = {
    "lora_name": identities.ADAPTER,
    "lora_tenant": identities.TENANT,
    "lora_class": identities.CLASS,
    "lora_deadline_ms": identities.DEADLINE,
    "lora_session": identities.SESSION,
}
"""What each may look like."""
IN_METADATA = {name.replace("_", "-"): name for name in PARAMETERS}
MISTAKES = ("adapter", "adaptername", "adapterid")
"""Other words for an adapter; so is everything that begins with "lora", however it is written."""
FOREIGN_CHARACTERS_MAX = 65_536
"""Of a parameter that is none of ours. Data travels in tensors."""


def own_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return what a call's metadata says in our words, by the parameters' names. Raises Refused(INVALID_REQUEST)."""
    for key in metadata:
        if key not in IN_METADATA and _was_meant(key):
            raise _unknown("metadata", key, list(IN_METADATA))
    own = {
        name: checked(PARAMETERS[name], metadata[key], f'the metadata "{key}"')
        for key, name in IN_METADATA.items()
        if key in metadata
    }
    _check_named(own)
    return own


def own_parameters(parameters: Any, metadata: Mapping[str, str]) -> dict[str, str]:
    """Return our parameters as text; those of the request win over the call's metadata.

    Raises Refused(INVALID_REQUEST) for one that is not as it must be, and for one that was meant to be ours.
    """
    own = own_metadata(metadata)
    for name, value in parameters.items():
        if name in PARAMETERS:
            own[name] = checked(PARAMETERS[name], _text(name, value), f'the parameter "{name}"')
        elif _was_meant(name):
            raise _unknown("parameter", name, list(PARAMETERS))
        elif len(name) + len(value.string_param) > FOREIGN_CHARACTERS_MAX:
            raise Refused(
                Reason.INVALID_REQUEST,
                f'the parameter "{clipped(name)}" has {len(name) + len(value.string_param)} characters; at most '
                f"{FOREIGN_CHARACTERS_MAX} are taken, so send data as an input tensor",
            )
    _check_named(own)
    return own


def _check_named(own: Mapping[str, str]) -> None:
    if own.get("lora_name") == "":
        raise Refused(
            Reason.INVALID_REQUEST, "lora_name is empty; name an adapter, or leave the parameter out for the base model"
        )


def _was_meant(name: str) -> bool:
    letters = name[:SHOWN_CHARACTERS_MAX].lower().replace("_", "").replace("-", "")
    return letters.startswith("lora") or letters in MISTAKES


def _unknown(kind: str, name: str, known: list[str]) -> Refused:
    """Only a name that is nearly another one of ours means that; all else that speaks of LoRA means its name."""
    near = difflib.get_close_matches(name[:SHOWN_CHARACTERS_MAX].lower(), known, n=1, cutoff=0.8)
    return Refused(Reason.INVALID_REQUEST, f'unknown {kind} "{clipped(name)}"; did you mean "{(near or known)[0]}"?')


def _text(name: str, parameter: Any) -> str:
    kind = parameter.WhichOneof("parameter_choice")
    numbers = ("int64_param", "uint64_param", "double_param")
    if kind == "string_param" or (name == "lora_deadline_ms" and kind in numbers):
        return str(getattr(parameter, kind))
    raise Refused(
        Reason.INVALID_REQUEST,
        f'the parameter "{name}" must be a string, not {(kind or "nothing").removesuffix("_param")}',
    )


def seconds_until(text: str | None) -> float | None:
    """Return lora_deadline_ms in seconds. Raises Refused(INVALID_REQUEST) when it is no time to come."""
    if text is None:
        return None
    try:
        value = float(text) / 1000
    except ValueError:
        value = -1.0
    if not 0 < value < 1e9:
        raise Refused(
            Reason.INVALID_REQUEST,
            f'lora_deadline_ms is "{clipped(text)}"; it must be milliseconds from now, above 0',
        )
    return value
