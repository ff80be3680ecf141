"""How many tokens an event of a vLLM's stream has, by its bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sidecar.backends.openai.events import ChoiceEvents, completion_tokens


def event(usage: int | None = None, index: int = 0, **choice: Any) -> bytes:
    """Return an event as the engine writes it."""
    record: dict[str, Any] = {"model": "base", "choices": [{"index": index, "text": "x"} | choice]}
    if usage is not None:
        record["usage"] = {"prompt_tokens": 7, "total_tokens": 7 + usage, "completion_tokens": usage}
    return b"data: " + json.dumps(record, separators=(",", ":")).encode()


OPENING = event(delta={"role": "assistant", "content": ""})


@pytest.mark.parametrize(
    ("events", "counts"),
    [
        ([event(), event()], [1, 1]),
        ([event(token_ids=[5, 6, 7]), event(token_ids=[]), event(token_ids=[8])], [3, 0, 1]),
        ([event(prompt_token_ids=[1, 2, 3, 4], token_ids=[5]), event(prompt_token_ids=None, token_ids=None)], [1, 1]),
        ([event(prompt_token_ids=[1, 2, 3, 4])], [1]),
        ([event(usage=2), event(usage=5), event(usage=5)], [2, 3, 0]),
        ([event(usage=2), event(usage=3, index=1), event(usage=3), event(usage=4, index=1)], [2, 3, 1, 1]),
        ([event(usage=9, token_ids=[5])], [1]),
        ([OPENING, OPENING, event(delta={"content": "a"}), OPENING], [0, 0, 1, 1]),
        ([event(delta={"role": "assistant", "content": "a"})], [1]),
        ([event(text='"token_ids":[1,2,3],"usage":{"completion_tokens":9}')], [1]),
    ],
)
def test_events(events: list[bytes], counts: list[int]) -> None:
    """Ids go before usage, and an answer's own text says nothing; what opens a chat is no token."""
    reader = ChoiceEvents()
    assert [reader.tokens(each) for each in events] == counts


RUST_COMPLETION = """\
{"id":"cmpl-1","object":"text_completion","created":1,"model":"a","choices":[{"index":0,"text":""}]}
{"id":"cmpl-1","object":"text_completion","created":1,"model":"a","choices":[{"index":0,"text":"\ufffd remainder"}]}
{"id":"cmpl-1","object":"text_completion","created":1,"model":"a","choices":[{"index":0,"text":"########"}]}
{"id":"cmpl-1","object":"text_completion","created":1,"model":"a","choices":[{"index":0,"text":"","finish_reason":"length"}]}
"""
RUST_CHAT = """\
{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"a","choices":[{"index":0,"delta":{"role":"assistant"}}]}
{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"a","choices":[{"index":0,"delta":{"content":"report"}}]}
{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"a","choices":[{"index":0,"delta":{"content":"MM"}}]}
{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"a","choices":[{"index":0,"delta":{},"finish_reason":"length"}]}
"""
RUST_IDS = """\
{"id":"cmpl-1","model":"a","choices":[{"index":0,"text":"","token_ids":[],"prompt_token_ids":[3,4,5]}]}
{"id":"cmpl-1","model":"a","choices":[{"index":0,"text":"","token_ids":[100]}]}
{"id":"cmpl-1","model":"a","choices":[{"index":0,"text":"\ufffd remainder","token_ids":[2714]}]}
{"id":"cmpl-1","model":"a","choices":[{"index":0,"text":"","finish_reason":"length","token_ids":[]}]}
"""
RUST_CHAT_IDS = """\
{"id":"c","model":"a","choices":[{"index":0,"delta":{"role":"assistant"}}],"prompt_token_ids":[3557,27,2830]}
{"id":"c","model":"a","choices":[{"index":0,"delta":{"content":"report"},"token_ids":[2643]}]}
{"id":"c","model":"a","choices":[{"index":0,"delta":{},"finish_reason":"length"}]}
"""
PYTHON_END = """\
{"id":"cmpl-1","model":"a","choices":[{"index":0,"text":"x","logprobs":null,"finish_reason":null,"stop_reason":null}]}
{"id":"cmpl-1","model":"a","choices":[{"index":0,"text":"","logprobs":null,"finish_reason":"stop","stop_reason":null}]}
"""


@pytest.mark.parametrize(
    ("stream", "counts"),
    [
        (RUST_COMPLETION, [1, 1, 1, 0]),
        (RUST_CHAT, [0, 1, 1, 0]),
        (RUST_IDS, [0, 1, 1, 0]),
        (RUST_CHAT_IDS, [0, 1, 0]),
        (PYTHON_END, [1, 1]),
    ],
)
def test_streams_of_both_front_ends(stream: str, counts: list[int]) -> None:
    """As vLLM 0.33 wrote them: a token of half a letter has no text, and an end by the Rust front end no token."""
    events = [f"data: {line}".encode() for line in stream.splitlines()]
    reader = ChoiceEvents()
    assert [reader.tokens(each) for each in events] == counts


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        (b'{"choices":[],"usage":{"prompt_tokens":3,"total_tokens":8,"completion_tokens":5}}', 5),
        (b'{"usage": {"completion_tokens_details": {}, "completion_tokens": 0}}', 0),
        (b'{"text":"\\"usage\\":{\\"completion_tokens\\":7}"}', None),
        (b'{"completion_tokens":7,"usage":null}', None),
        (b"[DONE]", None),
    ],
)
def test_usage(body: bytes, tokens: int | None) -> None:
    assert completion_tokens(body) == tokens
