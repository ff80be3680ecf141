"""How an operator names a request: by the sidecar's number, by its client's id, or by what may be either.

Clients choose ids, and one may be another request's number. A bare word is a number first; `request=` and `id=`, the
log's own words, say which of the two is meant.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

NAMED_MAX = 4
_NUMBER = re.compile(r"(request=)?([0-9]{1,18})(?:\.[0-9]+)?")
_ID = "id="


@dataclass(frozen=True)
class Meant:
    """The number and the id that are looked for, in this order; None for what is not meant."""

    number: int | None
    client_id: str | None


def asked_for(text: str) -> Meant:
    """Return what is meant by 17, by an engine's log's 17.2, by request=17, by a client's id, or by id=17."""
    if text.startswith(_ID):
        return Meant(None, text.removeprefix(_ID))
    number = _NUMBER.fullmatch(text)
    if number is None:
        return Meant(None, text)
    return Meant(int(number[2]), None if number[1] else text)


def also_an_id_note(client_id: str, others: Sequence[str]) -> str:
    """Return what is said where a number was found that clients gave as an id to `others` too; "" for none."""
    if not others:
        return ""
    return (
        f"{client_id} is also an id that clients have given, lastly to {_last(others)}: {_ID}{client_id} asks for "
        "the last of them"
    )


def same_id_note(client_id: str, found: Sequence[str]) -> str:
    """Return what is said of several requests with an id, of which the last is told; "" for one."""
    if len(found) == 1:
        return ""
    return (
        f'{len(found)} requests have the id "{client_id}", the last ones {_last(found)}: the last is told; '
        "request=NUMBER asks for another"
    )


def _last(found: Sequence[str]) -> str:
    return ", ".join(found[-NAMED_MAX:])
