"""Large bodies, read in a process of their own: as they are read here, and the event loop goes on meanwhile."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sidecar.backends.openai.paths import CHAT, COMPLETIONS
from sidecar.errors import Reason, Refused
from sidecar.fronts.openai import large
from sidecar.fronts.openai.body import VALUES_MAX, read_body
from sidecar.fronts.openai.chat_templates import ChatTemplate, compiled_template
from sidecar.fronts.openai.large import Found, LargeBodies, Order, Refusal, Template
from sidecar.fronts.openai.request import Unfit, parts_of, read_request
from sidecar.fronts.openai.text_forms import text_request
from tests.kit.serving import until

NESTED = b'{"model":"sql","prompt":"a","x":[' + b"[]," * (VALUES_MAX // 2 - 8) + b"[]]}"
"""As many values as a body may have: a fifth of a second to be read, during which nothing else of a process runs."""
USER = {"role": "user", "content": "hi"}
STREAMS = {"triton": True, "triton_llmapi": False}
ORDER = Order(COMPLETIONS, 0, 8, 1 << 20, (None,), 77, STREAMS)


START = large._start
"""Starts the real process: tests fork it."""


async def read_all(bodies: LargeBodies, raw: bytes, order: Order = ORDER) -> tuple[Found, ...]:
    """Read a body that comes in three pieces."""
    pieces = (raw[:5], raw[5:9], raw[9:])
    return await bodies.read(pieces, replace(order, size_bytes=len(raw)))


async def read(bodies: LargeBodies, raw: bytes, order: Order = ORDER) -> Found:
    """Read the body of one request."""
    (found,) = await read_all(bodies, raw, order)
    return found


def template(source: str) -> ChatTemplate:
    return compiled_template(source, "chat.jinja", {"bos_token": "<s>"})


async def test_the_event_loop_goes_on_meanwhile() -> None:
    """Reading is another process's work: while that one is held up, this one takes its turns."""
    bodies = LargeBodies()
    await read(bodies, b'{"model":"sql","prompt":"a"}')
    assert bodies.pid is not None
    os.kill(bodies.pid, signal.SIGSTOP)
    reading = asyncio.create_task(read(bodies, NESTED))
    for _ in range(10_000):
        await asyncio.sleep(0)
    assert not reading.done()
    os.kill(bodies.pid, signal.SIGCONT)
    found = (await reading).asked
    assert (found.model, found.body.values) == ("sql", {"model": "sql"})


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "é" * 20, "user": "me", "stream": True, "stream_options": {"include_usage": True}}),
        (COMPLETIONS, {"prompt": [1, 2, 3], "max_tokens": 9, "n": 3}),
        (COMPLETIONS, {"prompt": ["a"]}),
        (CHAT, {"messages": [USER], "max_completion_tokens": 4}),
    ],
)
async def test_what_is_asked_is_what_is_read_here(path: str, body: dict[str, Any]) -> None:
    """And the body goes on as it came; its values stay behind."""
    raw = json.dumps({**body, "model": "sql@v1", "last": 1}, ensure_ascii=False).encode()
    found = (await read(LargeBodies(), raw, replace(ORDER, path=path))).asked
    here = read_request(path, read_body(raw))
    assert found.around() == here.around()
    assert (found.model, found.body.values) == ("sql@v1", {"model": "sql@v1"})
    assert replace(found, body=here.body) == here


