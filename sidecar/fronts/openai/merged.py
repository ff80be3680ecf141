"""Merge the answers to a list of prompts into the one answer that an engine would give to the list.

Each prompt was a request of its own, perhaps at another engine. Choices are numbered prompt by prompt; all get the
first answer's id and time; token counts are added up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sidecar.fronts.openai.text_answers import DONE

Record = dict[str, Any]
BEGIN, END = b"data: ", b"\n\n"


class Merged:
    """The merged answer. `each` is the number of choices for each prompt."""

    def __init__(self, each: int) -> None:
        self._each = each
        self._head: Record = {}
        self._last: Record | None = None
        """A chunk with the counts of one answer; the sums go into it at the end."""
        self._usages: list[Mapping[str, Any]] = []

    def events(self, part: int, raw: bytes) -> bytes:
        """Return the events of one answer as events of the merged one, without token counts and the end."""
        return b"".join(self._event(part, event) for event in raw.split(END) if event and event + END != DONE)

    def _event(self, part: int, event: bytes) -> bytes:
        record = json.loads(event.removeprefix(BEGIN))
        if not record.get("choices"):
            self._last = record
            self._usages.append(record.get("usage") or {})
            return b""
        return BEGIN + _json(self._numbered(part, record)) + END

    def end(self) -> bytes:
        """Return the end of the stream, with the sum of the counts if the answers had any."""
        if self._last is None:
            return DONE
        return BEGIN + _json(self._last | self._head | {"usage": added_up(self._usages)}) + END + DONE

    def whole(self, answers: Sequence[bytes]) -> bytes:
        """Return answers that are not streamed, in the order of their prompts, as one."""
        records = [self._numbered(part, json.loads(answer)) for part, answer in enumerate(answers)]
        choices = [choice for record in records for choice in record["choices"]]
        usages = [record.get("usage") or {} for record in records]
        return _json(records[0] | {"choices": choices, "usage": added_up(usages) or None})

    def _numbered(self, part: int, record: Record) -> Record:
        if not self._head:
            self._head = {name: record[name] for name in ("id", "created") if name in record}
        for choice in record["choices"]:
            choice["index"] += part * self._each
        return record | self._head


def added_up(usages: Sequence[Mapping[str, Any]]) -> Record:
    """Return the sums of counts by name, details within details; a count that no answer has is null.

    A flag of one answer, as that a count is an estimate, is one of the sum.
    """
    total: Record = {}
    for usage in usages:
        for name, value in usage.items():
            total.setdefault(name, None)
            if isinstance(value, Mapping):
                total[name] = added_up([total[name] or {}, value])
            elif isinstance(value, bool):
                total[name] = value or bool(total[name])
            elif value is not None:
                total[name] = (total[name] or 0) + value
    return total


def _json(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
