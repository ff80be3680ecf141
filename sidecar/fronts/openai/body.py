"""Read a request's JSON body: its top-level values, and the span of the value of `model`.

The body is sent to an engine as bytes, with another name in that span. Nothing else is rewritten, so members that only
the engine understands cannot change. The standard library's scanner reads one top-level member at a time, which gives
the spans. A list of prompts becomes several requests, each with one prompt in place of the list.

Parsers differ in which of two members of one name counts, so a duplicate is refused: it could make an engine use
another adapter, or give more answers, than was checked here. Half of a surrogate pair has no UTF-8 encoding: no engine
can take it, and some fail with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from json import JSONDecodeError
from typing import Any

from sidecar.errors import Reason, Refused

MODEL, PROMPT, SALT = "model", "prompt", "cache_salt"
LENGTHS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
MEMBERS_MAX = 1000
"""Top-level members of a body. Engines know some eighty; a million would block the event loop for seconds."""
VALUES_MAX = 1_250_000
"""Values of a body, estimated by its commas and opening brackets: more token ids than any engine takes."""
MODEL_CHARACTERS_MAX = 4096
"""Length of a model's name, as in the other fronts."""
BOM = b"\xef\xbb\xbf"

_letters = re.compile(r"[^\\]*+(?:\\(?:[^u]|u[^dD]|u[dD][0-7]|u[dD][89abAB]..\\u[dD][c-fC-F])[^\\]*+)*+").match
"""Matches a body that was read up to the first escape of half a surrogate pair, or to its end."""
_skip = re.compile(r"[ \t\n\r]*").match


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


# The two halves of the standard decoder: each reads a value or a string at an index, and returns the index after it.
_decoder: Any = json.JSONDecoder(parse_constant=_no_number)
_scan = _decoder.scan_once
_scan_string = _decoder.parse_string


Span = tuple[int, int]
"""Begin and end, as for a slice."""


@dataclass(frozen=True)
class Body:
    """`values` are the top-level members, `sizes` the number of characters of each value.

    `model` and `prompt` are the spans of these values in `raw`; (0, 0) for a prompt that is absent. `open_lengths` are
    the names and spans of lengths that are given as null or 0.
    """

    values: dict[str, Any]
    sizes: dict[str, int]
    raw: bytes
    model: Span
    prompt: Span = (0, 0)
    open_lengths: tuple[tuple[str, Span], ...] = ()
    salt: Span = (0, 0)

    def around(
        self,
        only_prompt: Span | None = None,
        length: int | None = None,
        names: Sequence[str] = LENGTHS,
        salt: str | None = None,
        more: Mapping[str, str] = {},
    ) -> tuple[bytes, bytes]:
        """Return the bytes before and after the value of `model`, of a list of prompts with `only_prompt` alone.

        `length` is added as the last of `names`, or in place of a null or 0 of one of them: a second member of one name
        would be ambiguous. `salt` takes the place of the client's own, or is added. `more` is JSON of members to add.
        """
        raw, (begin, end) = self.raw, self.model
        edits: list[tuple[Span, bytes]] = []
        if only_prompt is not None:
            edits.append((self.prompt, b"[%b]" % raw[slice(*only_prompt)]))
        if length is not None:
            edits += [(span, b"%d" % length) for name, span in self.open_lengths if name in names]
        added = b"" if salt is None else b'"%b"' % salt.encode()
        if added and self.salt[1]:
            edits.append((self.salt, added))
        before, after = self._edited(0, begin, edits), self._edited(end, len(raw), edits)
        if length is not None and not any(name in names for name, _ in self.open_lengths):
            after = b',"%b":%d%b' % (names[-1].encode(), length, after)
        if added and not self.salt[1]:
            after = b',"%b":%b%b' % (SALT.encode(), added, after)
        for name, value in more.items():
            after = b',"%b":%b%b' % (name.encode(), value.encode(), after)
        return before, after

    def _edited(self, start: int, stop: int, edits: list[tuple[Span, bytes]]) -> bytes:
        """Return the bytes from `start` to `stop` with the edits that lie there."""
        pieces, at = [], start
        for (first, last), text in sorted(edits):
            if start <= first < stop:
                pieces += [self.raw[at:first], text]
                at = last
        return b"".join((*pieces, self.raw[at:stop]))

    def prompts(self) -> list[Span]:
        """Return the span of each prompt of a list of prompts."""
        text = self.raw[slice(*self.prompt)].decode()
        spans: list[Span] = []
        at = 0
        while text[at] != "]":
            begin = _after_space(text, at + 1)
            _, end = _scan(text, begin)
            spans.append((begin, end))
            at = _after_space(text, end)
        offset = self.prompt[0]
        return [(begin + offset, end + offset) for begin, end in _in_bytes(text, spans)]


