"""Our request parameters, and those that were meant to be ours: a slip of the name must not reach the base model."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from sidecar.errors import Reason, Refused

PARAMETERS = ("lora_name", "lora_tenant", "lora_class", "lora_deadline_ms")
IN_METADATA = {name.replace("_", "-"): name for name in PARAMETERS}
MISTAKES = ("adapter", "adaptername", "adapterid")
"""Other words for an adapter; so is everything that begins with "lora", however it is written."""
CHARACTERS_MAX = 4096
"""Of one of ours. Names, tenants and classes are words."""
FOREIGN_CHARACTERS_MAX = 65_536
"""Of a parameter that is none of ours. Data travels in tensors."""
SHOWN_CHARACTERS_MAX = 80


def own_parameters(parameters: Any, metadata: Mapping[str, str]) -> dict[str, str]:
    """Return our parameters as text; those of the request win over the call's metadata.

    Raises Refused(INVALID_REQUEST) for one that is not as it must be, and for one that was meant to be ours.
    """
    own = {name: _bounded(name, metadata[key]) for key, name in IN_METADATA.items() if key in metadata}
    for key in metadata:
        if key not in IN_METADATA and _was_meant(key):
            raise _unknown("metadata", key, list(IN_METADATA))
    for name, value in parameters.items():
        if name in PARAMETERS:
            own[name] = _bounded(name, _text(name, value))
        elif _was_meant(name):
            raise _unknown("parameter", name, PARAMETERS)
        elif len(name) + len(value.string_param) > FOREIGN_CHARACTERS_MAX:
            raise Refused(
                Reason.INVALID_REQUEST,
                f'the parameter "{clipped(name)}" has {len(name) + len(value.string_param)} characters; at most '
                f"{FOREIGN_CHARACTERS_MAX} are taken, so send data as an input tensor",
            )
    if own.get("lora_name") == "":
        raise Refused(
            Reason.INVALID_REQUEST, "lora_name is empty; name an adapter, or leave the parameter out for the base model"
        )
    return own


def clipped(text: str) -> str:
    """Return untrusted text for a message: one line, its beginning only."""
    printable = "".join(letter if letter.isprintable() else "?" for letter in text[:SHOWN_CHARACTERS_MAX])
    return printable if len(text) <= SHOWN_CHARACTERS_MAX else f"{printable}…"


def _was_meant(name: str) -> bool:
    letters = name[:SHOWN_CHARACTERS_MAX].lower().replace("_", "").replace("-", "")
    return letters.startswith("lora") or letters in MISTAKES


def _unknown(kind: str, name: str, known: list[str] | tuple[str, ...]) -> Refused:
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


def _bounded(name: str, text: str) -> str:
    if len(text) > CHARACTERS_MAX:
        raise Refused(
            Reason.INVALID_REQUEST,
            f'the parameter "{name}" has {len(text)} characters ("{clipped(text)}"); at most {CHARACTERS_MAX} make '
            "sense",
        )
    return text


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
