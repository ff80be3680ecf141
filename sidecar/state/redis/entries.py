"""One name as it is written down in Redis: a head for the scripts, then the record, nothing for a forgotten name.

    <revision>:<token>:<number>:<milliseconds>:<record as JSON>

`revision` tells how new the content is and stays what it is for as long as the content does; `number` is the change
that announced it last, a later one when a replica has put the entry back into a Redis that had lost it. `token` is
random: with it a write that is sent twice is taken once, and two contents with one revision have an order.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from sidecar.state.records import Record
from sidecar.state.written import UnreadableRecord, from_json, to_json

_HEAD = re.compile(r"(\d+):(\w+):(\d+):(\d+):")


class Head(NamedTuple):
    """What is known of an entry without reading its record. `time_ms` is when it was written, by Redis' clock."""

    revision: int
    token: str
    number: int
    time_ms: int


class Entry(NamedTuple):
    """A name's record and how new it is; `record` is None for a name that was forgotten.

    A record that cannot be read is None too: `unread` is its text, which is kept as it is, and `why` what is wrong.
    """

    head: Head
    record: Record | None
    unread: str = ""
    why: str = ""


NOTHING = Head(0, "", 0, 0)


def newer(one: Head, other: Head) -> bool:
    """Whether the content of one entry is newer than another's. The scripts decide alike."""
    return (one.revision, one.token) > (other.revision, other.token)


def head_of(value: str) -> Head:
    """Return how new a value is, NOTHING for a damaged one."""
    match = _HEAD.match(value)
    if match is None:
        return NOTHING
    revision, token, number, time_ms = match.groups()
    return Head(int(revision), token, int(number), int(time_ms))


def entry_of(name: str, value: str) -> Entry:
    match = _HEAD.match(value)
    if match is None:
        return Entry(NOTHING, None, value, "it does not begin with its number")
    text = value[match.end() :]
    try:
        return Entry(head_of(value), from_json(name, text) if text else None)
    except UnreadableRecord as error:
        return Entry(head_of(value), None, text, str(error))


def value_of(entry: Entry) -> str:
    head = entry.head
    text = to_json(entry.record) if entry.record is not None else entry.unread
    return f"{head.revision}:{head.token}:{head.number}:{head.time_ms}:{text}"
