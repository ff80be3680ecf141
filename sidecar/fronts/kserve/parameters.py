"""Read our request parameters, and refuse misspelt ones: a typo must not send a request to the base model.

The same names with hyphens come as metadata of a call: `lora-name` and so on.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import lru_cache
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
"""The shape that each value must have."""
IN_METADATA = {name.replace("_", "-"): name for name in PARAMETERS}
MISTAKES = ("adapter", "adaptername", "adapterid")
"""Other words for an adapter. Everything that begins with "lora", however it is written, also counts."""
FOREIGN_CHARACTERS_MAX = 65_536
"""Size of a foreign parameter. Data belongs in tensors."""


def own_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return our values in a call's metadata, by parameter name. Raises Refused(INVALID_REQUEST)."""
    for key in metadata:
        if key not in IN_METADATA and _is_misspelt(key):
            raise _unknown("metadata", key, list(IN_METADATA))
    own = {
        name: checked(PARAMETERS[name], metadata[key], f'the metadata "{key}"')
        for key, name in IN_METADATA.items()
        if key in metadata
    }
    _check_named(own)
    return own


def own_parameters(parameters: Any, metadata: Mapping[str, str]) -> dict[str, str]:
    """Return our parameters as text; those of the request override the call's metadata.

    Raises Refused(INVALID_REQUEST) for a malformed value and for a misspelt name.
    """
    own = own_metadata(metadata)
    for name, value in parameters.items():
        if name in PARAMETERS:
            own[name] = checked(PARAMETERS[name], _text(name, value), f'the parameter "{name}"')
        elif _is_misspelt(name):
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


def _is_misspelt(name: str) -> bool:
    return _is_like_ours(name[:SHOWN_CHARACTERS_MAX])


@lru_cache(1024)
def _is_like_ours(name: str) -> bool:
    letters = name.lower().replace("_", "").replace("-", "")
    return letters.startswith("lora") or letters in MISTAKES


def _unknown(kind: str, name: str, known: list[str]) -> Refused:
    """Return the refusal of an unknown name, with the closest of ours, or else the adapter's, as a suggestion."""
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
    """Return lora_deadline_ms in seconds. Raises Refused(INVALID_REQUEST) if it is not a time in the future."""
    if text is None:
        return None
    try:
        value = float(text) / 1000
    except ValueError:
        value = -1.0
    if not 0 < value < 1e9:
        raise Refused(
            Reason.INVALID_REQUEST,
            f'lora_deadline_ms is "{clipped(text)}"; it must be milliseconds from now, above 0 and below 1e12',
        )
    return value
