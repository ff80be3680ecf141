"""Text for engines that take nothing else: chat templates, sampling in their words, stop words, errors' statuses."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.backends.openai.paths import CHAT, COMPLETIONS
from sidecar.backends.wire import ModelInferRequest
from sidecar.errors import Family, Misused, Reason
from sidecar.fronts.openai.body import read_body
from sidecar.fronts.openai.chat_templates import ChatTemplate, plain_messages, read_chat_template
from sidecar.fronts.openai.errors import _of_reason
from sidecar.fronts.openai.request import Unfit, read_request
from sidecar.fronts.openai.text_answers import StopWords
from sidecar.fronts.openai.text_forms import TextRequest, text_request

USER = {"role": "user", "content": "hi"}


def template(folder: Path, source: str, **config: Any) -> ChatTemplate:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    path = folder / "chat.jinja"
    path.write_text(source)
    return read_chat_template(path)


# Chat templates.


def test_where_a_template_is_found(tmp_path: Path) -> None:
    """A Jinja2 file, a tokenizer's config, one of several in it, a folder, a file beside the config."""
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one {{ eos_token }}", "eos_token": "</s>"}))
    assert read_chat_template(config).render([USER], {}) == "one </s>"
    assert read_chat_template(tmp_path).render([USER], {}) == "one </s>"
    several = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
    config.write_text(json.dumps({"chat_template": several}))
    assert read_chat_template(config).render([USER], {}) == "three"
    (tmp_path / "chat_template.jinja").write_text("four")
    assert read_chat_template(tmp_path).render([USER], {}) == "four"
    assert read_chat_template(config).render([USER], {}) == "four"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("chat.jinja", "{% for %}", "line 1: Expected"),
        ("chat.jinja", "", "there is none in it"),
        ("tokenizer_config.json", "{}", "there is none in it"),
        ("tokenizer_config.json", "[1]", "not a tokenizer's config"),
        ("tokenizer_config.json", "{", "Expecting property name"),
        ("missing.json", None, "no such file"),
    ],
)
def test_a_template_that_is_none(tmp_path: Path, name: str, content: str | None, sentence: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(Misused, match=sentence) as caught:
        read_chat_template(path)
    assert caught.value.reason is Reason.CONFIG_INVALID


def test_a_pipe_in_place_of_a_tokenizers_config(tmp_path: Path) -> None:
    """Nobody writes to it; it is refused and not waited for."""
    os.mkfifo(tmp_path / "tokenizer_config.json")
    with pytest.raises(Misused, match="it is a pipe to which nobody writes"):
        read_chat_template(tmp_path / "tokenizer_config.json")


def test_what_templates_are_written_for(tmp_path: Path) -> None:
    """Trimmed blocks, loop controls, plain JSON, marks for trainers, and the token that begins a text left out."""
    source = (
        "{{ bos_token }}\n{% for m in messages %}\n    {% if m.role == 'skip' %}{% continue %}{% endif %}\n"
        "{% generation %}{{ m | tojson }}{% endgeneration %}\n{% endfor %}\n"
        "{% if add_generation_prompt %}>{% endif %}{{ enable_thinking }}{{ strftime_now('%Y') | length }}"
    )
    made = template(tmp_path, source, bos_token={"content": "<s>"})
    messages = [{"role": "skip"}, {"role": "user", "content": "<é>"}]
    text = made.render(messages, {"enable_thinking": False})
    assert text == '\n{"role": "user", "content": "<é>"}>False4'


def test_a_template_has_its_say(tmp_path: Path) -> None:
    """Its own refusal, and what it stumbles over, are the client's to know; it cannot reach out of its sandbox."""
    made = template(tmp_path, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(Unfit, match="refuses it: roles must alternate"):
        made.render([USER], {})
    for source in ("{{ messages[0].content + 1 }}", "{{ messages.append(1) }}", "{{ ''.__class__.__mro__[1] }}"):
        with pytest.raises(Unfit, match="cannot take it"):
            template(tmp_path, source).render([USER], {})


def test_messages_become_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert plain_messages([{"role": "user", "content": parts, "name": "me"}]) == [
        {"role": "user", "content": "a\nb", "name": "me"}
    ]
    assert plain_messages([{"role": "assistant"}])[0]["content"] is None
    for messages, sentence in (
        ([], "is empty"),
        (["hi"], 'messages\\[0\\] must be an object with a "role"'),
        ([USER, {"role": "user", "content": [{"type": "image_url"}]}], "messages\\[1\\]: .* take text only"),
        ([{"role": "user", "content": 7}], "take text only"),
    ):
        with pytest.raises(Unfit, match=sentence):
            plain_messages(messages)


# Requests in the engines' words.


def forms_of(path: str = COMPLETIONS, made: ChatTemplate | None = None, **values: Any) -> TextRequest:
    record = {"model": "m"} | ({"prompt": "hi"} if path == COMPLETIONS else {}) | values
    asked = read_request(path, read_body(json.dumps(record).encode()))
    return text_request(asked, made, 77, {"triton": True, "triton_llmapi": True})


def tensors(raw: Any) -> dict[str, bytes]:
    message = ModelInferRequest.FromString(raw)
    return {tensor.name: data for tensor, data in zip(message.inputs, message.raw_input_contents, strict=True)}


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ({}, set()),
        ({"temperature": 0}, {"top_k"}),
        ({"temperature": 0, "top_p": 0.5, "seed": 3}, {"top_k"}),
        ({"temperature": 0.5}, {"temperature", "top_p", "seed"}),
        ({"temperature": 0.5, "top_k": 5}, {"temperature", "top_k", "seed"}),
        ({"top_p": 0.5}, {"top_p"}),
        ({"top_k": -1}, set()),
        ({"seed": 3, "repetition_penalty": 1.5}, {"seed", "repetition_penalty"}),
        ({"presence_penalty": 1, "frequency_penalty": 0}, {"presence_penalty"}),
        ({"ignore_eos": True}, {"end_id"}),
        ({"min_tokens": 3}, {"min_tokens"}),
        ({"min_tokens": 0}, set()),
        ({"logprobs": 0}, {"return_log_probs"}),
        ({"logprobs": False}, set()),
        ({"stop": "x"}, {"stop_words"}),
        ({"stop": []}, set()),
    ],
)
def test_sampling(asked: dict[str, Any], sent: set[str]) -> None:
    """A temperature samples, which the engine does only if it is told among how many; none is greedy."""
    always = {"text_input", "max_tokens", "stream", "exclude_input_in_output"}
    found = tensors(forms_of(**asked).forms["triton"])
    assert set(found) == always | sent
    if asked.get("temperature") == 0:
        assert found["top_k"] == b"\1\0\0\0"


