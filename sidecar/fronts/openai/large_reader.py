"""The child process that reads large bodies: an order and a body on standard input, the result on standard output.

Its parent is the only one that runs it, and it ends with its parent.

    python -m sidecar.fronts.openai.large_reader
"""

from __future__ import annotations

import functools
import pickle
import signal
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, BinaryIO

from sidecar.errors import Refused
from sidecar.fronts.openai.body import MODEL, Body, read_body
from sidecar.fronts.openai.large import Found, Order, Refusal, Template
from sidecar.fronts.openai.request import OpenAiRequest, Unfit, parts_of, read_request

if TYPE_CHECKING:
    from sidecar.fronts.openai.chat_templates import ChatTemplate
    from sidecar.fronts.openai.text_forms import TextRequest

TEMPLATES_KEPT = 64


def serve(orders: BinaryIO, answers: BinaryIO) -> None:
    """Carry out orders until the parent closes the pipe."""
    while True:
        try:
            order = pickle.load(orders)
            pickle.dump(found(order, orders.read(order.size_bytes)), answers)
            answers.flush()
        except (EOFError, BrokenPipeError):
            return


def found(order: Order, raw: bytes) -> tuple[Found, ...] | Refusal:
    """Read a body."""
    try:
        parts = parts_of(read_request(order.path, read_body(raw)), order.prompts_max, order.bytes_max)
    except Refused as refused:
        return _refusal(refused)
    body = parts[0].body
    bare = Body({MODEL: body.values[MODEL]}, {}, b"", body.model, body.prompt, body.open_lengths, body.salt)
    return tuple(
        Found(
            replace(asked, body=bare, id_range_found=asked.id_range),
            tuple(_text(asked, template, order) for template in order.templates),
        )
        for asked in parts
    )


def _text(asked: OpenAiRequest, template: Template | None, order: Order) -> TextRequest | Refusal:
    # Slow to import, and not needed for vLLM.
    from sidecar.backends.registry import kind_named
    from sidecar.fronts.openai.text_forms import text_request

    try:
        for name in order.kinds:
            kind_named(name)
        compiled = None if template is None else _compiled(template)
        return text_request(asked, compiled, order.tokens_assumed, order.streams)
    except Refused as refused:
        return _refusal(refused)


@functools.lru_cache(TEMPLATES_KEPT)
def _compiled(template: Template) -> ChatTemplate:
    from sidecar.fronts.openai.chat_templates import compiled_template

    return compiled_template(template.source, template.path, dict(template.tokens))


def _refusal(refused: Refused) -> Refusal:
    return Refusal(refused.message, refused.param if isinstance(refused, Unfit) else None)


if __name__ == "__main__":
    # Signals to the whole group, as from a terminal or systemd, are for the parent: it drains, then closes the pipe.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    serve(sys.stdin.buffer, sys.stdout.buffer)
