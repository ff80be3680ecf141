"""One name as Redis stores it: a head for the scripts, then the record, which is empty for a forgotten name.

    <revision>:<token>:<number>:<milliseconds>:<record as JSON>

`revision` orders contents by age and changes only with the content. `number` is the change that last announced the
entry; it grows when a replica restores an entry that Redis had lost. `token` is random: it makes a write that is sent
twice count once, and orders two contents of one revision.
"""

from __future__ import annotations

import re
from typing import Generic, NamedTuple

from sidecar.state.codec import Codec, R, UnreadableRecord
from sidecar.state.written import ADAPTERS

_HEAD = re.compile(r"(\d+):(\w+):(\d+):(\d+):")


class Head(NamedTuple):
    """The fields of an entry before its record. `time_ms` is the time of the write by Redis' clock."""

    revision: int
    token: str
    number: int
    time_ms: int


class Entry(NamedTuple, Generic[R]):
    """A name's record and head; `record` is None for a forgotten name.

    `record` is None for an unreadable record too: `unread` is then its text, which is kept as it is, and `why` the
    fault.
    """

    head: Head
    record: R | None
    unread: str = ""
    why: str = ""


NOTHING = Head(0, "", 0, 0)


def newer(one: Head, other: Head) -> bool:
    """Return True if the content of one entry is newer than the other's. The scripts use the same rule."""
    return (one.revision, one.token) > (other.revision, other.token)


def head_of(value: str) -> Head:
    """Return the head of a stored value, or NOTHING if it is damaged."""
    match = _HEAD.match(value)
    if match is None:
        return NOTHING
    revision, token, number, time_ms = match.groups()
    return Head(int(revision), token, int(number), int(time_ms))


def entry_of(name: str, value: str, codec: Codec[R] = ADAPTERS) -> Entry[R]:  # type: ignore[assignment]
    match = _HEAD.match(value)
    if match is None:
        return Entry(NOTHING, None, value, "it does not begin with its number")
    text = value[match.end() :]
    try:
        return Entry(head_of(value), codec.from_json(name, text) if text else None)
    except UnreadableRecord as error:
        return Entry(head_of(value), None, text, str(error))


def value_of(entry: Entry[R], codec: Codec[R] = ADAPTERS) -> str:  # type: ignore[assignment]
    head = entry.head
    text = codec.to_json(entry.record) if entry.record is not None else entry.unread
    return f"{head.revision}:{head.token}:{head.number}:{head.time_ms}:{text}"
