"""Parse untrusted JSON: no duplicate keys, no NaN, bounded depth; every failure is a ValueError."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from sidecar.adapters.names import shown

ITEMS_MAX = 1 << 18


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse UTF-8 bytes that hold one JSON object. Raises ValueError with a reason to show to the user."""
    # Small JSON can be large in memory: an empty list takes twenty times its two or three characters.
    if sum(map(data.count, (b",", b"[", b"{"))) > ITEMS_MAX:
        raise ValueError(f"it holds more than {ITEMS_MAX} items")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte {error.start})") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error.msg} at character {error.pos})") from error
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    if b"\\u" in data:
        _refuse_half_letters(value)
    return value


def _refuse_half_letters(value: Any) -> None:
    """Raise ValueError for half of a surrogate pair, which Python takes and other parsers do not."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("it has an escape (\\u) that is half a letter") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} occurs twice")
        found[key] = value
    return found


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")
