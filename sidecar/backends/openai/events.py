"""Read the events of an OpenAI stream, and count tokens in them, without parsing each."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from sidecar.backends.openai.paths import Grammar

END_OF_EVENT = b"\n\n"
EVENT, END = b"data:", b"[DONE]"
DONE = EVENT + b" " + END
ERROR = b'data: {"error"'
CHOICES = b'"choices":[{'
ROLE, NO_CONTENT, ROLE_ONLY = b'"role":"', b'"content":""', b'"delta":{"role":"assistant"}'
ENDS = b'"finish_reason":"'
ENDS_ONLY = (
    b'"text":"","finish_reason":"',
    b'"delta":{},"finish_reason":"',
    b'"delta":{"reasoning_content":null},"logprobs":null,"finish_reason":"',
)
"""How vLLM's Rust front end begins a chat and ends a choice, without a token, and how SGLang ends a chat's. vLLM's
Python server ends it with the last token, and puts "logprobs" in between.
"""
IDS = b'"token_ids":['
PROMPT_IDS = b'"prompt_token_ids":['
USAGE = b'"usage":{'
# None of these can occur in the text of an answer: there a backslash precedes every quote.
_index = re.compile(rb'"choices":\[\{"index":(\d+)').search
_completion = re.compile(rb'"completion_tokens"\s*:\s*(\d+)').search
_prompt = re.compile(rb'"prompt_tokens"\s*:\s*(\d+)').search
_usages = re.compile(rb'"usage"\s*:\s*\{').finditer
# Some servers write spaces between the parts of their JSON, or none after the colon of "data:".
_choices = re.compile(rb'"choices"\s*:\s*\[\s*\{').search
_error = re.compile(rb'data:\s*\{\s*"error"').match
_is_final = re.compile(rb"data:\s*\[DONE\]").match
NAME = b"event: "


def record_of(raw: bytes) -> dict[str, Any]:
    """Return the object in an event of a stream, or in a whole answer; {} for the end of a stream."""
    content = raw.removeprefix(EVENT).strip()
    found: dict[str, Any] = {} if content == END else json.loads(content)
    return found


class NamedEvents:
    """Reads events that have names, by the grammar of their path. One with tokens is neither an error nor the last."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar

    def is_error(self, event: bytes) -> bool:
        return _is_error(event) or name_of(event) in self._grammar.errors

    def is_final(self, event: bytes) -> bool:
        return name_of(event) in self._grammar.finals

    def tokens(self, event: bytes) -> int | None:
        """Return how many tokens an event has; None if it has none by its kind."""
        return 1 if name_of(event).endswith(self._grammar.tokens) else None


def name_of(event: bytes) -> bytes:
    """Return the name of an event; empty if it has none."""
    return event[len(NAME) : event.find(b"\n")].strip() if event.startswith(NAME) else b""


def split(come: bytes) -> tuple[list[bytes], bytes]:
    """Return the whole events in what has come of a stream, without the empty line after each, and the rest.

    A line may end with a line feed, or with a carriage return before it, which is left out.
    """
    if b"\r" in come:
        come = come.replace(b"\r\n", b"\n")
    *events, rest = come.split(END_OF_EVENT)
    return [event for event in events if event], rest


