"""Finding a request's model in its body, and putting another name there without touching the rest."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.errors import Reason, Refused
from sidecar.fronts.openai.body import read_body

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.just("model"), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.text(min_size=1).filter(lambda text: text.encode("utf-8", "ignore").decode() == text)


@given(st.dictionaries(st.text(), VALUES, max_size=5), NAMES, NAMES, st.integers(0, 5), st.booleans(), st.booleans())
def test_only_the_name_changes(
    members: dict[str, Any], model: str, other: str, place: int, ascii_only: bool, spaced: bool
) -> None:
    """Whatever else is in the body, before or behind it, and however it is written."""
    members.pop("model", None)
    pairs = list(members.items())
    pairs.insert(min(place, len(pairs)), ("model", model))
    raw = json.dumps(dict(pairs), ensure_ascii=ascii_only, indent=2 if spaced else None).encode("utf-8", "replace")
    body = read_body(raw)
    assert body.values["model"] == model
    before, after = body.around()
    assert before + json.dumps(model, ensure_ascii=ascii_only).encode() + after == raw
    renamed = json.loads(before + json.dumps(other).encode() + after)
    assert renamed == json.loads(raw) | {"model": other}


@pytest.mark.parametrize(
    ("raw", "before", "model"),
    [
        ('{"model":"a"}', '{"model":', "a"),
        ('\n{ "model" : "a" }\r\n', '\n{ "model" : ', "a"),
        ('{"\\u006dodel":"\\u0061"}', '{"\\u006dodel":', "a"),
        ('{"x":{"model":"no"},"y":["model"],"model":"a"}', '{"x":{"model":"no"},"y":["model"],"model":', "a"),
        ('{"prompt":"\\"model\\":\\"no\\"","model":"é@v1"}', '{"prompt":"\\"model\\":\\"no\\"","model":', "é@v1"),
        ('{"é":"🙂","model":"a"}', '{"é":"🙂","model":', "a"),
    ],
)
def test_where_the_name_stands(raw: str, before: str, model: str) -> None:
    body = read_body(raw.encode())
    assert (body.around()[0].decode(), body.values["model"]) == (before, model)


def test_a_member_that_comes_twice() -> None:
    """Which of them counts is for each parser to say, so there may be none."""
    with pytest.raises(Refused, match='has "n" twice'):
        read_body(b'{"n":1,"model":"a","n":2}')
    with pytest.raises(Refused, match='has "model" twice'):
        read_body(b'{"model":"a","\\u006dodel":"b"}')


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"", "the body must be an object at line 1 column 1 (byte 0)"),
        (b"[]", "the body must be an object"),
        (b'{"model":"a"', "a comma or the closing brace is missing at line 1 column 13 (byte 12)"),
        (b'{"model" "a"}', "a colon is missing at line 1 column 10 (byte 9)"),
        (b'{model:"a"}', "a name in quotes is missing at line 1 column 2 (byte 1)"),
        ('{"é":\n  flase}'.encode(), "a value is missing at line 2 column 3 (byte 9)"),
        (b'{"model":"a"}{}', "there is more behind the object at line 1 column 14 (byte 13)"),
        (b'{"model":"a\x01"}', "Invalid control character"),
        (b'{"model":"a","x":NaN}', "NaN is not JSON"),
        (b'{"model":"a","x":-Infinity}', "-Infinity is not JSON"),
        (b'{"model":"a","x":' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b'{"model":"\xff"}', "the body is not UTF-8: invalid start byte at byte 10"),
        (b'\xef\xbb\xbf{"model":"a"}', "byte order mark"),
        (b'{"model":"a","x":' + b'{"y":' * 100_000, "nested too deeply"),
        (b'{"model":null}', 'must have "model", a string'),
        (b'{"model":""}', 'must have "model", a string'),
        (b'{"model":"\\udc00"}', "has half of a surrogate pair (\\udc00), which is no character, at line 1 column 11"),
        (b'{"model":"a","p":["x\\\\\\uD800y"]}', "(\\uD800), which is no character, at line 1 column 23 (byte 22)"),
        (b'{"model":"a","\\ud83d\\ude00\\ude00":1}', "(\\ude00)"),
        (b'{"model":"a","p":"\\ud83d\\ud83d\\ude00"}', "(\\ud83d), which is no character, at line 1 column 19"),
        (b"{}", 'must have "model", a string'),
    ],
)
def test_what_is_refused(raw: bytes, sentence: str) -> None:
    """With the place, in characters for people and in bytes for machines."""
    with pytest.raises(Refused) as caught:
        read_body(raw)
    assert caught.value.reason is Reason.INVALID_REQUEST
    assert sentence in caught.value.message


@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:model\\u0 1', max_size=40).map(str.encode))
def test_it_takes_what_the_standard_decoder_takes(raw: bytes) -> None:
    """No more and no less, but for a missing or doubled model and for what is no JSON by the letter."""
    try:
        body = read_body(raw)
    except Refused:
        return
    assert json.loads(raw) == body.values


@given(st.lists(st.sampled_from(["\\", "ud800", "\ud83d", "\ude00", "😀", "é", '"'])).map("".join), st.booleans())
def test_only_text_that_has_an_encoding_is_taken(text: str, is_name: bool) -> None:
    raw = json.dumps({"model": "a", text: 1} if is_name else {"model": "a", "prompt": [{"x": text}]}).encode()
    try:
        json.dumps(json.loads(raw), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        with pytest.raises(Refused, match="half of a surrogate pair"):
            read_body(raw)
    else:
        assert read_body(raw).values == json.loads(raw)


@given(st.lists(st.text() | st.lists(st.integers(0, 99)), min_size=2, max_size=6), NAMES, st.booleans(), st.booleans())
def test_a_list_of_prompts_is_taken_apart(prompts: list[Any], model: str, first: bool, ascii_only: bool) -> None:
    """Each prompt gets the body for itself, in which nothing else changes; where it stands is found in any spelling."""
    pairs: list[tuple[str, Any]] = [("prompt", prompts), ("é", "ü"), ("model", model)]
    raw = json.dumps(dict(pairs if first else pairs[::-1]), ensure_ascii=ascii_only, indent=1).encode(
        "utf-8", "replace"
    )
    body = read_body(raw)
    for prompt, span in zip(prompts, body.prompts(), strict=True):
        before, after = body.around(span)
        part = json.loads(before + b'"x"' + after)
        assert part == json.loads(raw) | {"model": "x", "prompt": json.loads(json.dumps([prompt]))}