def read_body(raw: bytes) -> Body:
    """Read a body. Raises Refused(INVALID_REQUEST) with the fault and its position, or for a missing `model`."""
    _check_values(raw)
    text = _text(raw)
    try:
        return _read(raw, text)
    except JSONDecodeError as error:
        raise _refused(text, f"is not JSON: {error.msg}", error.pos) from error
    except StopIteration as stop:
        raise _refused(text, "is not JSON: a value is missing", stop.value) from stop
    except RecursionError as error:
        raise Refused(Reason.INVALID_REQUEST, "the body is nested too deeply to be read") from error
    except ValueError as error:
        raise Refused(Reason.INVALID_REQUEST, f"the body is not JSON: {error}") from error


def _check_values(raw: bytes) -> None:
    """Refuse a body that takes much longer to read than to send: all requests share one reader."""
    if len(raw) <= VALUES_MAX:
        return
    values = sum(raw.count(mark) for mark in (b",", b"[", b"{"))
    if values > VALUES_MAX:
        message = f"the body has {values} commas and opening brackets and may have {VALUES_MAX}; send fewer values"
        raise Refused(Reason.INVALID_REQUEST, message)


def _text(raw: bytes) -> str:
    if raw.startswith(BOM):
        raise Refused(Reason.INVALID_REQUEST, "the body begins with a byte order mark; send plain UTF-8 JSON")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise Refused(
            Reason.INVALID_REQUEST, f"the body is not UTF-8: {error.reason} at byte {error.start}; send UTF-8 JSON"
        ) from error


def _refused(text: str, what: str, position: int) -> Refused:
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    return Refused(
        Reason.INVALID_REQUEST,
        f"the body {what} at line {line} column {column} (byte {len(text[:position].encode())})",
    )


def _check_letters(text: str) -> None:
    """Refuse an escape of half a letter, in a value or a name."""
    if "\\ud" in text or "\\uD" in text:
        found = _letters(text)
        assert found is not None  # it may be empty
        at = found.end()
        if at < len(text):
            raise _refused(text, f"has half of a surrogate pair ({text[at : at + 6]}), which is no character,", at)


def _read(raw: bytes, text: str) -> Body:
    values: dict[str, Any] = {}
    spans: dict[str, Span] = {}
    at = _expect(text, _after_space(text, 0), "{", "the body must be an object")
    at = _after_space(text, at)
    if text[at : at + 1] == "}":
        at += 1
    else:
        while True:
            _expect(text, at, '"', "a name in quotes is missing")
            name, at = _scan_string(text, at + 1, True)
            at = _after_space(text, _expect(text, _after_space(text, at), ":", "a colon is missing"))
            value, end = _scan(text, at)
            if name in spans:
                raise Refused(Reason.INVALID_REQUEST, f'the body has "{name[:80]}" twice; say it once')
            if len(spans) == MEMBERS_MAX:
                raise Refused(Reason.INVALID_REQUEST, f"the body has more than {MEMBERS_MAX} members; none needs them")
            values[name], spans[name] = value, (at, end)
            at = _after_space(text, end)
            if text[at : at + 1] == "}":
                at += 1
                break
            at = _after_space(text, _expect(text, at, ",", "a comma or the closing brace is missing"))
    if _after_space(text, at) != len(text):
        raise JSONDecodeError("there is more behind the object", text, at)
    _check_letters(text)
    model = values.get(MODEL)
    if isinstance(model, str) and len(model) > MODEL_CHARACTERS_MAX:
        raise Refused(Reason.INVALID_REQUEST, f'"model" has {len(model)} characters; it is a name')
    if not (isinstance(model, str) and model):
        raise Refused(
            Reason.INVALID_REQUEST, "the body must have \"model\", a string: an adapter's name, or the base model's"
        )
    sizes = {name: end - begin for name, (begin, end) in spans.items()}
    unset = [name for name in LENGTHS if name in values and values[name] in (None, 0)]
    found = [spans.get(name, (0, 0)) for name in (MODEL, PROMPT, SALT, *unset)]
    model_span, prompt_span, salt, *lengths = _in_bytes(text, found)
    return Body(values, sizes, raw, model_span, prompt_span, tuple(zip(unset, lengths, strict=True)), salt)


def _in_bytes(text: str, spans: list[Span]) -> list[Span]:
    """Return spans in a text as spans in its UTF-8 encoding."""
    if text.isascii():
        return spans
    found: dict[int, int] = {}
    last = count = 0
    for index in sorted({index for span in spans for index in span}):
        count += len(text[last:index].encode())
        found[index], last = count, index
    return [(found[begin], found[end]) for begin, end in spans]


def _after_space(text: str, at: int) -> int:
    found = _skip(text, at)
    assert found is not None  # it may be empty
    return found.end()


def _expect(text: str, at: int, letter: str, otherwise: str) -> int:
    if text[at : at + 1] != letter:
        raise JSONDecodeError(otherwise, text, at)
    return at + 1