def test_two_requests_that_sample_have_two_seeds() -> None:
    one, two = (tensors(forms_of(temperature=1).forms["triton"])["seed"] for _ in range(2))
    assert one != two


def test_the_length_of_an_answer(tmp_path: Path) -> None:
    """A completion's is OpenAI's default, a chat's what is assumed for admission; either name says it."""
    made = template(tmp_path, "{{ messages[0].content }}")
    assert forms_of().max_tokens == 16
    chat: dict[str, Any] = {"path": CHAT, "made": made, "messages": [USER]}
    assert forms_of(**chat).max_tokens == 77
    assert forms_of(**chat, max_tokens=5).max_tokens == 5
    assert forms_of(**chat, max_tokens=5, max_completion_tokens=6).max_tokens == 6


def test_what_the_llm_api_model_lacks() -> None:
    assert forms_of(presence_penalty=1.0).why_not == {}
    assert set(tensors(forms_of(presence_penalty=1.0).forms["triton_llmapi"])) >= {"sampling_param_presence_penalty"}
    assert (
        "no repetition_penalty and no ignore_eos"
        in forms_of(repetition_penalty=2, ignore_eos=True).why_not["triton_llmapi"]
    )


def test_members_that_nobody_knows_are_named() -> None:
    with pytest.raises(Unfit, match='have no "guided_regex"') as caught:
        forms_of(guided_regex="a+")
    assert caught.value.param == "guided_regex"
    assert "leave it out" in caught.value.message
    for wrong, meant in (
        ("max_token", "max_tokens"),
        ("temprature", "temperature"),
        ("parallel_toolcalls", "parallel_tool_calls"),
    ):
        with pytest.raises(Unfit, match=f'have no "{wrong}"; did you mean "{meant}"\\?'):
            forms_of(**{wrong: 1})
    for name, value in (("n", True), ("echo", 1), ("logprobs", 1), ("presence_penalty", True), ("seed", 2**64)):
        with pytest.raises(Unfit):
            forms_of(**{name: value})


# Stop words.


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_words_however_the_text_comes(text: str, words: list[str], data: st.DataObject) -> None:
    """The text up to the first stop word that is complete first, whatever the pieces are."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    ends = [*cuts, len(text)]
    pieces = [text[start:end] for start, end in zip([0, *cuts], ends, strict=True)]
    stop = StopWords(words)
    told = ""
    for number, piece in enumerate(pieces):
        told += stop.pass_on(piece, final=number == len(pieces) - 1)
    first = [text.find(word) for word in words if word in text]
    assert stop.found == bool(first)
    if not first:
        assert told == text
    else:
        assert text.startswith(told)
        assert any(text.startswith(word, len(told)) for word in words)
        assert not any(word in told for word in words)


def test_nothing_is_held_back_without_need() -> None:
    stop = StopWords(["END"])
    assert [stop.pass_on(piece, False) for piece in ("ab", "E", "N", "x", "EN")] == ["ab", "", "", "ENx", ""]
    assert stop.pass_on("", True) == "EN"


# Errors.


@pytest.mark.parametrize("reason", [reason for reason in Reason if reason.row.family is not Family.MISUSED])
def test_every_reason_has_a_status(reason: Reason) -> None:
    """Only what has not run is to be sent again, whatever a client does with that status by itself."""
    failed = _of_reason(reason, "words", None)
    headers = dict(failed.headers)
    error = json.loads(failed.body)["error"]
    assert set(error) == {"message", "type", "param", "code", "reason"}
    assert error["code"] == failed.status
    assert 400 <= failed.status < 600
    may_have_run = reason.row.family is Family.FAILED
    is_soon = reason is not Reason.PAUSED  # SDKs wait for a minute at most
    assert (headers[b"x-should-retry"] == b"true") == (reason.row.retryable and is_soon and not may_have_run)
    assert (b"retry-after" in headers) == reason.row.retryable
    if failed.status < 500:
        assert error["type"] != "server_error"