async def test_a_list_of_prompts_is_taken_apart_there() -> None:
    """Each request with its prompt, its lengths and its text; a longer list is refused in the same words."""
    raw = json.dumps({"model": "sql", "prompt": ["é", "bb"], "temperature": 0}).encode()
    found = await read_all(LargeBodies(), raw)
    here = parts_of(read_request(COMPLETIONS, read_body(raw)), 8, 1 << 20)
    assert [each.asked.around() for each in found] == [each.around() for each in here]
    assert [replace(each.asked, body=here[0].body) for each in found] == list(here)
    assert [each.asked.prompt_bytes for each in found] == [2, 2]
    assert [each.texts for each in found] == [(text_request(each, None, 77, STREAMS),) for each in here]
    many = json.dumps({"model": "sql", "prompt": ["a"] * 9}).encode()
    with pytest.raises(Unfit, match="the list has 9 prompts; at most 8"):
        await read_all(LargeBodies(), many)


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (b'{"model":"a",}', None),
        (b"\xff" * 20, None),
        (b'{"prompt":"without a model"}', None),
        (b'{"model":"a","prompt":' + b"[" * 100_000, None),
        (b'{"model":"a","prompt":{}}', "prompt"),
        (b'{"model":"a","prompt":"x","stream":"yes"}', "stream"),
        (b'{"model":"' + b"a" * 5000 + b'","prompt":"x"}', None),
    ],
)
async def test_what_is_refused(raw: bytes, param: str | None) -> None:
    """In the same words, with the member that is to blame."""
    with pytest.raises(Refused) as here:
        read_request(COMPLETIONS, read_body(raw))
    with pytest.raises(Refused) as caught:
        await read(LargeBodies(), raw)
    assert (caught.value.reason, caught.value.message) == (Reason.INVALID_REQUEST, here.value.message)
    assert type(caught.value) is type(here.value)
    assert (caught.value.param if isinstance(caught.value, Unfit) else None) == param


@pytest.mark.parametrize(
    ("path", "sources", "body"),
    [
        (COMPLETIONS, (None,), {"prompt": "x" * 100, "stop": ["."], "temperature": 0, "max_tokens": 5}),
        (COMPLETIONS, (None,), {"prompt": "x", "temperature": 0, "ignore_eos": True}),
        (CHAT, ("{{ bos_token }}{{ messages[0].content }}", "{{ messages[0].role }}"), {"messages": [USER], "seed": 1}),
    ],
)
async def test_text_for_engines_that_take_nothing_else(
    path: str, sources: tuple[Any, ...], body: dict[str, Any]
) -> None:
    """Is written there, with each template, in the words of both models."""
    raw = json.dumps({"model": "sql", **body}).encode()
    templates = [None if source is None else template(source) for source in sources]
    told = tuple(None if one is None else Template.of(one) for one in templates)
    found = await read(LargeBodies(), raw, replace(ORDER, path=path, templates=told))
    asked = read_request(path, read_body(raw))
    assert list(found.texts) == [text_request(asked, one, 77, STREAMS) for one in templates]


async def test_text_that_such_engines_cannot_take() -> None:
    """The others can still answer: it is refused when one of these is to."""
    raw = json.dumps({"model": "sql", "prompt": [1, 2]}).encode()
    (text,) = (await read(LargeBodies(), raw)).texts
    assert isinstance(text, Refusal)
    assert isinstance(text.error, Unfit)
    assert text.error.param == "prompt"


async def test_a_process_that_is_killed_is_followed_by_another() -> None:
    """In the middle of a body, which is then read by the next."""
    bodies = LargeBodies()
    await read(bodies, b'{"model":"sql","prompt":"a"}')
    first = bodies.pid
    assert first is not None
    reading = asyncio.create_task(read(bodies, NESTED))
    await asyncio.sleep(0)
    os.kill(first, signal.SIGKILL)
    assert (await reading).asked.model == "sql"
    assert bodies.pid not in (None, first)


async def test_a_process_that_cannot_read_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Is told of, with what to do; so is one that cannot be started."""
    for executable, why in ((shutil.which("false"), "code 1"), (str(tmp_path / "none"), "No such file")):
        with monkeypatch.context() as patch:
            patch.setattr(large, "_start", START)
            patch.setattr(sys, "executable", executable)
            with pytest.raises(Refused, match=f"{why}.*send less, or give the sidecar more memory"):
                await read(LargeBodies(), NESTED)


async def test_the_process_ends_with_who_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is there before the first body."""
    monkeypatch.setattr(large, "_start", START)
    bodies = LargeBodies()
    assert bodies.pid is None
    await read(bodies, b'{"model":"sql","prompt":"a"}')
    pid = bodies.pid
    assert pid is not None
    del bodies
    await until(lambda: has_ended(pid))


def has_ended(pid: int) -> bool:
    gc.collect()
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_the_process_that_reads_them_starts_without_what_it_does_not_need() -> None:
    """The first large body waits for it; access brings clients of identity providers with it."""
    program = "import sys, sidecar.fronts.openai.large_reader; print(*sys.modules)"
    started = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    assert {"sidecar.access.access", "httpx", "grpc", "jinja2", "numpy"}.isdisjoint(started.stdout.split())