class ChoiceEvents:
    """Reads events with choices, the last of which is `[DONE]`.

    vLLM puts several tokens into one event when it lags, by its stream_interval, or when it guesses. So token ids are
    counted if the request asked for them, else the usage is read if every event has one, else each event counts as one
    except those that only begin a chat or only end a choice. An event without text may well be a token: one that is
    half a letter.
    """

    def __init__(self) -> None:
        self._has_some = False
        self._by_choice: dict[bytes, int] = {}

    def is_error(self, event: bytes) -> bool:
        return _is_error(event)

    def is_final(self, event: bytes) -> bool:
        return _is_final(event) is not None

    def tokens(self, event: bytes) -> int | None:
        """Return how many tokens an event has; None if it has no choice."""
        choice = event.find(CHOICES)
        if choice < 0 and _choices(event) is not None:
            event = _without_spaces(event)
            choice = event.find(CHOICES)
        if choice < 0:
            return None
        begin = event.find(IDS, choice)
        if begin >= 0:
            return _ids_in(event, begin + len(IDS))
        if event.find(USAGE, choice) >= 0:
            return self._used(event)
        if not self._has_some and ROLE in event and NO_CONTENT in event:
            return 0
        if event.find(ROLE_ONLY, choice) >= 0:
            return 0
        if event.find(ENDS, choice) >= 0 and any(end in event for end in ENDS_ONLY):
            return 0
        self._has_some = True
        return 1

    def _used(self, event: bytes) -> int:
        """Return by how much the usage of the event's choice has grown: each choice has its own."""
        total, choice = completion_tokens(event), _index(event)
        if total is None or choice is None:
            return 1
        before = self._by_choice.get(choice[1], 0)
        self._by_choice[choice[1]] = total
        return max(0, total - before)


def _is_error(event: bytes) -> bool:
    return event.startswith(ERROR) or _error(event) is not None


def _without_spaces(event: bytes) -> bytes:
    """Return an event as most servers write it; as it is if it is not JSON."""
    try:
        return EVENT + json.dumps(record_of(event), ensure_ascii=False, separators=(",", ":")).encode()
    except ValueError:
        return event


def reader_of(grammar: Grammar) -> NamedEvents | ChoiceEvents:
    """Return what reads the events of one answer."""
    return NamedEvents(grammar) if grammar.is_named else ChoiceEvents()


def _ids_in(event: bytes, begin: int) -> int:
    end = event.find(b"]", begin)
    return event.count(b",", begin, end) + 1 if end > begin else 0


def prompt_bytes(event: bytes) -> int:
    """Return how many bytes longer an event is for the prompt's token ids, which only the first one has."""
    begin = event.find(PROMPT_IDS)
    return 0 if begin < 0 else event.find(b"]", begin) + 1 - (begin + len(PROMPT_IDS) - 1) - len(b"null")


def begins_only(chunk: bytes) -> bool:
    """Return True if a part of a stream is the event that begins a chat, without a token."""
    return ROLE in chunk and NO_CONTENT in chunk and chunk.count(END_OF_EVENT) == 1


def completion_tokens(body: bytes) -> int | None:
    """Return the number of tokens in an answer's usage; None if it has none."""
    return _counted(_completion, body)


def prompt_tokens(body: bytes) -> int | None:
    """Return the number of the prompt's tokens in an answer's usage; None if it has none."""
    return _counted(_prompt, body)


def _counted(count: Callable[[bytes, int], re.Match[bytes] | None], body: bytes) -> int | None:
    """Return a count of the last usage. No text of an answer can look so: there a backslash precedes every quote."""
    begin = max((found.start() for found in _usages(body)), default=-1)
    found = count(body, begin) if begin >= 0 else None
    return None if found is None else int(found[1])


def used(body: bytes) -> tuple[int | None, int | None]:
    """Return the tokens of the prompt and of the answer by the usage of an answer, or of what an event has of it.

    It is read whole: clients have a say in other members of an answer to Responses.
    """
    try:
        record = json.loads(body[body.index(b"{") :])
    except ValueError:
        return None, None
    for holder in (record, record.get("response"), record.get("message")):
        usage = holder.get("usage") if isinstance(holder, dict) else None
        if isinstance(usage, dict):
            prompt = usage.get("input_tokens", usage.get("prompt_tokens"))
            made = usage.get("output_tokens", usage.get("completion_tokens"))
            return _whole(prompt), _whole(made)
    return None, None


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def message_of(body: bytes) -> str:
    """Return the message in an error's body: vLLM's, nested, or TensorRT-LLM's, flat or for a validation one string."""
    try:
        record: Any = json.loads(body)
        error = record.get("error") or (record.get("response") or {}).get("error") or record
        return error if isinstance(error, str) else str(error["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return body[:500].decode(errors="replace")
