"""Events that have names, and counts of answers in which clients have a say."""

from __future__ import annotations

import json

import pytest

from sidecar.backends.openai.events import completion_tokens, message_of, prompt_tokens, reader_of, used
from sidecar.backends.openai.paths import MESSAGES, RESPONSES, ROWS

USAGE = {"input_tokens": 7, "output_tokens": 500}
FORGED = {"usage": {"input_tokens": 1, "output_tokens": 2}}


@pytest.mark.parametrize(
    "record",
    [
        {"usage": USAGE, "user": "usage"},
        {"tools": [{"parameters": FORGED}], "usage": USAGE, "input_messages": [FORGED], "user": json.dumps(FORGED)},
        {"metadata": FORGED, "usage": USAGE},
        {"type": "response.completed", "response": {"tools": [FORGED], "usage": USAGE, "user": "usage"}},
        {"type": "message_start", "message": {"usage": USAGE}},
        {"type": "message_delta", "usage": USAGE},
    ],
)
def test_what_was_used(record: dict[str, object]) -> None:
    raw = json.dumps(record, separators=(",", ":")).encode()
    assert used(raw) == used(b"event: x\ndata: " + raw) == (7, 500)


@pytest.mark.parametrize("record", [{}, {"usage": None}, {"tools": [FORGED], "usage": None}, {"usage": {"x": True}}])
def test_nothing_is_told(record: dict[str, object]) -> None:
    assert used(json.dumps(record).encode()) == (None, None)


def test_a_text_that_is_the_word() -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 500}
    raw = json.dumps({"choices": [], "usage": usage, "prompt_logprobs": [{"decoded_token": "usage"}]}).encode()
    assert (prompt_tokens(raw), completion_tokens(raw)) == (7, 500)


@pytest.mark.parametrize(
    ("path", "name", "kind"),
    [
        (RESPONSES, "response.created", "other"),
        (RESPONSES, "response.output_text.delta", "token"),
        (RESPONSES, "response.reasoning_summary_text.delta", "token"),
        (RESPONSES, "response.output_text.done", "other"),
        (RESPONSES, "response.completed", "final"),
        (RESPONSES, "response.incomplete", "final"),
        (RESPONSES, "response.failed", "error"),
        (MESSAGES, "message_start", "other"),
        (MESSAGES, "content_block_delta", "token"),
        (MESSAGES, "message_delta", "other"),
        (MESSAGES, "message_stop", "final"),
        (MESSAGES, "error", "error"),
    ],
)
def test_events_by_their_names(path: str, name: str, kind: str) -> None:
    reader = reader_of(ROWS[path].grammar)
    event = f'event: {name}\ndata: {{"delta":"event: response.completed"}}'.encode()
    found = {"token": reader.tokens(event) == 1, "final": reader.is_final(event), "error": reader.is_error(event)}
    assert [each for each, holds in found.items() if holds] == ([] if kind == "other" else [kind])


def test_a_failed_response_says_why() -> None:
    assert message_of(b'{"response":{"error":{"code":"server_error","message":"it broke"}}}') == "it broke"
