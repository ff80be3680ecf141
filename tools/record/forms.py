"""The forms of answers: what two servers with different models should have in common."""

from __future__ import annotations

import json
import re
from itertools import groupby
from typing import Any

import httpx

KEPT = ("object", "type", "finish_reason", "role", "owned_by", "code", "param")
"""Keys whose strings are the same for every model."""
SAID = ("message", "error", "detail")
"""Keys whose strings are the texts of errors."""
_NAMES = (
    (re.compile(r"(?:/[\w.~-]+)+"), "<path>"),
    (re.compile(r"[0-9a-f]{32}"), "<hex>"),
    (re.compile(r"-?\b\d+\b"), "<number>"),
)


def form(value: Any, key: str = "") -> Any:
    """Return the form of a JSON value: pairs of an object in their order, runs of equal items of a list as one."""
    if isinstance(value, dict):
        return [[name, form(each, name)] for name, each in value.items()]
    if isinstance(value, list):
        return {"list of": [each for each, _ in groupby(form(item, key) for item in value)]}
    if isinstance(value, str):
        return value if key in KEPT else said(value) if key in SAID else "<text>"
    return value if value is None or isinstance(value, bool) else "<number>"


def said(text: str) -> str:
    """Return the text of an error without paths, numbers, and what a request brought."""
    text = re.sub(r", 'input': .*?(?=, 'ctx'|\}(?:\n|$))", "", text)
    for pattern, name in _NAMES:
        text = pattern.sub(name, text)
    return text


def answer_form(answer: httpx.Response) -> dict[str, Any]:
    """Return the form of a whole answer."""
    kind = answer.headers.get("content-type", "").partition(";")[0]
    body: Any = said(answer.text)
    if kind == "application/json":
        body = form(answer.json())
    return {"status": answer.status_code, "type": kind, "body": body}


def event_form(event: str) -> Any:
    """Return the form of one event of a stream, with the spaces around it."""
    data = event.removeprefix("data: ")
    space = data[len(data.rstrip(" ")) :]
    content = data.strip()
    return ["data: " if event.startswith("data: ") else "", _parsed(content), space]


def _parsed(content: str) -> Any:
    try:
        return form(json.loads(content))
    except ValueError:
        return content
